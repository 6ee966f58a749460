#!/usr/bin/env bash
# The first minutes on a card: whether it computes the right things, smallest first, and how long its operations take.
#
#   first_run.sh [RESULTS] [WHEELS]
#
# RESULTS (default: gpu-results) gets a log of every part. WHEELS is a folder that docs/gpu-status.md says how to make,
# for a machine without a network; without it, llorch, this provider and pytest have to be installed. A part that fails
# or runs out of time does not keep the next from running: the last lines say which failed. PARTS="attention models"
# runs those alone. PROVIDER names another provider.
set -uo pipefail
cd "$(dirname "$0")/../.."
RESULTS=${1:-gpu-results} WHEELS=${2:-} PROVIDER=${PROVIDER:-cupy-cuda} PYTHON=${PYTHON:-python3}
mkdir -p "$RESULTS"
FAILED=() TRIED=""

part() { # part NAME SECONDS COMMAND...: runs one part with its own log
  local name=$1 seconds=$2 log="$RESULTS/$1.log" start=$SECONDS
  shift 2
  [[ -z "${PARTS:-}" || " $PARTS " == *" $name "* ]] || return 0
  TRIED+=" $name "
  if timeout "$seconds" "$@" >"$log" 2>&1; then
    echo "ok     $name ($((SECONDS - start)) s): $(tail -n 1 "$log")"
  else
    echo "FAILED $name ($((SECONDS - start)) s, status $?): $(tail -n 1 "$log")"
    grep -m 3 -E '^(E  |FAILED|ERROR)|Error' "$log" | cut -c -300
    FAILED+=("$name")
  fi
}

suite() { # suite NAME SECONDS SELECTION: tests of the conformance suite
  # without the checkout's settings, which make every warning of a library an error
  part "$1" "$2" "$PYTHON" -m pytest -c /dev/null -q --tb=short -p no:cacheprovider --durations=3 --pyargs \
    llorch.providers.conformance --provider "$PROVIDER" -k "$3"
}

run() { # run NAME OPTIONS...: the demonstration model says what it says on numpy-cpu
  part "$1" 120 bash -c '
    begin="But Jasper ran too fast, and it broke. He wanted to"  # no two tokens are nearly as likely in what follows
    say() { "$PYTHON" -m llorch run "$begin" --model llorch/demo/llorch-demo.gguf --cache-type f32 \
      --max-tokens 32 --temperature 0 "$@"; }
    expected=$(say --provider numpy-cpu 2>/dev/null) && found=$(say --provider "$PROVIDER" "$@") || exit 1
    echo "$found"
    [ "$found" = "$expected" ] || { echo "other text than numpy-cpu: $expected"; exit 1; }
  ' bash "${@:2}"
}
export PROVIDER PYTHON

if [ -n "$WHEELS" ]; then
  SITE=$(mktemp -d)
  part install 300 "$PYTHON" -m pip install -q --no-index --find-links "$WHEELS" --target "$SITE" \
    llorch llorch-provider-cupy pytest
  export PYTHONPATH=$SITE${PYTHONPATH:+:$PYTHONPATH}
fi
if [ "$PROVIDER" = cupy-cuda ]; then part card 30 nvidia-smi; fi
part providers 180 "$PYTHON" -m llorch providers
"$PYTHON" -c '
import sys
from llorch.errors import LlorchError
from llorch.providers import registry
try:
    registry.choose(sys.argv[1])[0].devices()
except LlorchError as error:
    sys.exit(f"no card can be used, nothing else is tried: {error}")' "$PROVIDER" || exit 1

suite device 120 "test_device"
suite elementwise 120 "test_add_and_swiglu or test_swiglu or test_gather or test_embed"
suite norms 120 "test_rmsnorm or test_add_rmsnorm"
suite rope 120 "test_rope"
suite topk 120 "test_topk"
suite plain_products 180 "test_matmul and (F32 or F16 or BF16) and not group"
suite quantised_products 240 "test_matmul and not (F32 or F16 or BF16) and not group"
suite grouped_products 240 "test_matmul_group or gate_up or tied"
suite attention 240 "test_attention"
suite models 240 "test_models"
# where the suite's models fail: the first of the demonstration model's values that numpy-cpu has otherwise
part compare 240 "$PYTHON" -m llorch compare llorch/demo/llorch-demo.gguf --provider "$PROVIDER"
part compare_one_token 240 "$PYTHON" -m llorch compare llorch/demo/llorch-demo.gguf --provider "$PROVIDER" --tokens 1
run text
run text_halves --prefill-weights half
run text_limited --gpu-memory 2GiB
run text_two_cards --device "$("$PYTHON" -c '
import sys
from llorch.providers import registry
name = registry.choose(sys.argv[1])[0].devices()[0].name
print(f"{name},{name.partition(chr(58))[2]}")' "$PROVIDER")"
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    part "$tool" 240 compute-sanitizer --tool "$tool" --error-exitcode 9 "$PYTHON" -m pytest -c /dev/null -q -p no:cacheprovider \
      --pyargs llorch.providers.conformance --provider "$PROVIDER" \
      -k "(test_head_geometries and 6-3) or (test_rmsnorm and 33) or test_topk or (test_matmul_group and Q4_K)"
  done
fi
part operations 240 "$PYTHON" -m llorch bench --ops --provider "$PROVIDER" --dim 4096 --ffn 11008 --heads 32 \
  --kv-heads 32 --context 512 -p 512

for name in ${PARTS:-}; do # a misspelt part must not pass for one that is right
  [[ $TRIED == *" $name "* ]] || { echo "FAILED $name: there is no such part here" && FAILED+=("$name"); }
done
echo "${#FAILED[@]} parts failed${FAILED[*]:+: ${FAILED[*]}}"
[ ${#FAILED[@]} -eq 0 ]
