"""Every recipe in recipes/ validates and describes networks of SD's shape."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel

from pocketfusion.models.judge import JudgeModel
from pocketfusion.recipe import load_recipe

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    with torch.device("meta"):
        unet = UNet2DConditionModel(**recipe.teacher.unet)
        vae = AutoencoderKL(**recipe.autoencoder.config)
        JudgeModel(image_size=recipe.data.size, widths=recipe.judge.widths, embed_dim=recipe.judge.embed_dim)
    # SD-1.5's pattern: 16 cross-attention and 22 ResNet blocks (SnapFusion, Table 3)
    assert sum(isinstance(m, Transformer2DModel) for m in unet.modules()) == 16
    assert sum(isinstance(m, ResnetBlock2D) for m in unet.modules()) == 22
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    assert unet.config.sample_size * factor == recipe.data.size
    assert unet.config.in_channels == vae.config.latent_channels
    assert DDIMScheduler(**recipe.teacher.scheduler).config.num_train_timesteps == 1000


def test_there_are_recipes():
    assert {p.stem for p in RECIPES} >= {"emoji128", "emoji64", "tiny"}
