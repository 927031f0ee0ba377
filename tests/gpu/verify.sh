#!/usr/bin/env bash
# One full verification on a GPU host: kernels against the reference and at random, engines of one node, ONNX Runtime's CUDA
# provider, compute-sanitizer, timing against exact attention and the released code, prefill of a model of the 6 B class, models of every
# kind and a language model taken to validated engines, and `hyperattention bench`.
#   tests/gpu/verify.sh OUT [MODEL TEXT]      steps: STEPS="cuda engines ort sanitizer attention prefill kinds export validate bench"
#                                             (default: all; validate needs what export built, in the same OUT)
#                                             exports: MODELS="odd all paper prefill" (default: all)
#                                             prefill: PREFILL_DEPTHS="32", numbers of layers (default: "4 32")
# TIMING_CACHE=FILE: a timing.cache of an earlier run on such a GPU, for the exports; kernels are then not timed again.
# UPSTREAM=DIR: a checkout of the released HyperAttention code, for the step attention. Needs python3 with torch, transformers,
# pytest and Polygraphy, TensorRT's Python module (all but cuda, sanitizer, bench), onnxruntime-gpu (engines, ort, attention),
# flash-attn-4 (attention, prefill), both libraries in hyperattention/lib, built from these sources. Logs and numbers go to OUT; the
# exit code is 1 if any step failed. Steps may be spread over several OUT; `python tests/gpu/collect.py OUT...` makes
# docs/gpu_verification.json of them.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=$(mkdir -p "${1:?usage: verify.sh OUT [MODEL TEXT]}" && cd "$1" && pwd)
model=${2:-models/byte-lm-4m} text=${3:-tests/data/heldout.txt}
all="cuda engines ort sanitizer attention prefill kinds export validate bench"
steps=" ${STEPS:-$all} "
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HYPERATTENTION_NO_SKIP=1
python=${PYTHON:-python3}
wanted() { [[ $steps == *" $1 "* ]]; }
failed=()
for name in $steps; do [[ " $all " == *" $name "* ]] || { echo "no step '$name'; steps: $all"; exit 2; }; done

# step NAME COMMAND...: log to OUT/NAME.log, verdict and seconds to OUT/steps.tsv, remember a failure, show the end.
step() {
  local name=$1 start=$SECONDS
  shift
  if "$@" >"$out/$name.log" 2>&1; then verdict=PASS; else verdict=FAIL failed+=("$name"); fi
  printf '%s\t%s\t%s\n' "$name" "$verdict" $((SECONDS - start)) >>"$out/steps.tsv"
  echo "$verdict $name ($((SECONDS - start)) s): $(tail -n 1 "$out/$name.log" | cut -c1-200)"
}

tests() {  # tests NAME PYTEST-ARGUMENT...: the counts go to OUT/NAME.xml
  "$python" -m pytest -q -p no:cacheprovider --junitxml="$out/$1.xml" "${@:2}"
}

sanitize() {  # the four tools side by side: each is bound by one core
  local tool pids=() status=0
  for tool in memcheck racecheck initcheck synccheck; do
    timeout 400 compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 5 \
      "$python" -m pytest -q -p no:cacheprovider --junitxml="$out/sanitizer-$tool.xml" tests/gpu/test_cuda.py -k sanitizer \
      >"$out/sanitizer-$tool.log" 2>&1 &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || status=1; done
  grep -H "ERROR SUMMARY\|RACECHECK SUMMARY\|passed\|failed" "$out"/sanitizer-*.log
  return $status
}

bench() {  # bench NAME ARGUMENT...
  "$python" -m hyperattention.validate bench "${@:2}" --max-seconds 3 --output "$out/$1"
}

# One export without validation, then the validation with the exact engine as rival: both regimes, needle in both.
export_engine() {
  local cache="${TIMING_CACHE:-$out/exact/timing.cache}"  # the layers around the attention are the same in all of them
  [ -f "$cache" ] && set -- "$@" --timing-cache "$cache"
  "$python" -m hyperattention.export "$model" "$out/$1" "${@:2}" --dtype bf16 --input-ids bytes --require-engine --no-validate \
    --min-seq 1 --opt-seq 32768 --max-seq 131072
}
validate() {
  "$python" -m hyperattention.validate run "$out/$1" --model "$model" --text "$text" --lengths 8192,16384,32768 --windows 8,4,4 --needle "${@:2}"
}

"$python" tests/gpu/collect_machine.py "$out/machine.json" || exit 3
wanted cuda && step cuda tests cuda -m gpu tests/gpu/test_cuda.py tests/gpu/test_table_cases.py tests/test_op.py
wanted engines && step engines "$python" tests/gpu/engine_run.py --out "$out/engines"
wanted ort && step ort tests ort -m gpu tests/gpu/test_ort_cuda.py
wanted sanitizer && step sanitizer sanitize
wanted attention && step attention "$python" tests/gpu/bench_attention.py --json "$out/attention.json" ${UPSTREAM:+--upstream "$UPSTREAM"}
wanted prefill && step prefill "$python" tests/gpu/bench_prefill.py --out "$out/prefill" ${PREFILL_DEPTHS:+--depths $PREFILL_DEPTHS}
wanted kinds && step kinds "$python" tests/gpu/kinds_run.py --out "$out/kinds"
models=${MODELS:-odd all paper prefill}
for name in $models; do [[ " odd all paper prefill " == *" $name "* ]] || { echo "no model '$name'; models: odd all paper prefill"; exit 2; }; done
if wanted export; then
  declare -A choice=([odd]="--layers odd" [all]="--layers all" [paper]="--layers all --preset paper" [prefill]="--layers all --task prefill")
  [ -f "$out/exact/manifest.json" ] || step export-exact export_engine exact --preset exact --layers all
  for name in $models; do step "export-$name" export_engine "$name" ${choice[$name]}; done
fi
if wanted validate; then
  for name in $models; do
    against=(--exact-engine "$out/exact/model.engine" --time-lengths 131072)
    [ "$name" = prefill ] && against=()  # the engine itself fills the cache over which the last positions attend exactly
    step "validate-$name" validate "$name" "${against[@]}"
  done
  [[ " $models " != *" all "* ]] || step bench-model bench bench-model "$out/all" --model "$model" --exact-engine "$out/exact/model.engine" \
    --lengths 4096,16384,65536,131072
fi
if wanted bench; then
  step bench-attention bench bench-attention --attention --preset blocks,paper --lengths 4096,16384,65536,131072,1048576
  step bench-grouped bench bench-grouped --attention --preset blocks,paper --heads 32 --kv-heads 8 --lengths 32768,131072
  step bench-growth bench bench-growth --attention --preset blocks,paper --head-dim 64 --rivals flash-attn-4 --lengths 131072,1048576
  step bench-profile bench bench-profile --attention --profile --preset blocks,paper --head-dim 64,128 --lengths 4096,32768,131072
fi
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
