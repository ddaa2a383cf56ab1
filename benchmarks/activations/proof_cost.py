"""What the proof on the first batch costs: CPU time in steps, and the run's peak with it against that without it.

    OMP_NUM_THREADS=1 python benchmarks/activations/proof_cost.py
    python benchmarks/activations/proof_cost.py --models llama --presets minimal --rows 4 --tokens 256

The recommended setting (a tenth of every layer trains) with AdamW, fp32, random weights, seed 0. `steps`: CPU seconds that the
first step takes longer with the proof than without it, over the median of later steps. `peak_ratio`: bytes of the largest moment
of two steps (every storage tracked, on a run of its own) with the proof over without it. Adds what
`benchmarks/results/proof_cost.csv` (`--csv`) lacks.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Study, machine, markdown


def build(name: str, options: argparse.Namespace) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a model and its batch of `rows` x `tokens` (ViT: as many patches)."""
    import transformers as hf

    torch.manual_seed(0)
    wide = 4 * options.hidden
    sizes = {"hidden_size": options.hidden, "num_attention_heads": 4, "num_hidden_layers": options.layers}
    labels = torch.arange(options.rows) % 2
    if name == "vit":
        side = 4 * round((options.tokens - 1) ** 0.5)
        config = hf.ViTConfig(**sizes, intermediate_size=wide, image_size=side, patch_size=4)
        config.num_labels = 2
        batch = {"pixel_values": torch.randn(options.rows, 3, side, side), "labels": labels}
        return hf.ViTForImageClassification(config).train(), batch
    ids = torch.randint(1, 1000, (options.rows, options.tokens))
    if name == "bert":
        bert = hf.BertConfig(**sizes, intermediate_size=wide, vocab_size=1000)
        return hf.BertForSequenceClassification(bert).train(), {"input_ids": ids, "labels": labels}
    llama = hf.LlamaConfig(
        **sizes, intermediate_size=wide, num_key_value_heads=2, vocab_size=1000, use_cache=False
    )
    return hf.LlamaForCausalLM(llama).train(), {"input_ids": ids, "labels": ids}


def run(
    name: str, preset: str, proof: bool, steps: int, track: bool, options: argparse.Namespace
) -> dict[str, Any]:
    """Train some steps; return CPU seconds of each, the tracked peak in bytes, and what the proof found."""
    import slimfit_ds
    from slimfit_ds.memory.tracker import MemoryTracker, optimizer_tensors

    model, batch = build(name, options)
    handle = slimfit_ds.slim(model, {"activations": {"preset": preset, "proof": proof}})
    optimizer = torch.optim.AdamW(handle.trainable.values(), lr=1e-3)
    handle.follow(optimizer)
    tracker = MemoryTracker(model, {"optimizer": lambda: optimizer_tensors(optimizer)}) if track else None
    phase: Callable[[str], AbstractContextManager] = (
        tracker.phase if tracker is not None else lambda _: nullcontext()
    )
    seconds = []
    with tracker or nullcontext():
        for _ in range(steps):
            start = time.process_time()
            loss = model(**batch).loss
            loss.backward()
            del loss
            with phase("step"):
                optimizer.step()
                optimizer.zero_grad()
            seconds.append(time.process_time() - start)
    peak = None if tracker is None else tracker.report().peak
    return {"seconds": seconds, "peak": peak, "failures": len(handle.proof.failures) if handle.proof else 0}


def tables(csv: str = "proof_cost") -> dict[str, str]:
    """Return the table of the documents by its mark."""
    lines = [
        [
            f"{r['model']}, {r['rows']} x {r['tokens']}",
            r["preset"],
            f"{r['steps']:.1f}",
            f"{100 * (r['peak_ratio'] - 1):+.1f} %",
        ]
        for r in Study(csv, ()).rows()
    ]
    return {
        "proof-cost": markdown(["model, width, batch x tokens", "preset", "time in steps", "peak"], lines)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--models", nargs="*", default=["bert", "vit", "llama"], choices=["bert", "vit", "llama"]
    )
    parser.add_argument("--presets", nargs="*", default=["exact", "balanced", "minimal"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3, help="later steps that are timed")
    parser.add_argument("--csv", default="proof_cost", help="name of a study, or a path that ends in .csv")
    options = parser.parse_args()
    study = Study(options.csv, ("model", "preset", "hidden", "rows", "tokens"))
    for model in options.models:
        for preset in options.presets:
            row: dict[str, Any] = {
                "model": model,
                "preset": preset,
                "rows": options.rows,
                "tokens": options.tokens,
            }
            if study.has(row):
                continue
            run(model, preset, False, 1, False, options)
            with_, without = (
                run(model, preset, proof, 1 + options.steps, False, options) for proof in (True, False)
            )
            step = statistics.median([*with_["seconds"][1:], *without["seconds"][1:]])
            peaks = [run(model, preset, proof, 2, True, options)["peak"] for proof in (True, False)]
            row |= {
                "steps": (with_["seconds"][0] - without["seconds"][0]) / step,
                "peak_ratio": peaks[0] / peaks[1],
            }
            row |= {
                "step_seconds": step,
                "peak": peaks[1],
                "failures": with_["failures"],
                "layers": options.layers,
            }
            study.add(row | {"seed": 0, "threads": torch.get_num_threads()} | machine("cpu"))
    print(tables(options.csv)["proof-cost"])


if __name__ == "__main__":
    main()
