#!/usr/bin/env bash
# sd15.sh's stages on a checkpoint file, shards and a recipe of a miniature, in two processes on the CPU: two minutes.
#
#     runs/tiny.sh OUT
#
# For whoever wants to see the whole way before renting GPUs; its pictures are noise. tests/test_runs.py runs it.
out=${1:?usage: runs/tiny.sh OUT}
here=$(dirname "$0")
inputs=$out/inputs
if [ ! -e "$inputs/recipe.yaml" ]; then # written last
    PYTHONPATH=$here/../tests:$here/../tests/zoo${PYTHONPATH:+:$PYTHONPATH} \
        "${PYTHON:-python3}" "$here/tiny_inputs.py" "$inputs" || exit
fi
export PROCESSES=${PROCESSES:-2} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
RECIPE=$inputs/recipe.yaml
SIZE=32 STEPS=2
CACHE_OPTIONS=
EXPORT="--for android --gate-steps 1"
set -- "${CHECKPOINT:-$inputs/checkpoint.safetensors}" "${DATA:-$inputs/shards}" "$out"
. "$here/checkpoint_to_bundle.sh"
