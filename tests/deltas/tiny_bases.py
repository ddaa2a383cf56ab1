"""Tiny bases of several architectures, and models that were trained from them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import slimfit_ds

IDS = torch.arange(24).view(2, 12) % 31

CONFIGS: dict[str, tuple[str, Any]] = {
    "llama": (
        "LlamaForCausalLM",
        transformers.LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
        ),
    ),
    "llama_tied": (
        "LlamaForCausalLM",
        transformers.LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            tie_word_embeddings=True,
        ),
    ),
    "gpt2": ("GPT2LMHeadModel", transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2)),
    "bert": (
        "BertModel",
        transformers.BertConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
        ),
    ),
}


@dataclass
class Trained:
    """A model in training, and where it started."""

    base: Path
    model: Any
    handle: Any

    def train(self, steps: int = 4, rate: float = 1e-2, seed: int = 0) -> None:
        torch.manual_seed(seed)
        optimizer = torch.optim.AdamW(self.handle.trainable.values(), lr=rate)
        self.handle.follow(optimizer)
        self.model.train()
        for step in range(steps):
            labels = torch.tensor([0, 2]) if "Classification" in type(self.model).__name__ else IDS
            self.model(input_ids=(IDS + step) % 31, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        self.model.eval()

    def logits(self) -> torch.Tensor:
        return logits(self.model)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits.float()


def start(
    folder: Path,
    kind: str,
    dtype: torch.dtype = torch.float32,
    base_dtype: torch.dtype = torch.float32,
    **freeze: Any,
) -> Trained:
    """A tiny base in a folder, and a model that is about to train from it."""
    name, config = CONFIGS[kind]
    base = folder / "base"
    if not base.exists():
        torch.manual_seed(1)
        getattr(transformers, name)(config).to(base_dtype).save_pretrained(base)
    torch.manual_seed(2)
    if kind == "bert":
        model = transformers.BertForSequenceClassification.from_pretrained(base, num_labels=3, dtype=dtype)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    freeze = freeze if "width" in freeze else {"rate": 0.7, **freeze}
    handle = slimfit_ds.slim(model, {"freeze": freeze, "activations": "exact"})
    return Trained(base, model, handle)
