#!/usr/bin/env bash
# Everything that wants a GPU, in one command and one results folder, the most telling parts first.
#
#   benchmarks/gpu_suite.sh                    # results in $OUT (default outputs/gpu), at most 15 minutes
#   PARTS="kernels tests" benchmarks/gpu_suite.sh              # some of the parts
#   DEVICE=cpu MODELS=tiny METHODS=full,minimal benchmarks/gpu_suite.sh    # rehearsal anywhere
#
# A part ends after SECONDS_EACH (90), writes rows as it gets them, and stops no other; results.tar.gz is packed anew after each.
# On a bare machine (torch, transformers, no network): bring .whl/ along, made by benchmarks/gpu_wheels.sh. What has been run
# before is not run again where $OUT has its rows. The exit code is that of the worst part.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
started=$SECONDS
export OUT=${OUT:-$PWD/outputs/gpu}
device=${DEVICE:-cuda}
each=${SECONDS_EACH:-90}
all=${SECONDS_ALL:-870}
site=${SITE:-/tmp/site}
python=${PYTHON:-python3}
methods=${METHODS:-full,checkpointing,lora,lora_checkpointing,auto_balanced,auto_minimal,minimal,balanced}
worst=0
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
if compgen -G ".whl/*.whl" > /dev/null; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" .whl/*.whl \
    || worst=1
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

pack() {  # Some places bring only a handful of files back. Packed elsewhere: tar must not meet its own output.
  local packed
  packed=$(mktemp)
  tar -C "$OUT" --exclude=./results.tar.gz -czf "$packed" . && mv "$packed" "$OUT/results.tar.gz"
}

part() {  # NAME COMMAND...: runs a part with a limit of its own, its output in $OUT/NAME.log
  local name=$1 left=$((all - SECONDS + started))
  shift
  [[ -n "${PARTS:-}" && " $PARTS " != *" ${name%%-*} "* ]] && return
  if ((left < 10)); then
    echo "$name: left out, no time"
    return
  fi
  timeout --kill-after=5 "$((left < each ? left : each))" "$@" > "$OUT/$name.log" 2>&1
  local code=$?
  ((code > worst)) && worst=$code
  echo "$name: exit code $code after $((SECONDS - started)) s in all" | tee -a "$OUT/parts.log"
  tail -n "${LINES_SHOWN:-3}" "$OUT/$name.log"
  pack
}

nvidia-smi > "$OUT/nvidia-smi.log" 2>&1 || true
# In parallel, or each of the processes below would compile its own.
[ "$device" = cuda ] && part compile "$python" benchmarks/compile_kernels.py --targets "${ARCH:-90}" --csv "$OUT/kernels.csv"
# (a) A step of each method.
default=bert-base,vit-384,llama-8b,llama-8b-b8
for model in $(tr , ' ' <<< "${MODELS:-$default}"); do
  LINES_SHOWN=12 part "peers-$model" "$python" benchmarks/peers.py --device "$device" --models "$model" --methods "$methods" \
    --rounds "${ROUNDS:-1}" --seconds "$((each - 5))" --csv "$OUT/peers.csv"
done
# (b) Correctness. Most of it is compiling kernels, which several processes do sooner.
workers=()
"$python" -c "import xdist" 2> /dev/null && workers=(-n "${TEST_WORKERS:-16}")
read -ra tests <<< "${TESTS:-tests/activations tests/memory tests/optim tests/schedule}"
part tests "$python" -m pytest -q -m gpu -p no:cacheprovider --junitxml "$OUT/tests.xml" --maxfail 50 "${workers[@]}" "${tests[@]}"
# (c) Kernels against the bandwidth of a copy.
part kernels "$python" benchmarks/activations/codec_speed.py --device "$device" --tokens "${TOKENS:-49152}" --repeats 5 \
  --csv "$OUT/codec_speed.csv"
part step_time "$python" benchmarks/activations/step_time.py --device "$device" \
  --dtype "$([ "$device" = cuda ] && echo bf16 || echo fp32)" --rows "${ROWS:-128}" --csv "$OUT/step_time.csv"
# (d) Weights on the host.
part streaming "$python" benchmarks/streaming.py "$([ "$device" = cuda ] && echo gpu || echo rehearsal)"
echo "results: $OUT/results.tar.gz, worst exit code $worst, $((SECONDS - started)) s"
exit "$worst"
