#!/usr/bin/env bash
# Collects into .whl/ the Python packages that a bare GPU machine (torch, transformers, peft, no network) still needs.
#
#   benchmarks/gpu_wheels.sh [PYTHON_VERSION]      # of that machine; default 3.12
#
# About 20 MB: bitsandbytes keeps the library of one CUDA version only (BNB_CUDA, default 130).
set -euo pipefail
cd "$(dirname "$0")/.."
version=${1:-3.12}
python=${PYTHON:-.venv/bin/python}
mkdir -p .whl
rm -f .whl/*.whl
platforms=()
for tag in 2_28 2_24 2_17; do platforms+=(--platform "manylinux_${tag}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64)
"$python" -m pip download -q --no-deps --only-binary=:all: --implementation cp --python-version "$version" \
  "${platforms[@]}" -d .whl pydantic pydantic-core annotated-types typing-inspection hjson \
  torchao galore-torch badam apollo-torch bitsandbytes pytest-xdist execnet
DS_BUILD_OPS=0 "$python" -m pip wheel -q --no-deps --no-build-isolation -w .whl "deepspeed==$(
  sed -n 's/^deepspeed==//p' constraints.txt)"
"$python" - "${BNB_CUDA:-130}" <<'PYTHON'
import sys
import zipfile
from pathlib import Path

wheel = next(Path(".whl").glob("bitsandbytes-*.whl"))
kept = {"bitsandbytes/libbitsandbytes_cpu.so", f"bitsandbytes/libbitsandbytes_cuda{sys.argv[1]}.so"}
smaller = wheel.with_suffix(".part")
with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED) as target:
    for name in source.namelist():
        if not name.endswith(".so") or name in kept:
            content = source.read(name)
            if name.endswith("RECORD"):
                lines = content.decode().splitlines()
                lines = [line for line in lines if ".so," not in line or line.split(",")[0] in kept]
                content = ("\n".join(lines) + "\n").encode()
            target.writestr(name, content)
smaller.replace(wheel)
PYTHON
du -sh .whl
