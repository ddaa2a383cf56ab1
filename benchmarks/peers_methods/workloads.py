"""What is trained: published shapes for a GPU, small ones of the same families for a CPU, and synthetic batches."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from slimfit_ds.planner.workload import Workload

__all__ = ["CASES", "Case", "cases_for", "make_batches"]

_GPT2_MEDIUM = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "n_embd": 1024,
    "n_layer": 24,
    "n_head": 16,
}
_SMALL = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
_WORDS = {"vocab_size": 4096}


@dataclass(frozen=True)
class Case:
    """One model with its batch.

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
    def unit(self) -> str:
        """What throughput counts."""
        return "images" if self.task == "image_classification" else "tokens"

    @property
    def task(self) -> str:
        """The task, as `TASKS` names it."""
        return self.workload.resolved_task(self.workload.config())

    def per_step(self, batch: int) -> int:
        """Tokens or images of a step."""
        return batch if self.unit == "images" else batch * self.workload.seq

    def with_batch(self, batch: int) -> Case:
        """The same with another batch size."""
        return replace(self, workload=replace(self.workload, batch=batch))


def _small(name: str, label: str, workload: Workload) -> Case:
    return Case(name, label, "cpu", workload, chunk=(256, 256))


_ALL = (
    Case(
        "bert-base",
        "BERT-base QA, b128 s384",
        "cuda",
        Workload("bert-base-uncased", 128, 384, "question_answering"),
    ),
    Case(
        "vit-384",
        "ViT-B/16-384, b128",
        "cuda",
        Workload("google/vit-base-patch16-384", 128, labels=1000),
    ),
    Case("llama-8b", "Llama-3-8B shape, b1 s2048", "cuda", Workload("meta-llama/Meta-Llama-3-8B", 1, 2048)),
    Case("qwen-0.6b", "Qwen3-0.6B shape, b8 s2048", "cuda", Workload("Qwen/Qwen3-0.6B", 8, 2048)),
    Case("gpt2-medium", "GPT-2 medium, b8 s1024", "cuda", Workload(_GPT2_MEDIUM, 8, 1024)),
    Case("qwen-1.7b", "Qwen3-1.7B shape, b8 s2048", "cuda", Workload("Qwen/Qwen3-1.7B", 8, 2048)),
    Case(
        "llama-8b-b8", "Llama-3-8B shape, b8 s2048", "cuda", Workload("meta-llama/Meta-Llama-3-8B", 8, 2048)
    ),
    # The small ones: 4 blocks of 256, about 1000 tokens per step; a quarter of BERT's weights are embeddings, near the
    # 22 % of the full size.
    _small(
        "bert-small",
        "BERT QA 4 x h256, b8 s128",
        Workload(
            {"model_type": "bert", **_SMALL, "intermediate_size": 1024, **_WORDS},
            8,
            128,
            "question_answering",
        ),
    ),
    _small(
        "vit-small",
        "ViT 4 x h256, 128 px, b16",
        Workload(
            {"model_type": "vit", **_SMALL, "intermediate_size": 1024, "image_size": 128}, 16, labels=100
        ),
    ),
    _small(
        "gpt2-small",
        "GPT-2 4 x h256, b8 s128",
        Workload(
            {"model_type": "gpt2", "n_embd": 256, "n_layer": 4, "n_head": 4, "n_positions": 256, **_WORDS},
            8,
            128,
            "causal_lm",
        ),
    ),
    _small(
        "qwen-small",
        "Qwen3 4 x h256, b8 s128",
        Workload(
            {
                "model_type": "qwen3",
                **_SMALL,
                "num_key_value_heads": 2,
                "head_dim": 64,
                "intermediate_size": 768,
                "tie_word_embeddings": True,
                **_WORDS,
            },
            8,
            128,
            "causal_lm",
        ),
    ),
    _small(
        "llama-small",
        "Llama 4 x h256, b8 s128",
        Workload(
            {
                "model_type": "llama",
                **_SMALL,
                "num_key_value_heads": 2,
                "intermediate_size": 896,
                **_WORDS,
            },
            8,
            128,
            "causal_lm",
        ),
    ),
    Case(
        "bert-base-b8",
        "BERT-base QA, b8 s128",
        "cpu",
        Workload("bert-base-uncased", 8, 128, "question_answering"),
        chunk=(256, 256),
    ),
    # The width of BERT-base and its share of embeddings, a third of its depth: for profiles.
    Case(
        "bert-768",
        "BERT 4 x h768, b8 s128",
        "profile",
        Workload(
            {"model_type": "bert", "num_hidden_layers": 4, "vocab_size": 10000},
            8,
            128,
            "question_answering",
        ),
    ),
    # For tests: seconds on any machine.
    Case(
        "tiny",
        "BERT 2 x h64, b4 s16",
        "test",
        Workload(
            {
                "model_type": "bert",
                "hidden_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 128,
                "vocab_size": 128,
            },
            4,
            16,
            "question_answering",
        ),
    ),
)
CASES: dict[str, Case] = {case.name: case for case in _ALL}


def cases_for(device: str) -> list[str]:
    """Names of the cases of a device, the most telling first."""
    return [case.name for case in _ALL if case.device == device]


def make_batches(
    case: Case, batch: int, device: torch.device, count: int = 4, seed: int = 0
) -> list[dict[str, torch.Tensor]]:
    """Random batches, the same for every method.

    Returns:
        `count` batches: `input_ids` `[batch, seq]` or `pixel_values` `[batch, channels, height, width]`, and labels.
    """
    generator = torch.Generator().manual_seed(seed)
    config = case.workload.config()
    seq = case.workload.seq

    def integers(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=generator)

    batches = []
    for _ in range(count):
        if case.task == "image_classification":
            size = config.image_size
            pixels = torch.rand(batch, config.num_channels, size, size, generator=generator)
            inputs = {"pixel_values": pixels, "labels": integers(case.workload.labels, batch)}
        else:
            inputs = {"input_ids": integers(config.vocab_size, batch, seq)}
            if case.task == "causal_lm":
                inputs["labels"] = inputs["input_ids"].clone()
            else:
                inputs |= {"start_positions": integers(seq, batch), "end_positions": integers(seq, batch)}
        batches.append({key: value.to(device) for key, value in inputs.items()})
    return batches
