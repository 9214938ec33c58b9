#!/usr/bin/env bash
# Everything that two GPUs have to show, in one call: parity over NCCL, the command line at full 5b size,
# what offload saves, and image to video at full size. Speed side by side with others: benchmarks/gpus.py.
# Usage: [PARTS="parity build generate offload image"] benchmarks/gpu.sh OUTPUT_FOLDER
set -u
out=$(realpath "$1"); cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
work=${WORK:-/tmp/cogvideox-checkpoints}; mkdir -p "$work"
like=${LIKE---full-size --device cuda}; size=${SIZE:-}
run() { echo "== $(date +%T) $1"; shift; "$@" 2>>"$out/stderr.log"; echo "-- exit $?"; }

wanted() { [[ " ${PARTS:-parity build generate offload image} " == *" $1 "* ]]; }

if wanted parity; then run parity python3 -m pytest -q tests/test_gpu.py -p no:cacheprovider; fi
if wanted build; then
  for model in ${MODELS:-5b 2b}; do
    run "build $model" python3 -m benchmarks.random_weights --like $model --output "$work/CogVideoX-$model" $like
  done
fi
if wanted generate; then
  for plan in single cfg2; do
    run "generate 5b $plan" python3 -m parallel_backend generate --model "$work/CogVideoX-5b" --plan $plan ${DEVICES:-} $size \
      --prompt "a red circle moves slowly from left to right" --steps 10 --output "$out/5b-$plan.mp4" --json
  done
fi
if wanted offload; then
  for offload in model group sequential; do
    run "offload $offload" python3 -m parallel_backend bench --model "$work/CogVideoX-5b" --plans single $size --steps 2 \
      --offload $offload --diffusers none --output "$out/offload-$offload.json"
  done
fi
if wanted image; then
  python3 -c "import numpy, PIL.Image as i; i.fromarray(numpy.indices((480, 720)).sum(0).astype('uint8')).save('$work/start.png')"
  for model in ${IMAGE_MODELS:-5b-i2v 1.5-5b-i2v}; do
    run "build $model" python3 -m benchmarks.random_weights --like $model --output "$work/$model" $like
    run "generate $model" python3 -m parallel_backend generate --model "$work/$model" --plan single ${DEVICES:-} $size \
      --image "$work/start.png" --prompt "it turns around" --steps ${IMAGE_STEPS:-3} \
      --output "$out/$model.mp4" --json | tee "$out/$model.log"
    grep '^{' "$out/$model.log" > "$out/$model.json"
    rm -rf "${work:?}/$model"  # the next needs the room
  done
fi
