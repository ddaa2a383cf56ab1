"""What is trained: published shapes for a GPU, small ones of the same families for a CPU, and random batches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from slimfit_ds.planner.workload import Workload

__all__ = ["SHAPES", "Shape", "make_batches", "shapes_for"]


@dataclass(frozen=True)
class Shape:
    """A model with its batch.

    Args:
        name: key on the command line.
        label: what tables call it.
        device: `cuda` or `cpu`, where it belongs by default.
        workload: model, batch and sequence length; the dtype is the method's choice.
        chunk: tokens at a time where a method works in chunks: of the recomputation, and of a language model's loss.
    """

    name: str
    label: str
    device: str
    workload: Workload
    chunk: tuple[int, int] = (4096, 1024)

    @property
    def task(self) -> str:
        """The task, as `Workload` names it."""
        return self.workload.resolved_task(self.workload.config())

    @property
    def unit(self) -> str:
        """What throughput counts."""
        return "images" if self.task == "image_classification" else "tokens"

    @property
    def per_step(self) -> int:
        """Tokens or images of a step."""
        return self.workload.batch * (1 if self.unit == "images" else self.workload.seq)

    def with_(self, **changes: Any) -> Shape:
        """Return a copy with other fields of the workload."""
        return replace(self, workload=replace(self.workload, **changes))


_SMALL = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
_DECODER = {**_SMALL, "num_key_value_heads": 2, "vocab_size": 4096}
_GPT2_MEDIUM = {"n_embd": 1024, "n_layer": 24, "n_head": 16, "architectures": ["GPT2LMHeadModel"]}
_GPT2_SMALL = {"n_embd": 256, "n_layer": 4, "n_head": 4, "n_positions": 256, "vocab_size": 4096}
_QWEN = {**_DECODER, "head_dim": 64, "intermediate_size": 768, "tie_word_embeddings": True}
_TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 128,
}
_QA = "question_answering"


def _gpu(name: str, label: str, *workload: Any, **options: Any) -> Shape:
    return Shape(name, label, "cuda", Workload(*workload, **options))


def _cpu(name: str, label: str, *workload: Any, **options: Any) -> Shape:
    return Shape(name, label, "cpu", Workload(*workload, **options), (256, 256))


_ALL = (
    _gpu("bert-base", "BERT-base QA, b128 s384", "bert-base-uncased", 128, 384, _QA),
    _gpu("vit-384", "ViT-B/16-384, b128", "google/vit-base-patch16-384", 128, labels=1000),
    _gpu("llama-8b", "Llama-3-8B shape, b1 s2048", "meta-llama/Meta-Llama-3-8B", 1, 2048),
    _gpu("qwen-0.6b", "Qwen3-0.6B shape, b8 s2048", "Qwen/Qwen3-0.6B", 8, 2048),
    _gpu("gpt2-medium", "GPT-2 medium, b8 s1024", {"model_type": "gpt2", **_GPT2_MEDIUM}, 8, 1024),
    _gpu("qwen-1.7b", "Qwen3-1.7B shape, b8 s2048", "Qwen/Qwen3-1.7B", 8, 2048),
    _gpu("llama-8b-b8", "Llama-3-8B shape, b8 s2048", "meta-llama/Meta-Llama-3-8B", 8, 2048),
    # The small ones: 4 blocks of 256, about 1000 tokens per step; a quarter of BERT's weights are embeddings, near the
    # 22 % of the full size.
    _cpu(
        "bert-small",
        "BERT QA 4 x h256, b8 s128",
        {"model_type": "bert", **_SMALL, "intermediate_size": 1024, "vocab_size": 4096},
        8,
        128,
        _QA,
    ),
    _cpu(
        "vit-small",
        "ViT 4 x h256, 128 px, b16",
        {"model_type": "vit", **_SMALL, "intermediate_size": 1024, "image_size": 128},
        16,
        labels=100,
    ),
    _cpu("gpt2-small", "GPT-2 4 x h256, b8 s128", {"model_type": "gpt2", **_GPT2_SMALL}, 8, 128, "causal_lm"),
    _cpu("qwen-small", "Qwen3 4 x h256, b8 s128", {"model_type": "qwen3", **_QWEN}, 8, 128, "causal_lm"),
    _cpu(
        "llama-small",
        "Llama 4 x h256, b8 s128",
        {"model_type": "llama", **_DECODER, "intermediate_size": 896},
        8,
        128,
        "causal_lm",
    ),
    _cpu("bert-base-b8", "BERT-base QA, b8 s128", "bert-base-uncased", 8, 128, _QA),
    # For tests: seconds on any machine.
    Shape("tiny", "BERT 2 x h64, b4 s16", "test", Workload({"model_type": "bert", **_TINY}, 4, 16, _QA)),
)
SHAPES: dict[str, Shape] = {shape.name: shape for shape in _ALL}


def shapes_for(device: str) -> list[str]:
    """Return the names of the shapes of a device, the most telling first."""
    return [shape.name for shape in _ALL if shape.device == device]


def make_batches(
    shape: Shape, device: torch.device | str = "cpu", count: int = 4, seed: int = 0
) -> list[dict[str, torch.Tensor]]:
    """Return random batches: `input_ids` [batch, seq] or `pixel_values` [batch, channels, height, width], and labels."""
    generator = torch.Generator().manual_seed(seed)
    config, batch, seq = shape.workload.config(), shape.workload.batch, shape.workload.seq

    def integers(high: int, *size: int) -> torch.Tensor:
        return torch.randint(high, size, generator=generator)

    batches = []
    for _ in range(count):
        if shape.task == "image_classification":
            size = config.image_size
            pixels = torch.rand(batch, config.num_channels, size, size, generator=generator)
            inputs = {"pixel_values": pixels, "labels": integers(shape.workload.labels, batch)}
        else:
            inputs = {"input_ids": integers(config.vocab_size, batch, seq)}
            if shape.task == "causal_lm":
                inputs["labels"] = inputs["input_ids"].clone()
            else:
                inputs |= {"start_positions": integers(seq, batch), "end_positions": integers(seq, batch)}
        batches.append({key: value.to(device) for key, value in inputs.items()})
    return batches
