"""Benchmarks are programs, not a package: their folders go on the path."""

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path[:0] = [str(BENCHMARKS / name) for name in ("", "activations", "fidelity")]
