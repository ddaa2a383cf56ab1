"""Compiles C files of this package with the machine's own compiler, once, for what CPU tensors need in one pass.

A library goes to `$SLIMFIT_CACHE` (default `~/.cache/slimfit_ds`), under a name made of source, flags, compiler and
processor. Without a compiler, or with SLIMFIT_CPU_KERNELS=0, the torch versions of the same functions run.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

__all__ = ["load"]

# -fno-math-errno and -fno-trapping-math let loops of rintf run in vector registers; they change no result.
_FLAGS = (
    *("-std=gnu11", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    *("-fopenmp", "-fPIC", "-shared"),
)


def load(source: Path) -> ctypes.CDLL | None:
    """The library of a C file, compiled now if it has not been before; `None`: torch has to do it."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if os.environ.get("SLIMFIT_CPU_KERNELS") == "0" or compiler is None:
        return None
    try:
        return ctypes.CDLL(str(_compiled(source, compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        logging.getLogger(__name__).warning("%s runs in torch: %s failed: %s", source.stem, compiler, detail)
        return None


def _compiled(source: Path, compiler: str) -> Path:
    key = [source.read_text(), *_FLAGS, compiler, platform.platform(), _processor()]
    name = hashlib.sha256("\n".join(key).encode()).hexdigest()[:20]
    folder = Path(os.environ.get("SLIMFIT_CACHE", Path.home() / ".cache" / "slimfit_ds"))
    target = folder / f"{source.stem}_{name}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Several ranks may compile at once: each its own file, the last one to finish stays.
        with tempfile.TemporaryDirectory(dir=folder) as own:
            made = Path(own) / target.name
            command = [compiler, *_FLAGS, str(source), "-o", str(made), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
            made.replace(target)
    return target


def _processor() -> str:
    """What -march=native depends on: a shared home may serve several kinds of machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
