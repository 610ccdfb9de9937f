"""Files of SD-1.5's and SD-2.1's true size, with random weights; -s shows the seconds and the peak memory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from ldm import clip_text, ldm_unet, ldm_vae, open_clip_text
from pocketfusion.models.sd_configs import CONFIGS

_WRITE = "import sys; sys.argv[0] = 'pocketfusion'; from pocketfusion.cli import main; main()"


def random_half(shape: torch.Size, seed: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float16).uniform_(-0.03, 0.03, generator=torch.Generator().manual_seed(seed))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["sd-1.5", "sd-2.1"])
def test_a_file_of_true_size_is_imported(name: str, tmp_path: Path) -> None:
    """Every tensor of the folder is the file's; says seconds and peak memory."""
    config = CONFIGS[name]
    with torch.device("meta"):
        parts = SimpleNamespace(
            unet=UNet2DConditionModel(**config["unet"]),
            vae=AutoencoderKL(**config["vae"]),
            text_encoder=CLIPTextModel(CLIPTextConfig(**config["text_encoder"])),
        )
    made: dict[str, dict[str, torch.Tensor]] = {}
    for part, network in vars(parts).items():
        shapes = {key: value.shape for key, value in network.state_dict().items()}
        made[part] = {key: random_half(shape, seed) for seed, (key, shape) in enumerate(shapes.items())}
        network.load_state_dict(made[part], assign=True)
    state = {f"model.diffusion_model.{key}": value for key, value in ldm_unet(parts.unet).items()}
    state |= {f"first_stage_model.{key}": value for key, value in ldm_vae(parts.vae).items()}
    state |= (open_clip_text if name == "sd-2.1" else clip_text)(parts.text_encoder)
    file = tmp_path / "model.safetensors"
    save_file({key: value.contiguous() for key, value in state.items()}, file)
    del state
    begun = time.perf_counter()
    arguments = ["import", str(file), str(tmp_path / "out"), "--prediction-type", "epsilon"]
    process = subprocess.Popen([sys.executable, "-c", _WRITE, *arguments], stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begun
    assert os.waitstatus_to_exitcode(status) == 0
    print(f"\n{name}: {file.stat().st_size / 1e9:.2f} GB in {seconds:.0f} s ({used.ru_utime + used.ru_stime:.0f} s of "
          f"CPU), peak memory {used.ru_maxrss / 1024**2:.2f} GiB")  # fmt: skip
    for part, tensors in made.items():
        (written,) = (tmp_path / "out" / part).glob("*.safetensors")
        with safe_open(written, framework="pt") as weights:
            names = {key.removeprefix("text_model."): key for key in weights.keys()}  # noqa: SIM118
            wanted = {key.removeprefix("text_model."): value for key, value in tensors.items()}
            assert names.keys() == wanted.keys()
            assert all(torch.equal(weights.get_tensor(names[key]), value) for key, value in wanted.items())
