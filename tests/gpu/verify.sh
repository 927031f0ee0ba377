#!/usr/bin/env bash
# One full verification on a GPU host: kernels against the reference, engines of one node, compute-sanitizer, timing against
# exact attention, and a model taken all the way to validated TensorRT engines.
#   tests/gpu/verify.sh OUT [MODEL TEXT]      steps: STEPS="cuda engines sanitizer attention model" (default: all)
# Needs python3 with torch, transformers, pytest and Polygraphy, TensorRT's Python module for the steps engines and model, both
# libraries in hyperattention/lib. Logs and numbers go to OUT; the exit code is 1 if any step failed. About ten minutes on an H200.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=$(mkdir -p "${1:?usage: verify.sh OUT [MODEL TEXT]}" && cd "$1" && pwd)
model=${2:-models/byte-lm-4m} text=${3:-tests/data/heldout.txt}
steps=" ${STEPS:-cuda engines sanitizer attention model} "
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HYPERATTENTION_NO_SKIP=1
python=${PYTHON:-python3}
wanted() { [[ $steps == *" $1 "* ]]; }
failed=()

# step NAME COMMAND...: log to OUT/NAME.log, remember a failure, show the end.
step() {
  local name=$1 start=$SECONDS
  shift
  if "$@" >"$out/$name.log" 2>&1; then verdict=PASS; else verdict=FAIL failed+=("$name"); fi
  echo "$verdict $name ($((SECONDS - start)) s): $(tail -n 1 "$out/$name.log" | cut -c1-200)"
}

sanitize() {  # the four tools side by side: each is bound by one core
  local tool pids=() status=0
  for tool in memcheck racecheck initcheck synccheck; do
    timeout 300 compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 5 \
      "$python" -m pytest -q -p no:cacheprovider tests/gpu/test_cuda.py -k sanitizer >"$out/sanitizer-$tool.log" 2>&1 &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || status=1; done
  grep -H "ERROR SUMMARY\|RACECHECK SUMMARY\|passed\|failed" "$out"/sanitizer-*.log
  return $status
}

# One export without validation, then the validation with the exact engine as rival.
export_engine() {
  "$python" -m hyperattention.export "$model" "$out/$1" "${@:2}" --dtype bf16 --input-ids bytes --require-engine --no-validate \
    --min-seq 1 --opt-seq 32768 --max-seq 131072
}
validate() {
  "$python" -m hyperattention.validate run "$out/$1" --model "$model" --text "$text" --lengths 8192,16384,32768 --windows 8,4,4 --needle "${@:2}"
}

wanted cuda && step cuda "$python" -m pytest -q -p no:cacheprovider -m gpu tests/gpu/test_cuda.py tests/test_op.py
wanted engines && step engines "$python" tests/gpu/engine_run.py --out "$out/engines"
wanted sanitizer && step sanitizer sanitize
wanted attention && step attention "$python" tests/gpu/bench_attention.py --json "$out/attention.json" --lengths 4096 32768 131072
if wanted model; then
  step export-exact export_engine exact --preset exact --layers all
  for layers in odd all; do
    step "export-$layers" export_engine "$layers" --layers "$layers"
    step "validate-$layers" validate "$layers" --exact-engine "$out/exact/model.engine" --time-lengths 131072
  done
  step export-prefill export_engine prefill --layers all --task prefill
  step validate-prefill validate prefill  # here the engine itself fills the cache over which the last positions attend exactly
fi
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
