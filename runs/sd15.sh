#!/usr/bin/env bash
# Stable Diffusion 1.5 to 8 steps with half a decoder, for phones: recipes/sd15.yaml's stages on all GPUs of a machine.
#
#     runs/sd15.sh v1-5-pruned-emaonly.safetensors SHARDS OUT          (8 GPUs: eight processes)
#     FSDP=1 runs/sd15.sh CHECKPOINT SHARDS OUT                        the same in shards
#     PROCESSES=1 runs/sd15.sh CHECKPOINT SHARDS OUT                   one GPU
#     sbatch --nodes 4 runs/sd15.sbatch CHECKPOINT SHARDS OUT          Slurm
#
# What it costs in A100-hours at 28 % of their peak, which is what others measured on this UNet (docs/full-size.md):
#     latents of a million pictures 7 · to-v 78 · base-16 222 · steps-8 222 (both teacher and student are SD-1.5's UNet)
#     distill-decoder 34 · import, plan, export and check: 15 minutes of a processor, 14 GB of memory
# We have not run it at full size: there are neither weights nor such machines where this was written. tiny.sh is the
# same script on a miniature (tests/test_runs.py). The search for a smaller UNet is not in it: docs/full-size.md.
RECIPE=${RECIPE:-$(dirname "$0")/../recipes/sd15.yaml}
SIZE=512 STEPS=8
CACHE_OPTIONS="--precision bf16"
EXPORT="--for android"
. "$(dirname "$0")/checkpoint_to_bundle.sh"
