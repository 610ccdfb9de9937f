"""What tiny.sh begins with: a checkpoint file of a miniature, two shards of captioned pictures, and their recipe.

    PYTHONPATH=tests:tests/zoo python runs/tiny_inputs.py FOLDER

The weights are random, so its pictures are noise.
"""

from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import AutoencoderKL
from menagerie import pipeline

from ldm import ldm_state, save
from pocketfusion.data.shapes import COLOURS, picture

RECIPES = Path(__file__).parents[1] / "recipes"
SIZE = 32  # pixels: latents of 8×8


def autoencoder() -> AutoencoderKL:
    """Of factor 4; wide enough that half of it is groups of 32 channels still."""
    torch.manual_seed(0)
    return AutoencoderKL(
        sample_size=SIZE,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(64, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=32,
        scaling_factor=0.18215,
    )


def tiny_recipe(made: Any) -> dict[str, Any]:
    """recipes/tiny.yaml's settings with the checkpoint's shapes, and sd15.yaml's noise schedule and text encoder."""
    recipe, full = (yaml.safe_load((RECIPES / f"{name}.yaml").read_text()) for name in ("tiny", "sd15"))
    recipe.pop("stages")
    recipe["data"] = {"size": SIZE, "scene_share": 0.0, "flip": True}
    recipe["text"] = full["text"]
    recipe["autoencoder"] = {"config": _config(made.vae), "train": full["autoencoder"]["train"]}
    recipe["teacher"] |= {"scheduler": full["teacher"]["scheduler"], "unet": _config(made.unet)}
    return recipe


def _config(network: Any) -> dict[str, Any]:
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in network.config.items()}
    return {name: value for name, value in plain.items() if not name.startswith("_") and value is not None}


def make(folder: Path) -> None:
    """Writes `checkpoint.safetensors`, `shards/` and, last, `recipe.yaml`."""
    made = pipeline(vae=autoencoder())
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    save(ldm_state(made), folder / "checkpoint.safetensors", {"modelspec.resolution": f"{SIZE}x{SIZE}"})
    for number, shape in enumerate(("square", "disc")):
        with tarfile.open(folder / "shards" / f"{number:05d}.tar", "w") as tar:
            for key, (colour, side) in enumerate((c, s) for c in COLOURS for s in (4, 6, 8, 10)):
                png = io.BytesIO()
                _image(picture(shape, colour, side, SIZE)).save(png, "PNG")
                for end, content in (("png", png.getvalue()), ("txt", f"a {colour} {shape}".encode())):
                    member = tarfile.TarInfo(f"{shape}{key:03d}.{end}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe(made), sort_keys=False))


def _image(pixels: Any) -> Any:
    from PIL import Image

    return Image.fromarray(pixels)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
