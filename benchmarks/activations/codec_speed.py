"""Time of each codec beside a plain copy of the same tensor, in the same run.

    python benchmarks/activations/codec_speed.py --threads 1
    python benchmarks/activations/codec_speed.py --device cuda --tokens 262144

On a CPU a codec is compared with `clone`, which allocates its result as every codec does, and with `copy_` into memory
that is already there; on a GPU the bytes read and written per second with those of `copy_`. The least of the times counts:
what other processes cost only ever adds. Adds what `benchmarks/results/codec_speed.csv` (`--csv`) lacks.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Study, machine, markdown

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# About 6 ms at 1.7 GHz, for 20 calls of which the host takes up to 0.2 ms each.
_SLEEP_CYCLES, _CALLS = 10_000_000, 20
TASKS = ("copy", "clone", "encode", "decode")


def once(task: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of one call (CPU time of all its threads on a CPU); its result is freed before this returns.

    A kernel is over sooner than the host launches the next: on CUDA many are queued behind one that sleeps.
    """
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(_SLEEP_CYCLES)
        begin.record()
        for _ in range(_CALLS):
            task()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / _CALLS
    # CPU time of this process: other processes on the machine do not count.
    start = time.process_time()
    task()
    return time.process_time() - start


def codecs() -> dict[str, Any]:
    """Return every codec, the step derivatives for GELU."""
    from slimfit_ds.activations.codecs import codec_names, get_codec

    names = [name for name in codec_names() if name != "exact"]
    found = {n: get_codec(n) for n in names if not n.startswith("step")}
    found |= {f"{n} (gelu)": get_codec(n, activation="gelu") for n in names if n.startswith("step")}
    return dict(sorted(found.items()))


def measure(codec: Any, x: Tensor, repeats: int) -> dict[str, float]:
    """Return bytes per element and seconds of encoding and decoding `x` [tokens, hidden], in turns with copies."""
    target = torch.empty_like(x)
    kept = codec.encode(x)
    codec.decode(kept)
    calls = (partial(target.copy_, x), x.clone, partial(codec.encode, x), partial(codec.decode, kept))
    times = [[once(call, x.device) for call in calls] for _ in range(repeats)]
    least = {
        f"{name}_seconds": min(column) for name, column in zip(TASKS, zip(*times, strict=True), strict=True)
    }
    return {"bytes_per_element": kept.nbytes / x.numel(), **least}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    lines = []
    for row in rows:
        copy, clone, encode, decode = (row[f"{name}_seconds"] for name in TASKS)
        cells = [encode / clone, decode / clone, encode / copy, decode / copy]
        size = {"float32": 4, "bfloat16": 2}[row["dtype"]]
        moved = row["tokens"] * row["hidden"] * (size + row["bytes_per_element"]) / 1e9
        rates = [moved / encode, moved / decode] if row["device"] == "cuda" else ["", ""]
        rates = [rate and f"{rate:.0f}" for rate in rates]
        kept = f"{row['bytes_per_element']:.3f}"
        lines.append([row["codec"], row["dtype"], kept, *(f"{cell:.1f}" for cell in cells), *rates])
    titles = ["codec", "dtype", "bytes/element", "encode / clone", "decode / clone", "encode / copy_"]
    return markdown([*titles, "decode / copy_", "encode, GB/s", "decode, GB/s"], lines, left=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--tokens", type=int, default=16 * 384)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", default="codec_speed", help="name of a study, or a path that ends in .csv")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    study = Study(args.csv, ("codec", "dtype", "device"))
    settings = {key: getattr(args, key) for key in ("device", "tokens", "hidden", "threads", "seed")}
    generator = torch.Generator().manual_seed(args.seed)
    data = torch.randn(args.tokens, args.hidden, generator=generator).to(args.device)
    for dtype in DTYPES:
        for name, codec in codecs().items():
            row = {"codec": name, "dtype": dtype, "device": args.device}
            if not study.has(row):
                found = measure(codec, data.to(DTYPES[dtype]), args.repeats)
                study.add(row | found | settings | machine(args.device))
    print(table(study.rows(device=args.device)))


if __name__ == "__main__":
    main()
