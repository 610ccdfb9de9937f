"""Every recipe in recipes/ validates and describes networks of SD's shape."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel

from pocketfusion.compress.chain import chain_of
from pocketfusion.distill.decoder_pruning import HALF_RATIO
from pocketfusion.errors import PocketfusionError
from pocketfusion.models.dual_encoder import JudgeModel
from pocketfusion.models.sd_configs import CONFIGS
from pocketfusion.recipe import load_recipe

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
UNTRAINED = ("sd15-phone",)  #: of stages that follow on a checkpoint


@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem not in UNTRAINED], ids=lambda p: p.stem)
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
    assert {p.stem for p in RECIPES} >= {"emoji128", "emoji64", "sd15", "sd15-phone", "tiny"}


def test_a_recipe_without_training_has_stages_alone_and_trains_nothing():
    path = next(path for path in RECIPES if path.stem == "sd15-phone")
    chain = chain_of(load_recipe(path, whole=False))
    assert [stage.kind for stage in chain.stages] == ["base", "export", "export", "check", "bench"]
    assert chain["check"].inputs["bundle"] == ("export-gpu",)
    with pytest.raises(PocketfusionError, match=r"sd15-phone\.yaml: data is missing: add it"):
        load_recipe(path)


def test_a_stage_that_trains_needs_the_sections_it_reads(tmp_path):
    (tmp_path / "r.yaml").write_text("name: r\nstages: {base: {from: sd}, data: {from: d}, to-v: }\n")
    with pytest.raises(PocketfusionError, match="the stage to-v needs the recipe's section 'data': add it"):
        chain_of(load_recipe(tmp_path / "r.yaml", whole=False))


def test_full_size_is_stable_diffusion_and_the_papers_settings():
    recipe = load_recipe(next(path for path in RECIPES if path.stem == "sd15"))
    with torch.device("meta"):
        given = UNet2DConditionModel(**recipe.teacher.unet), AutoencoderKL(**recipe.autoencoder.config)
        stock = CONFIGS["sd-1.5"]
        wanted = UNet2DConditionModel(**stock["unet"]), AutoencoderKL(**stock["vae"])
    for ours, published in zip(given, wanted, strict=True):
        assert _shapes(ours) == _shapes(published)
    assert sum(p.numel() for p in given[0].parameters()) == 859_520_964
    assert given[1].config.scaling_factor == 0.18215
    stages = [recipe.to_v, recipe.elastic, recipe.recovery, recipe.step_distillation]
    for train in (stage.train for stage in stages):
        assert (train.batch_size, train.weight_decay) == (2048, 0.01)  # SnapFusion, section 5
    steps = recipe.step_distillation
    assert (steps.teacher_steps, steps.steps, steps.guidance_probability) == (16, 8, 0.1)
    assert (steps.guidance_range, steps.original_weight, steps.dynamic_scaling) == ((2.0, 14.0), 0.2, True)
    assert recipe.decoder.preset == "half" and HALF_RATIO == 0.5


def _shapes(network):
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}
