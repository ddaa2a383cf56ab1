"""Tiny transformers from configs, and batches for them."""

from __future__ import annotations

import torch
import transformers as hf
from torch import nn

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
DECODER = {
    **SIZES,
    "num_key_value_heads": 2,
    "vocab_size": 60,
    "pad_token_id": 0,
    "max_position_embeddings": 32,
}
ENCODER = {**SIZES, "vocab_size": 60, "pad_token_id": 0, "max_position_embeddings": 40, "num_labels": 3}


def _bert() -> nn.Module:
    return hf.BertForSequenceClassification(hf.BertConfig(**ENCODER))


def _roberta() -> nn.Module:
    return hf.RobertaForSequenceClassification(hf.RobertaConfig(**ENCODER))


def _distilbert() -> nn.Module:
    return hf.DistilBertForSequenceClassification(
        hf.DistilBertConfig(vocab_size=60, dim=32, n_layers=2, n_heads=4, hidden_dim=64, num_labels=3)
    )


def _vit() -> nn.Module:
    return hf.ViTForImageClassification(hf.ViTConfig(**SIZES, image_size=16, patch_size=4, num_labels=3))


def _gpt2() -> nn.Module:
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(
            vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=1
        )
    )


def _llama() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER))


def _qwen3() -> nn.Module:
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**DECODER, head_dim=8))


def _mistral() -> nn.Module:
    return hf.MistralForCausalLM(hf.MistralConfig(**DECODER, sliding_window=6))


def _t5() -> nn.Module:
    config = hf.T5Config(
        vocab_size=60, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0,
        initializer_factor=0.3,
    )  # fmt: skip
    return hf.T5ForConditionalGeneration(config)


BUILDERS = {
    "bert": _bert, "roberta": _roberta, "distilbert": _distilbert, "vit": _vit, "gpt2": _gpt2,
    "llama": _llama, "qwen3": _qwen3, "mistral": _mistral, "t5": _t5,
}  # fmt: skip


def build(name: str, seed: int = 0) -> nn.Module:
    """A tiny model of that architecture in training mode."""
    torch.manual_seed(seed)
    return BUILDERS[name]().train()


def batch_for(name: str, rows: int = 4, seed: int = 1) -> dict[str, torch.Tensor]:
    """A batch with padding and labels."""
    random = torch.Generator().manual_seed(seed)
    if name == "vit":
        pixels = torch.randn(rows, 3, 16, 16, generator=random)
        return {"pixel_values": pixels, "labels": torch.arange(rows) % 3}
    ids = torch.randint(2, 60, (rows, 10), generator=random)
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    labels = torch.arange(rows) % 3 if name in {"bert", "roberta", "distilbert"} else ids
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def without_dropout(model: nn.Module) -> nn.Module:
    """The model with every dropout probability at zero."""
    for module in model.modules():
        for attribute in ("p", "dropout", "attention_dropout"):
            if isinstance(module.__dict__.get(attribute), float):
                setattr(module, attribute, 0.0)
    return model


def freeze_some(model: nn.Module, share: float = 0.5, seed: int = 2) -> list[str]:
    """Freeze a random share of the weights; biases stay active. The names that still train."""
    random = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        frozen = torch.rand((), generator=random).item() < share and parameter.dim() > 1
        parameter.requires_grad_(not frozen)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def gradients(model: nn.Module, batch: dict[str, torch.Tensor], seed: int = 3) -> tuple[torch.Tensor, dict]:
    """Loss and gradients of one step."""
    model.zero_grad()
    torch.manual_seed(seed)
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def relative_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Norm of the difference of all gradients over the norm of the expected ones."""
    assert found.keys() == expected.keys()
    difference = sum((found[n] - g).double().pow(2).sum() for n, g in expected.items())
    return float((difference / sum(g.double().pow(2).sum() for g in expected.values())).sqrt())
