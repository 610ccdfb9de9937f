"""A checkpoint file at full size → model folder → bundle for Android → checked: minutes and peak memory of each.

    PYTHONPATH=tests python benchmarks/full_size_import.py sd-2.1 WORK

Random weights in SD-1.5's or SD-2.1's exact shapes, float16, in the original layout: 2.1 or 2.6 GB, with all that
comes of it 8 GB of disk in WORK. Each command is a process of its own, with one thread.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

EXPORT = "--for android --gate-steps 1"


def write_checkpoint(name: str, file: Path) -> None:
    """The configuration `name` with random weights as one file."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from ldm import ldm_state, save
    from pocketfusion.models.sd_configs import CONFIGS

    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    config = CONFIGS[name]
    parts = SimpleNamespace(
        unet=UNet2DConditionModel(**config["unet"]),
        vae=AutoencoderKL(**config["vae"]),
        text_encoder=CLIPTextModel(CLIPTextConfig(**config["text_encoder"])).half(),
    )
    state = {key: value.half() if value.is_floating_point() else value for key, value in ldm_state(parts).items()}
    save(state, file, {"modelspec.prediction_type": "epsilon"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configuration", choices=["sd-1.5", "sd-2.1"])
    parser.add_argument("work", type=Path)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    file = given.work / f"{given.configuration}.safetensors"
    if not file.exists():
        print(f"writing {file}", flush=True)
        write_checkpoint(given.configuration, file)
    folder, bundle = given.work / "model", given.work / "bundle"
    print("| command | minutes | of the processor | peak memory, GB |\n|---|---|---|---|")
    for command in (
        f"import {file} {folder} --overwrite",
        f"export {folder} {bundle} {EXPORT} --overwrite",
        f"check {bundle} --static",
    ):
        begun = time.monotonic()
        child = subprocess.Popen(
            [sys.executable, "-m", "pocketfusion", *command.split()],
            stdout=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        _, status, used = os.wait4(child.pid, 0)
        if status:
            sys.exit(f"pocketfusion {command} failed")
        minutes, busy = (time.monotonic() - begun) / 60, (used.ru_utime + used.ru_stime) / 60
        print(f"| `{command}` | {minutes:.1f} | {busy:.1f} | {used.ru_maxrss / 1e6:.2f} |", flush=True)


if __name__ == "__main__":
    main()
