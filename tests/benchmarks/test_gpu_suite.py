"""The GPU suite with a stand-in for Python: a part that fails or hangs stops nothing, and results are packed after each."""

from __future__ import annotations

import os
import subprocess
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTHON = """#!/usr/bin/env bash
case "$*" in
  *xdist*) exit 1 ;;
  *broken-shape*) exit 7 ;;
  *slow-shape*) echo "a row" >> "$OUT/peers.csv"; sleep 30 ;;
  *codec_speed*) tar -tzf "$OUT/results.tar.gz" > "$OUT/packed-before.txt" ;;
esac
echo "$*"
"""


def run(folder: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    stub = folder / "python"
    stub.write_text(PYTHON)
    stub.chmod(0o755)
    return subprocess.run(
        ["bash", "benchmarks/gpu_suite.sh"],
        cwd=ROOT,
        env={**os.environ, "OUT": str(folder / "out"), "PYTHON": str(stub), "DEVICE": "cpu", **settings},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_part_that_fails_or_hangs_stops_nothing(tmp_path) -> None:
    done = run(tmp_path, MODELS="broken-shape,slow-shape,tiny", SECONDS_EACH="2")
    out = tmp_path / "out"
    parts = [line.split(" after ")[0] for line in (out / "parts.log").read_text().splitlines()]
    assert parts == [
        "peers-broken-shape: exit code 7",
        "peers-slow-shape: exit code 124",
        "peers-tiny: exit code 0",
        "tests: exit code 0",
        "kernels: exit code 0",
        "step_time: exit code 0",
        "streaming: exit code 0",
    ], done.stdout + done.stderr
    assert done.returncode == 124
    # What a part had written before it was ended was packed before the next began.
    assert "./peers.csv" in (out / "packed-before.txt").read_text().split()
    with tarfile.open(out / "results.tar.gz") as packed:
        assert {"./parts.log", "./streaming.log", "./peers.csv"} <= set(packed.getnames())
        assert not any(name.endswith(".tar.gz") for name in packed.getnames())


def test_some_parts_and_no_time_left(tmp_path) -> None:
    done = run(tmp_path, PARTS="kernels", SECONDS_ALL="5")
    assert "kernels: left out, no time" in done.stdout
    assert "tests" not in done.stdout
    assert done.returncode == 0
