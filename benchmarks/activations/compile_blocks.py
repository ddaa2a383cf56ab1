"""What `activations.compile` does: graphs made while the active set changes, time of a step, bytes kept, gradients.

    OMP_NUM_THREADS=1 python benchmarks/activations/compile_blocks.py
    OMP_NUM_THREADS=1 python benchmarks/activations/compile_blocks.py --dtype fp32 --models llama --presets minimal

Each case trains two copies of a model in turns, step by step: plain, and with blocks at rest compiled. Active sets are
drawn at random (95 % frozen), the same for both. Reported: graphs made in all, and of these after the first half of
the steps; seconds of the step that compiled most; median CPU seconds of the steps in the second half; bytes saved for
backward while every block is at rest; and the relative difference of all gradients then, with dropout off.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time

import torch
import transformers as hf
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._dynamo.utils import counters

import slimfit_ds

VOCABULARY = 1000


def bert(layers: int, dropout: float) -> nn.Module:
    config = hf.BertConfig(
        num_hidden_layers=layers,
        vocab_size=VOCABULARY,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=0.0,
    )
    return hf.BertForSequenceClassification(config)


def llama(layers: int, dropout: float) -> nn.Module:
    config = hf.LlamaConfig(
        num_hidden_layers=layers,
        vocab_size=VOCABULARY,
        hidden_size=768,
        intermediate_size=2048,
        num_attention_heads=12,
        num_key_value_heads=4,
        attention_dropout=0.0,
    )
    return hf.LlamaForCausalLM(config)


MODELS = {"bert": bert, "llama": llama}
"""Name -> builder; hidden size 768."""


class Trainer:
    """A model under `slim`, stepped by fused AdamW."""

    def __init__(self, name: str, preset: str, dropout: float, compiled: bool, options: argparse.Namespace):
        torch.manual_seed(0)
        self.model = MODELS[name](options.layers, dropout).train()
        self.autocast = options.dtype == "bf16"
        config = {
            "freeze": {"policy": "random", "rate": 0.95},
            "activations": {"preset": preset, "compile": compiled},
        }
        self.handle = slimfit_ds.slim(self.model, config)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=5e-5, fused=True)
        self.handle.follow(self.optimizer)
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(1, VOCABULARY, (options.rows, options.tokens), generator=generator)
        self.batch = {"input_ids": ids, "labels": ids if name == "llama" else ids[:, 0] % 2}

    def loss(self) -> Tensor:
        context = torch.autocast("cpu", torch.bfloat16) if self.autocast else contextlib.nullcontext()
        with context:
            return self.model(**self.batch).loss

    def step(self) -> float:
        start = time.process_time()
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()
        return time.process_time() - start

    def rest(self) -> None:
        """Freeze every weight but the last: that of the head, outside of the blocks."""
        self.optimizer.zero_grad()
        weights = [self.model.get_parameter(name) for name in self.handle.schedule.names]
        for weight in weights:
            weight.requires_grad_(weight is weights[-1])

    def at_rest(self) -> tuple[int, dict[str, Tensor]]:
        """Bytes saved for backward, and the gradients."""
        self.rest()
        torch.manual_seed(2)
        # Module hooks, as the package's own counters use, would be compiled along.
        kept: dict[int, int] = {}
        weights = {p.untyped_storage().data_ptr() for p in self.model.parameters()}

        def count(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = self.loss()
        loss.backward()
        return sum(kept.values()), {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    total = sum((found[n] - g).double().square().sum() for n, g in expected.items())
    return float((total / sum(g.double().square().sum() for g in expected.values())) ** 0.5)


def run(name: str, preset: str, dropout: float, options: argparse.Namespace) -> list[str]:
    torch._dynamo.reset()
    counters.clear()
    trainers = [Trainer(name, preset, dropout, compiled, options) for compiled in (False, True)]
    times: list[list[float]] = [[], []]
    graphs = []
    for _ in range(options.steps):
        for trainer, taken in zip(trainers, times, strict=True):
            taken.append(trainer.step())
        graphs.append(counters["stats"]["unique_graphs"])
    half = options.steps // 2
    plain, compiled = (statistics.median(taken[half:]) for taken in times)
    # The same weights for both: steps with compiled random numbers have led elsewhere.
    trainers[1].model.load_state_dict(trainers[0].model.state_dict())
    (kept, expected), (kept_compiled, found) = (trainer.at_rest() for trainer in trainers)
    return [
        f"{name}, {preset}" + (f", dropout {dropout}" if dropout else ""),
        f"{graphs[-1]} ({graphs[-1] - graphs[half - 1]})",
        f"{max(times[1]):.1f}",
        f"{plain:.3f}",
        f"{compiled:.3f}",
        f"{statistics.median(b / a for a, b in zip(times[0][half:], times[1][half:], strict=True)):.3f}",
        f"{kept / 2**20:.1f}",
        f"{kept_compiled / 2**20:.1f}",
        "" if dropout else f"{difference(found, expected):.1e}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument(
        "--presets", nargs="*", default=["exact", "minimal"], choices=["exact", "minimal", "ultra"]
    )
    parser.add_argument(
        "--dropout", type=float, nargs="*", default=[0.0, 0.1], help="of BERT's hidden states"
    )
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16", help="bf16: autocast")
    options = parser.parse_args()
    table = Table(title=f"{options.layers} x h768, {options.rows} x {options.tokens}, {options.dtype}")
    for column in (
        "case",
        "graphs (second half)",
        "slowest step, s",
        "plain, s",
        "compiled, s",
        "ratio",
        "kept, MiB",
        "kept compiled, MiB",
        "gradients differ by",
    ):
        table.add_column(column, justify="left" if column == "case" else "right")
    for name in options.models:
        for preset in options.presets:
            for dropout in options.dropout if name == "bert" else [0.0]:
                table.add_row(*run(name, preset, dropout, options))
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
