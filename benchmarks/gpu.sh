#!/usr/bin/env bash
# Everything that two GPUs have to show, in one call: parity over NCCL, the command line at full 5b size,
# plans side by side with diffusers, and what offload saves. Usage: benchmarks/gpu.sh OUTPUT_FOLDER
set -u
out=$(realpath "$1"); cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
work=${WORK:-/tmp/cogvideox-checkpoints}; mkdir -p "$work"
like=${LIKE---full-size --device cuda}; size=${SIZE:-}; plans=${PLANS:-single,cfg2,ulysses2,ring2}
run() { echo "== $(date +%T) $1"; shift; "$@" 2>>"$out/stderr.log"; echo "-- exit $?"; }

wanted() { [[ " ${PARTS:-parity build generate bench offload} " == *" $1 "* ]]; }

if wanted parity; then run parity python3 -m pytest -q tests/test_gpu.py -p no:cacheprovider; fi
if wanted build; then
  for model in ${MODELS:-5b 2b}; do
    run "build $model" python3 -m parallel_backend.cogvideox.random_weights --like $model --output "$work/CogVideoX-$model" $like
  done
fi
if wanted generate; then
  for plan in single cfg2; do
    run "generate 5b $plan" python3 -m parallel_backend generate --model "$work/CogVideoX-5b" --plan $plan ${DEVICES:-} $size \
      --prompt "a red circle moves slowly from left to right" --steps 10 --output "$out/5b-$plan.mp4" --json
  done
fi
if wanted bench; then
  for model in ${MODELS:-5b 2b}; do
    run "bench $model" python3 -m parallel_backend bench --model "$work/CogVideoX-$model" --plans $plans $size \
      --steps ${STEPS:-5} --decode --output "$out/bench-$model.json"
  done
fi
if wanted offload; then
  for offload in model group sequential; do
    run "offload $offload" python3 -m parallel_backend bench --model "$work/CogVideoX-5b" --plans single $size --steps 2 \
      --offload $offload --no-diffusers --output "$out/offload-$offload.json"
  done
fi
