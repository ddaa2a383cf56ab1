"""Bytes kept for backward per token and block, in units of the hidden size h, for nine architectures and all presets.

    python benchmarks/activations/bytes.py [--models BERT-base Llama-3-8B]

bf16 weights and activations, 95 % of the weight layers frozen at random (biases train), training mode with the
dropout of each default config (except on attention probabilities, where fused kernels keep no mask), a padding
mask. The pass runs under FakeTensorMode at the real shapes, so nothing is computed; what passes through autograd's
saved-tensor hooks while a block runs is counted, each storage once, and divided by the number of blocks. Adds what
`benchmarks/results/bytes.csv` (`--csv`) lacks.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.initialization import no_init_weights

from slimfit_ds.activations.apply import compress
from slimfit_ds.activations.config import PRESETS, ActivationsConfig
from slimfit_ds.activations.recognise import find_blocks
from slimfit_ds.memory.saved import SavedActivations

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Study, machine, markdown

PRESET_ORDER = ("exact", "paper", "balanced", "minimal", "ultra")


@dataclass(frozen=True)
class Shape:
    """A model at its real size.

    Attributes:
        build: makes it with a number of blocks.
        hidden: h.
        blocks: how many blocks to count.
        batch: rows.
        tokens: sequence length, or 0 for images.
        image: pixels per side, or 0 for text.
        labels: `class` or `token`.
    """

    build: Callable[[int], nn.Module]
    hidden: int
    blocks: int
    batch: int
    tokens: int
    image: int = 0
    labels: str = "token"


def _llama_like(model: type, config: type, **sizes: Any) -> Callable[[int], nn.Module]:
    return lambda blocks: model(config(num_hidden_layers=blocks, use_cache=False, **sizes))


_LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}

SHAPES = {
    "BERT-base": Shape(
        lambda n: hf.BertForSequenceClassification(
            hf.BertConfig(num_hidden_layers=n, attention_probs_dropout_prob=0.0)
        ),
        768, 12, 32, 128, labels="class",
    ),
    "RoBERTa-base": Shape(
        lambda n: hf.RobertaForSequenceClassification(
            hf.RobertaConfig(num_hidden_layers=n, attention_probs_dropout_prob=0.0, max_position_embeddings=514)
        ),
        768, 12, 32, 128, labels="class",
    ),
    "DistilBERT": Shape(
        lambda n: hf.DistilBertForSequenceClassification(hf.DistilBertConfig(n_layers=n, attention_dropout=0.0)),
        768, 6, 32, 128, labels="class",
    ),
    "ViT-B/16-224": Shape(
        lambda n: hf.ViTForImageClassification(hf.ViTConfig(num_hidden_layers=n)), 768, 12, 32, 197, 224, "class"
    ),
    "GPT-2": Shape(
        lambda n: hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=n, attn_pdrop=0.0, use_cache=False)), 768, 12, 8, 512
    ),
    "Llama-3-8B": Shape(_llama_like(hf.LlamaForCausalLM, hf.LlamaConfig, **_LLAMA), 4096, 32, 1, 2048),
    "Qwen3-0.6B": Shape(
        _llama_like(
            hf.Qwen3ForCausalLM, hf.Qwen3Config, hidden_size=1024, intermediate_size=3072,
            num_attention_heads=16, num_key_value_heads=8, head_dim=128,
        ),
        1024, 28, 1, 2048,
    ),
    "Mistral-7B": Shape(
        _llama_like(hf.MistralForCausalLM, hf.MistralConfig, **_LLAMA, sliding_window=None), 4096, 32, 1, 2048
    ),
    # Encoder and decoder see the same number of tokens; a "block" is one encoder and one decoder layer.
    "T5-base": Shape(
        lambda n: hf.T5ForConditionalGeneration(
            hf.T5Config(d_model=768, d_ff=3072, num_layers=n, num_heads=12, decoder_start_token_id=0, use_cache=False)  # type: ignore[call-arg]
        ),
        768, 12, 32, 128,
    ),
}  # fmt: skip


def freeze(model: nn.Module, rate: float, seed: int) -> None:
    """Freeze that share of the weights (more than one dimension, or of a norm) at random; biases train."""
    weights = [p for name, p in model.named_parameters() if p.dim() > 1 or name.endswith("weight")]
    for weight in random.Random(seed).sample(weights, int(rate * len(weights))):
        weight.requires_grad_(False)


def inputs_for(shape: Shape) -> dict[str, torch.Tensor]:
    """A batch of that shape with a padding mask."""
    classes = torch.zeros(shape.batch, dtype=torch.long)
    if shape.image:
        pixels = torch.zeros(shape.batch, 3, shape.image, shape.image, dtype=torch.bfloat16)
        return {"pixel_values": pixels, "labels": classes}
    ids = torch.zeros(shape.batch, shape.tokens, dtype=torch.long)
    labels = classes if shape.labels == "class" else ids
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def per_block(shape: Shape, preset: str, rate: float, seed: int) -> float:
    """Bytes that autograd keeps of the blocks between forward and backward, per token and block, divided by h."""
    default = torch.get_default_dtype()
    kept: dict[int, torch.Tensor] = {}
    depth: list[nn.Module] = []

    def on_save(tensor: torch.Tensor, kind: str) -> None:
        if depth:
            kept.setdefault(tensor.untyped_storage()._cdata, tensor)

    with FakeTensorMode(allow_non_fake_inputs=True), no_init_weights():
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = shape.build(shape.blocks).train()
        finally:
            torch.set_default_dtype(default)
        handle = compress(model, ActivationsConfig(preset=preset))
        freeze(model, rate, seed)
        for block in find_blocks(model).values():
            block.register_forward_pre_hook(lambda module, _: depth.append(module))
            block.register_forward_hook(lambda *_: depth.pop() and None)
        with SavedActivations(model, on_save):
            loss = model(**inputs_for(shape)).loss
        handle.remove()
        del loss
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    return total / shape.blocks / (shape.batch * shape.tokens) / shape.hidden


def tables(csv: str = "bytes") -> dict[str, str]:
    """Return the table of the documents by its mark."""
    lines = []
    for model, shape in SHAPES.items():
        found = {
            row["preset"]: row["bytes_per_token_block_h"] for row in Study(csv, ()).rows(model=model, seed=0)
        }
        if found:
            tokens = f"{shape.batch} x {shape.tokens}"
            lines.append(
                [f"{model}, {tokens}", *(f"{found[p]:.2f}" if p in found else "" for p in PRESET_ORDER)]
            )
    return {"bytes": markdown(["model, batch x tokens", *PRESET_ORDER], lines)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--presets", nargs="*", default=list(PRESET_ORDER), choices=list(PRESETS))
    parser.add_argument("--rate", type=float, default=0.95, help="share of the weights that is frozen")
    parser.add_argument("--seed", type=int, default=0, help="which weights train")
    parser.add_argument("--csv", default="bytes", help="name of a study, or a path that ends in .csv")
    options = parser.parse_args()
    study = Study(options.csv, ("model", "preset", "rate", "seed"))
    for model in options.models:
        for preset in options.presets:
            row = {"model": model, "preset": preset, "rate": options.rate, "seed": options.seed}
            if not study.has(row):
                row["bytes_per_token_block_h"] = per_block(SHAPES[model], preset, options.rate, options.seed)
                study.add(row | {"dtype": "bf16"} | machine())
    print(tables(options.csv)["bytes"])


if __name__ == "__main__":
    main()
