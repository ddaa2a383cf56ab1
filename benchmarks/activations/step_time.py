"""Time of forward and backward pass with each preset, as a ratio to plain PyTorch with the same weights frozen.

    OMP_NUM_THREADS=1 python benchmarks/activations/step_time.py --models bert llama --steps 7
    python benchmarks/activations/step_time.py --device cuda --dtype bf16 --models bert-768 --rows 128 --tokens 384

95 % of the weights are frozen at random. The methods take turns; the ratio is the median over rounds, of CPU seconds on a
CPU. `full` is plain PyTorch with everything trainable; `torch` is torch.utils.checkpoint on each block. Adds what
`benchmarks/results/step_time.csv` (`--csv`) lacks.
"""

from __future__ import annotations

import argparse
import functools
import random
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Study, in_turns, machine, markdown

METHODS = ("exact", "full", "torch", "paper", "balanced", "minimal", "ultra")


def bert(hidden: int = 256, layers: int = 4) -> nn.Module:
    """Heads of 64, a feed-forward part of 4 h."""
    import transformers as hf

    sizes: dict[str, Any] = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": 4 * hidden,
    }
    config = hf.BertConfig(**sizes, num_attention_heads=hidden // 64, vocab_size=1000)
    return hf.BertForSequenceClassification(config)


def llama() -> nn.Module:
    """4 layers, h 256."""
    import transformers as hf

    sizes: dict[str, Any] = {
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "intermediate_size": 896,
        "vocab_size": 1000,
    }
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, **heads, use_cache=False))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": bert,
    "llama": llama,
    # The width of BERT-base: matrix products cost h^2, codecs h.
    "bert-768": functools.partial(bert, 768, 3),
}


def step_of(name: str, method: str, options: argparse.Namespace) -> Callable[[], None]:
    """Return a function that runs one forward and backward pass."""
    from slimfit_ds.activations.apply import compress
    from slimfit_ds.activations.config import ActivationsConfig

    torch.manual_seed(0)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
    model = MODELS[name]().to(options.device, dtype).train()
    if method != "full":
        weights = [p for path, p in model.named_parameters() if path.endswith("weight")]
        for weight in random.Random(0).sample(weights, int(options.rate * len(weights))):
            weight.requires_grad_(False)
    if method == "torch":
        model._set_gradient_checkpointing(True, functools.partial(checkpoint, use_reentrant=False))  # type: ignore[operator]
    elif method != "full":
        compress(model, ActivationsConfig(preset=method))
    ids = torch.randint(1, 1000, (options.rows, options.tokens), device=options.device)
    labels = ids if name == "llama" else torch.zeros(options.rows, dtype=torch.long, device=options.device)

    def step() -> None:
        model.zero_grad()
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.backward()

    return step


def tables(csv: str = "step_time") -> dict[str, str]:
    """Return the table of the documents by its mark."""
    rows, lines = Study(csv, ()).rows(), []
    for model in dict.fromkeys(row["model"] for row in rows):
        ratios = {row["method"]: row for row in rows if row["model"] == model}
        cells = [f"{ratios[m]['seconds_of_plain']:.2f}" if m in ratios else "" for m in METHODS[1:]]
        lines.append([model, f"{ratios['exact']['plain_seconds']:.2f} s", *cells])
    return {"activations-time": markdown(["model", "plain", *METHODS[1:]], lines)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--rate", type=float, default=0.95)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each method")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--csv", default="step_time", help="name of a study, or a path that ends in .csv")
    options = parser.parse_args()
    study = Study(options.csv, ("model", "method", "device"))
    synchronize = torch.cuda.synchronize if options.device == "cuda" else lambda: None
    clock = "seconds" if options.device == "cuda" else "cpu_seconds"
    for model in options.models:
        if study.has({"model": model, "method": "exact", "device": options.device}):
            continue
        steps = {method: step_of(model, method, options) for method in METHODS}
        times = in_turns(steps, options.steps, warm_up=1, synchronize=synchronize)
        plain = times["exact"][clock]
        for method in METHODS:
            ratios = [a / b for a, b in zip(times[method][clock], plain, strict=True)]
            row = {"model": model, "method": method, "seconds_of_plain": statistics.median(ratios)}
            row |= {"plain_seconds": statistics.median(plain), "clock": clock, "rounds": options.steps}
            row |= {key: getattr(options, key) for key in ("rate", "rows", "tokens", "dtype", "device")}
            study.add(row | {"seed": 0, "threads": torch.get_num_threads()} | machine(options.device))
    print(tables(options.csv)["activations-time"])


if __name__ == "__main__":
    main()
