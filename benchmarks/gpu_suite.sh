#!/usr/bin/env bash
# Everything that wants a GPU, in one command and one results folder: tests marked gpu, codec speed, block times, peers.
#
#   benchmarks/gpu_suite.sh                          # results in $OUT (default outputs/gpu), 9 minutes
#   BUDGET_MINUTES=25 benchmarks/gpu_suite.sh        # more cells of the comparison
#   DEVICE=cpu MODELS=tiny METHODS=full,minimal benchmarks/gpu_suite.sh    # dry run anywhere
#
# On a bare machine (torch, transformers, no network): bring .whl/ along, made by benchmarks/gpu_wheels.sh.
# A step that fails does not stop the others; the exit code is that of the worst.
set -uo pipefail
cd "$(dirname "$0")/.."
started=$SECONDS
export OUT=${OUT:-$PWD/outputs/gpu}
device=${DEVICE:-cuda}
budget=${BUDGET_MINUTES:-9}
site=${SITE:-/tmp/site}
python=${PYTHON:-python3}
worst=0
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
if compgen -G ".whl/*.whl" > /dev/null; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" .whl/*.whl \
    || worst=1
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

part() {  # NAME SECONDS COMMAND...: runs a part with a limit of its own, its output in $OUT/NAME.log
  local name=$1 seconds=$2
  shift 2
  timeout "$seconds" "$@" > "$OUT/$name.log" 2>&1
  local code=$?
  ((code > worst)) && worst=$code
  echo "$name: exit code $code after $((SECONDS - started)) s in all"
  tail -n "${LINES_SHOWN:-3}" "$OUT/$name.log"
}

nvidia-smi > "$OUT/nvidia-smi.log" 2>&1 || true
# Most of these tests is compiling kernels, which several processes do sooner.
workers=()
"$python" -c "import xdist" 2> /dev/null && workers=(-n "${TEST_WORKERS:-8}")
part tests "${TEST_SECONDS:-120}" "$python" -m pytest -q -x -m gpu -p no:cacheprovider "${workers[@]}" ${TESTS:-tests/activations tests/memory tests/optim tests/schedule}
part codec_speed "${CODEC_SECONDS:-90}" "$python" benchmarks/activations/codec_speed.py --device "$device" \
  --tokens "${TOKENS:-49152}" --repeats 5 --csv "$OUT/codec_speed.csv"
part step_time "${STEP_SECONDS:-60}" "$python" benchmarks/activations/step_time.py --device "$device" \
  --dtype "$([ "$device" = cuda ] && echo bf16 || echo fp32)" --rows "${ROWS:-128}" --csv "$OUT/step_time.csv"
# What is left of the budget belongs to the comparison.
left=$("$python" -c "print(max(0.5, $budget - ($SECONDS - $started) / 60 - 0.3))")
chosen=()
[ -n "${MODELS:-}" ] && chosen+=(--models "$MODELS")
[ -n "${METHODS:-}" ] && chosen+=(--methods "$METHODS")
LINES_SHOWN=40 part peers "$(("${budget%.*}" * 60 + 60))" "$python" benchmarks/peers.py --device "$device" \
  --budget-minutes "$left" --seconds 90 --csv "$OUT/peers.csv" "${chosen[@]}"
# Some places bring only a handful of files back. Packed elsewhere: tar must not meet its own output.
packed=$(mktemp)
tar -C "$OUT" -czf "$packed" . && mv "$packed" "$OUT/results.tar.gz"
echo "results: $OUT/results.tar.gz, worst exit code $worst, $((SECONDS - started)) s"
exit "$worst"
