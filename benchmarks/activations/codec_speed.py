"""Time of each codec beside a plain copy of the same tensor, in the same run.

    python benchmarks/activations/codec_speed.py --threads 1
    python benchmarks/activations/codec_speed.py --device cuda --tokens 262144

On a CPU a codec is compared with `clone`, which allocates its result as every codec does, and with `copy_` into
memory that is already there. On a GPU the bytes read and written per second are compared with those of `copy_`.
Writes `codec_speed_<device>.json` and `.md`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimfit_ds.activations.codecs import Codec, codec_names, get_codec
from slimfit_ds.training.surroundings import hardware, versions

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def once(task: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call (CPU time of all its threads on a CPU); its result is freed before this returns."""
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        task()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    # CPU time of this process: other processes on the machine do not count.
    start = time.process_time()
    task()
    return time.process_time() - start


def seconds(tasks: dict[str, Callable[[], Any]], device: torch.device, repeats: int) -> dict[str, float]:
    """The least time of each task, taken in turns: what other processes cost only ever adds."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(repeats):
        for name, task in tasks.items():
            times[name].append(once(task, device))
    return {name: min(taken) for name, taken in times.items()}


def codecs() -> dict[str, Codec]:
    """Every codec, the step derivatives for GELU."""
    found = {n: get_codec(n) for n in codec_names() if not n.startswith("step")}
    found |= {f"{n} (gelu)": get_codec(n, activation="gelu") for n in ("step5", "step4", "step2", "step1")}
    found["int8 stochastic"] = get_codec("int8", rounding="stochastic")
    found["int2 nearest"] = get_codec("int2", rounding="nearest")
    return dict(sorted(found.items()))


def measure(x: Tensor, repeats: int) -> list[dict[str, Any]]:
    """One row for each codec.

    Args:
        x: [tokens, hidden], the tensor that is encoded and decoded.
        repeats: timed calls, of which the fastest counts.
    """
    device, target = x.device, torch.empty_like(x)
    rows = []
    for name, codec in codecs().items():
        if name == "exact":
            continue
        data = x > 0 if name == "mask" else x
        kept = codec.encode(data)
        codec.decode(kept)
        tasks: dict[str, Callable[[], Any]] = {
            "copy": partial(target.copy_, x),
            "clone": x.clone,
            "encode": partial(codec.encode, data),
            "decode": partial(codec.decode, kept),
        }
        time_of = seconds(tasks, device, repeats)
        moved = data.numel() * data.element_size() + kept.nbytes
        rows.append(
            {
                "codec": name,
                "dtype": str(x.dtype).removeprefix("torch."),
                "bytes_per_element": kept.nbytes / x.numel(),
                **{f"{way}_seconds": time_of[way] for way in tasks},
                **{
                    f"{way}_to_{base}": time_of[way] / time_of[base]
                    for way in ("encode", "decode")
                    for base in ("clone", "copy")
                },
                "encode_gb_per_s": moved / time_of["encode"] / 1e9,
                "decode_gb_per_s": moved / time_of["decode"] / 1e9,
                "copy_gb_per_s": 2 * x.numel() * x.element_size() / time_of["copy"] / 1e9,
            }
        )
    return rows


def table(rows: list[dict[str, Any]], device: torch.device) -> str:
    """The rows as Markdown."""
    if device.type == "cuda":
        head = "| codec | dtype | bytes/element | encode GB/s (share of copy) | decode GB/s (share of copy) |"
        cells = [
            f"| {r['codec']} | {r['dtype']} | {r['bytes_per_element']:.3f} "
            + "".join(
                f"| {r[f'{way}_gb_per_s']:.0f} ({r[f'{way}_gb_per_s'] / r['copy_gb_per_s']:.2f}) "
                for way in ("encode", "decode")
            )
            + "|"
            for r in rows
        ]
    else:
        head = "| codec | dtype | bytes/element | encode / clone | decode / clone | encode / copy_ | decode / copy_ |"
        cells = [
            f"| {r['codec']} | {r['dtype']} | {r['bytes_per_element']:.3f} | {r['encode_to_clone']:.1f} "
            f"| {r['decode_to_clone']:.1f} | {r['encode_to_copy']:.1f} | {r['decode_to_copy']:.1f} |"
            for r in rows
        ]
    return "\n".join([head, "|---|---" + "|---:" * (head.count("|") - 3) + "|", *cells])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--tokens", type=int, default=16 * 384)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    generator = torch.Generator().manual_seed(args.seed)
    data = torch.randn(args.tokens, args.hidden, generator=generator).to(device)
    rows = [row for dtype in DTYPES.values() for row in measure(data.to(dtype), args.repeats)]
    report = {
        "command": shlex.join(["python", *sys.argv]),
        "seed": args.seed,
        "shape": list(data.shape),
        "hardware": hardware(device),
        "versions": versions(),
        "rows": rows,
    }
    place = report["hardware"].get("gpu") or f"{report['hardware']['cpu']}, {args.threads} thread(s)"
    clock = "" if device.type == "cuda" else "CPU time, "
    text = (
        f"Tensor {tuple(data.shape)}, N(0, 1), seed {args.seed}, on {place}, torch {torch.__version__}; "
        f"{clock}fastest of {args.repeats} calls in turns. `{report['command']}`\n\n{table(rows, device)}\n"
    )
    args.output.mkdir(parents=True, exist_ok=True)
    target = args.output / f"codec_speed_{device.type}"
    target.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    target.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
