# The body of sd15.sh and tiny.sh, which set what differs: from a checkpoint and captioned pictures to a checked bundle.
#
# SCRIPT CHECKPOINT DATA OUT
#   CHECKPOINT  one .safetensors file, a model folder, or hf:OWNER/NAME of the Hub
#   DATA        webdataset shards or a folder of captioned pictures; or a URL of shards (docs/cache.md)
#   OUT         a folder for all that is made; the same line again goes on where it was
#
# It stops at the first stage that fails, with that command's sentence and exit code. Environment:
#   PROCESSES     of this machine; default: its GPUs, or 1. They must divide the recipe's batch
#   FSDP=1        weights, moments and EMA in shards (FSDP2)
#   GPU_GB        memory that `plan` counts with; default: this machine's
#   PICTURES      the pictures themselves, where DATA is a URL: a decoder is distilled from pixels
#   POCKETFUSION, LAUNCH   commands that run pocketfusion in one process and in all; sd15.sbatch sets LAUNCH
set -euo pipefail

usage() {
    echo "usage: $0 CHECKPOINT DATA OUT   (see the head of runs/checkpoint_to_bundle.sh)" >&2
    exit 2
}
[ $# = 3 ] || usage
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
if [ -z "${PROCESSES:-}" ]; then
    PROCESSES=$( (nvidia-smi -L 2>/dev/null || true) | wc -l)
    [ "$PROCESSES" -gt 0 ] || PROCESSES=1
fi
: "${POCKETFUSION:=$python -m pocketfusion}"
if [ "$PROCESSES" = 1 ]; then
    LAUNCH=$POCKETFUSION
else
    : "${LAUNCH:=$python $here/launch.py --standalone --nproc-per-node=$PROCESSES -m pocketfusion}"
fi
sharded=
if [ "${FSDP:-0}" = 1 ]; then
    export ACCELERATE_USE_FSDP=true FSDP_VERSION=2 # what `accelerate launch --use_fsdp --fsdp_version 2` sets
    sharded=--fsdp
fi

absolute() { case $1 in *://* | hf:*) echo "$1" ;; *) realpath -m -- "$1" ;; esac }
checkpoint=$(absolute "$1") data=$(absolute "$2") recipe=$(absolute "$RECIPE")
pictures=$(absolute "${PICTURES:-$2}")
mkdir -p -- "$3"
cd -- "$3" # the recipe finds the text encoder in ./stable-diffusion-v1-5

stage() { # NAME COMMAND…: runs it, or ends with its exit code
    local name=$1 code=0 begun=$SECONDS
    shift
    echo "== $name"
    "$@" || code=$?
    if [ $code != 0 ]; then
        echo "$0: the stage $name stopped with exit code $code; what is finished is kept in $PWD: run the same line again" >&2
        exit $code
    fi
    echo "== $name: $((SECONDS - begun)) s"
}
alone() { $POCKETFUSION "$@"; }
together() { $LAUNCH "$@"; }
older() { [ ! -e "$1" ] || [ "$2" -nt "$1" ]; } # RESULT INPUT: whether it has to be made (again)

base=stable-diffusion-v1-5
case $checkpoint in
hf:*) [ -e $base/model_index.json ] || stage import alone import --from-hub "${checkpoint#hf:}" $base ;;
*)
    if [ -d "$checkpoint" ]; then
        [ -e $base ] || ln -s -- "$checkpoint" $base
    elif older $base/model_index.json "$checkpoint"; then
        stage import alone import "$checkpoint" $base --overwrite
    fi
    ;;
esac

# Before anything that takes hours: whether it fits, whether the processes divide the batch, whether trackers are there.
stage plan alone plan "$recipe" --processes "$PROCESSES" $sharded ${GPU_GB:+--gpu-gb "$GPU_GB"}

stage cache together data cache "$data" data --vae $base --size "$SIZE" $CACHE_OPTIONS

# to-v:             val_mse begins at what turning the epsilon-model's output leaves and falls.
# base-16, steps-8: val_vanilla and val_guided are distances to the teacher; both fall, guided ones later.
# distill-decoder:  val_psnr_db rises against the teacher's pictures.
# They lie in OUT/STAGE.run/log.jsonl and loss.png; docs/full-size.md says what was seen at small size, and what each costs.
stage to-v together to-v $base --recipe "$recipe" --data data --out v
stage base-16 together distill-steps v --teacher v --teacher-steps $((4 * STEPS)) --steps $((2 * STEPS)) \
    --recipe "$recipe" --data data --out base-16
stage steps together distill-steps base-16 --teacher base-16 --teacher-steps $((2 * STEPS)) --steps "$STEPS" \
    --recipe "$recipe" --data data --out student
stage distill-decoder together distill-decoder student --recipe "$recipe" --data "$pictures" --out final

if older bundle/bundle.json final/provenance.json; then
    stage export alone export final bundle $EXPORT --overwrite
fi
stage check alone check bundle --static
echo "$PWD/bundle"
