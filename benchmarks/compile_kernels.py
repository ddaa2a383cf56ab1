"""Compile, without a GPU, every kernel variant that training steps with the presets launch; count registers and spills.

    python benchmarks/compile_kernels.py                          # sm_80 and sm_90, all presets; the exit code is 1 if one fails
    python benchmarks/compile_kernels.py --targets 90 --csv benchmarks/results/kernels.csv

The list is made by recording: models of real widths on the device `meta` train a step, and `JITFunction.run` notes what is
launched, with the specialisation that a GPU would see. `ptxas` and the disassembler are in Triton's wheel. `TRITON_CACHE_DIR`
keeps what is compiled.

`share` is a static bound, no measurement: time to move the bytes of all tensors that a launch touches once at 4.8 TB/s (H200), over
the larger of that and the time to issue its instructions (132 SMs of 4 schedulers at 1.755 GHz, one instruction of a warp per
clock, integers and comparisons at half rate). Instructions are counted once, so a loop is counted as one round; of the two paths
of `_adam_kernel` the longer one.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

PRESETS = ("paper", "balanced", "minimal", "ultra")
SMS, CLOCK, BANDWIDTH = 132, 1.755e9, 4.8e12
MAX_REGISTERS = 200

_HALF_RATE = (
    "IADD3|LOP3|SHF|LEA|ISETP|IMNMX|VIMNMX|PRMT|SEL|LOP|IABS|VIADD|PLOP3|P2R|R2P|BMSK|SGXT|FLO|FSETP|FSEL|FMNMX|FCHK|I2FP|F2FP|"
    "VIADDMNMX|VABSDIFF|IADD|FMNMX3"
)


class Launches:
    """Kernel launches, one of each specialisation, in place of `JITFunction.run`."""

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.compiler.compiler import make_backend

        self.found: dict[tuple, dict[str, Any]] = {}
        self.label = ""
        self._backend = make_backend(GPUTarget("cuda", 90, 32))
        self._binders: dict[Any, Any] = {}

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """Record instead of launching, and take `meta` for a device whose operations have kernels."""
        from triton.runtime.jit import JITFunction

        from slimfit_ds.activations import replay
        from slimfit_ds.activations.codecs import backend
        from slimfit_ds.activations.ops import activation, triton_activation
        from slimfit_ds.engine import shard_update

        def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            self.add(kernel, args, kwargs, grid)

        def on_device(x: Any) -> bool:
            return x.is_meta and x.dtype in backend._KERNEL_DTYPES

        # Nothing is computed, so no form of a function can be found by its values: all of them may be met.
        forms = [
            (lambda _, name, x, k=k: triton_activation.FORMS[name][k % len(triton_activation.FORMS[name])])
            for k in range(2)
        ]
        with contextlib.ExitStack() as stack:
            for owner, name, value in (
                (JITFunction, "run", run),
                (backend, "runs_in_triton", on_device),
                (shard_update, "runs_in_triton", on_device),
                (backend, "_is_fake", lambda x: not x.is_meta and False),
                (
                    activation,
                    "_form_of",
                    lambda f, n, x: forms[self.form](f, n, x) if x.dtype.itemsize == 2 else None,
                ),
                (torch.Tensor, "pin_memory", lambda x: x),
                (replay, "take_counters", lambda device, count: (123456789012345, 0)),
                (torch, "is_autocast_enabled", lambda *device: False),  # `meta` has none
            ):
                stack.enter_context(mock.patch.object(owner, name, value))
            yield

    form = 0

    def add(self, kernel: Any, args: tuple, kwargs: dict[str, Any], grid: Any) -> None:
        from triton.runtime.jit import create_function_from_signature

        if kernel not in self._binders:
            self._binders[kernel] = create_function_from_signature(
                kernel.signature, kernel.params, self._backend
            )
        kwargs = {**kwargs, "debug": False}
        bound, specialisation, options = self._binders[kernel](*args, **kwargs)
        key = kernel, str(specialisation), str(options)
        given = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
        # What is not read is a placeholder: the same memory a second time.
        tensors = {(t.untyped_storage()._cdata, t.storage_offset(), t.numel()): t for t in given}
        entry = {
            "label": self.label,
            "kernel": f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}",
            "programs": math.prod(grid(bound) if callable(grid) else grid),
            "bytes": sum(t.numel() * t.element_size() for t in tensors.values()),
            "elements": max(t.numel() for t in tensors.values()),
            "call": (kernel, args, kwargs),
        }
        self.found.setdefault(key, entry)


class _ReadsAnswered(TorchDispatchMode):
    """What is read from `meta` is 1: transformers asks whether a batch is packed."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1
        return func(*args, **(kwargs or {}))


def models() -> dict[str, Callable[[], tuple[nn.Module, dict[str, torch.Tensor]]]]:
    """Name -> makes a model of one or two blocks at its real widths and a batch; on `meta`."""
    import transformers as hf

    def ids(vocabulary: int, batch: int, tokens: int) -> torch.Tensor:
        return torch.zeros(batch, tokens, dtype=torch.long)

    def bert() -> tuple[nn.Module, dict[str, torch.Tensor]]:
        model = hf.BertForSequenceClassification(hf.BertConfig(num_hidden_layers=2))
        return model, {"input_ids": ids(1, 8, 128), "labels": torch.zeros(8, dtype=torch.long)}

    def vit() -> tuple[nn.Module, dict[str, torch.Tensor]]:
        model = hf.ViTForImageClassification(hf.ViTConfig(num_hidden_layers=2, image_size=224))
        return model, {
            "pixel_values": torch.zeros(8, 3, 224, 224),
            "labels": torch.zeros(8, dtype=torch.long),
        }

    def gpt2() -> tuple[nn.Module, dict[str, torch.Tensor]]:
        model = hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=2, n_embd=1024, n_head=16, use_cache=False))
        return model, {"input_ids": ids(1, 2, 512), "labels": ids(1, 2, 512)}

    def llama() -> tuple[nn.Module, dict[str, torch.Tensor]]:
        config = hf.LlamaConfig(
            hidden_size=4096,
            intermediate_size=14336,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=32000,
            num_hidden_layers=2,
            use_cache=False,
        )
        return hf.LlamaForCausalLM(config), {"input_ids": ids(1, 1, 1024), "labels": ids(1, 1, 1024)}

    def qwen() -> tuple[nn.Module, dict[str, torch.Tensor]]:
        config = hf.Qwen3Config(
            hidden_size=2048,
            intermediate_size=6144,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=32000,
            num_hidden_layers=2,
            use_cache=False,
        )
        return hf.Qwen3ForCausalLM(config), {"input_ids": ids(1, 1, 1024), "labels": ids(1, 1, 1024)}

    return {"bert": bert, "vit": vit, "gpt2": gpt2, "llama": llama, "qwen": qwen}


def record(presets: tuple[str, ...] = PRESETS, names: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Return one launch of each specialisation of a step of these models with these presets, and of the updates."""
    import slimfit_ds

    launches = Launches()
    for name, make in models().items():
        for preset in presets:
            if names and name not in names:
                continue
            with torch.device("meta"):
                model, batch = make()
            model = model.to(torch.bfloat16)
            batch = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch.items()}
            launches.label, launches.form = f"{name} {preset}", 1 if name == "gpt2" else 0
            slim = {"freeze": {"policy": "none"}, "activations": {"preset": preset, "proof": False}}
            handle = slimfit_ds.slim(model, slim)
            # Norms that train have other kernels than frozen ones.
            for frozen in (0, 1):
                for parameter in model.parameters():
                    parameter.requires_grad_(parameter.dim() > frozen)
                with launches.recorded(), _ReadsAnswered():
                    model(**batch).loss.backward()
            handle.remove()
    with launches.recorded():
        launches.label = "update"
        updates()
    return list(launches.found.values())


def updates() -> None:
    """Step weights of 16 and 32 bits by both optimizers, their gradients accumulated or not."""
    from slimfit_ds.engine.shard_update import ShardUpdater
    from slimfit_ds.engine.sharding import FlatUnit
    from slimfit_ds.optim.config import OptimizerStatesConfig
    from slimfit_ds.optim.rules import rule_of

    for optimizer in (torch.optim.AdamW, torch.optim.Adam):
        for weight, gradient in (
            (torch.float32, torch.float32),
            (torch.bfloat16, torch.bfloat16),
            (torch.bfloat16, torch.float32),
        ):
            parameter = nn.Parameter(torch.empty(4096, 512, dtype=weight, device="meta"))
            stock = optimizer([parameter], lr=1e-3)
            unit = FlatUnit(0, ["weight"], [parameter], 0, 0)
            with mock.patch.object(torch, "Generator", return_value=torch.Generator()):  # `meta` has none
                updater = ShardUpdater(
                    [unit], stock, rule_of(stock), OptimizerStatesConfig(), torch.device("meta")
                )
            with mock.patch.object(updater, "_rounding"):
                updater.update([unit], {0: torch.empty(unit.numel, dtype=gradient, device="meta")}, 0.5)


def compile_one(entry: dict[str, Any], capability: int) -> dict[str, Any]:
    """Compile one launch for a GPU, and return registers, stack bytes, warps, instructions and the static bound."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel, args, kwargs = entry["call"]
    started = time.perf_counter()
    row = {k: v for k, v in entry.items() if k != "call"} | {"target": f"sm_{capability}"}
    try:
        target = GPUTarget("cuda", capability, 32)
        backend = make_backend(target)
        binder = create_function_from_signature(kernel.signature, kernel.params, backend)
        options, signature, constants, attributes = kernel._pack_args(
            backend, kwargs, *binder(*args, **kwargs)
        )
        source = ASTSource(kernel, signature, constants, attributes)
        made = triton.compile(source, target=target, options=options.__dict__)
        row |= usage(made.asm["cubin"]) | {"warps": made.metadata.num_warps, "shared": made.metadata.shared}
        row |= bound(row)
    except Exception as error:  # one variant must not hide the others
        row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"
    row.pop("operations", None)
    return {**row, "seconds": round(time.perf_counter() - started, 2)}


def usage(cubin: bytes) -> dict[str, Any]:
    """Return registers, stack bytes and instructions by name of a compiled kernel."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        resources = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True
        )
        listing = subprocess.run([tools / "nvdisasm", file.name], capture_output=True, text=True).stdout
    text = resources.stdout + resources.stderr
    found = {name: re.search(rf"{name}:(\d+)", text) for name in ("REG", "STACK")}
    names = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", listing, re.M)
    operations = collections.Counter(name for name in names if not name.startswith("NOP"))
    narrow = sum(
        n for o, n in operations.items() if o.startswith(("LDG", "STG")) and not re.search(r"\.(128|64)", o)
    )
    wide = sum(n for o, n in operations.items() if o.startswith(("LDG", "STG")) and ".128" in o)
    return {
        "registers": int(found["REG"].group(1)) if found["REG"] else -1,
        "stack": int(found["STACK"].group(1)) if found["STACK"] else -1,
        "instructions": operations.total(),
        "narrow": narrow,
        "wide": wide,
        "operations": operations,
    }


def bound(row: dict[str, Any]) -> dict[str, float]:
    """Return instructions and bytes per element, and the bound of the share of the memory's bandwidth."""
    issue = row["instructions"]
    half = 2 * sum(n for o, n in row["operations"].items() if re.fullmatch(_HALF_RATE, o.split(".")[0]))
    if "adam" in row["kernel"]:
        # Its tensors stand in a table of addresses, and one of two paths runs.
        row["elements"] = row["programs"] * 2048
        row["bytes"], issue, half = row["elements"] * 28, issue * 0.55, half * 0.55
    compute = max(issue, half) * row["warps"] * row["programs"] / (4 * SMS * CLOCK)
    move = row["bytes"] / BANDWIDTH
    return {
        "per_element": round(issue * row["warps"] * 32 * row["programs"] / row["elements"], 1),
        "bytes_per_element": round(row["bytes"] / row["elements"], 2),
        "share": round(move / max(move, compute), 2),
    }


_ENTRIES: list[dict[str, Any]] = []


def _compile(job: tuple[int, int]) -> dict[str, Any]:
    return compile_one(_ENTRIES[job[0]], job[1])


def compile_all(
    entries: list[dict[str, Any]], capabilities: list[int], jobs: int
) -> Iterator[dict[str, Any]]:
    """Compile every launch for every target in `jobs` processes; yield rows as they come."""
    _ENTRIES[:] = entries  # forked processes find them here
    pairs = [(i, capability) for capability in capabilities for i in range(len(entries))]
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        yield from pool.imap_unordered(_compile, pairs)


def fault(row: dict[str, Any], registers: int = MAX_REGISTERS) -> str | None:
    """Return what is wrong with a variant: it does not compile, it spills, or it takes too many registers."""
    if "error" in row:
        return row["error"]
    if row["stack"]:
        return f"spills {row['stack']} bytes a thread"
    return f"{row['registers']} registers, at most {registers}" if row["registers"] > registers else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--targets", type=int, nargs="+", default=[80, 90], help="compute capabilities, as 90"
    )
    parser.add_argument("--presets", nargs="+", default=list(PRESETS))
    parser.add_argument(
        "--models", nargs="*", default=[], help="of bert, vit, gpt2, llama, qwen; all if none"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--csv", type=Path, help="where to write a row per variant")
    parser.add_argument("--registers", type=int, default=MAX_REGISTERS, help="most registers of a thread")
    options = parser.parse_args()
    started = time.perf_counter()
    entries = record(tuple(options.presets), tuple(options.models))
    rows = []
    for row in compile_all(entries, options.targets, options.jobs):
        rows.append(row)
        if problem := fault(row, options.registers):
            print(f"{row['target']} {row['kernel']} ({row['label']}): {problem}", flush=True)
    rows.sort(key=lambda row: (row["target"], row["kernel"], row["label"]))
    if options.csv is not None:
        import csv

        names = list(dict.fromkeys(name for row in rows for name in row))
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)
    failed = sum(fault(row, options.registers) is not None for row in rows)
    kernels = len({row["kernel"] for row in rows})
    print(
        f"{len(rows)} variants of {kernels} kernels for {len(options.targets)} targets, {failed} at fault, "
        f"{time.perf_counter() - started:.0f} s"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
