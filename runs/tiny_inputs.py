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

import yaml
from menagerie import autoencoder, pipeline, text_encoder, unet

from ldm import ldm_state, save
from pocketfusion.data.shapes import COLOURS, picture

RECIPES = Path(__file__).parents[1] / "recipes"
SIZE = 32  # pixels: latents of 8×8


def tiny_recipe(made: Any) -> dict[str, Any]:
    """recipes/sd15.yaml with the checkpoint's shapes, and recipes/tiny.yaml's settings of the stages that are run."""
    recipe, tiny = (yaml.safe_load((RECIPES / f"{name}.yaml").read_text()) for name in ("sd15", "tiny"))
    recipe = {name: recipe[name] for name in ("name", "data", "text", "autoencoder", "teacher", "judge")}
    recipe["name"], recipe["data"]["size"] = "tiny", SIZE
    recipe["autoencoder"]["config"], recipe["teacher"]["unet"] = _config(made.vae), _config(made.unet)
    recipe["teacher"] |= {"num_inference_steps": 2}
    for section in ("to_v", "step_distillation", "decoder"):
        recipe[section] = tiny[section]
        recipe[section]["train"] |= {"steps": 4, "preview_every": 4}
    return recipe


def _config(network: Any) -> dict[str, Any]:
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in network.config.items()}
    return {name: value for name, value in plain.items() if not name.startswith("_") and value is not None}


def make(folder: Path) -> None:
    """Writes `checkpoint.safetensors`, `shards/` and, last, `recipe.yaml`."""
    attends_in_the_middle = unet(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
    # of which half a decoder is groups of 32 channels still
    made = pipeline(unet=attends_in_the_middle, text_encoder=text_encoder(layers=1), vae=autoencoder(width=64))
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
