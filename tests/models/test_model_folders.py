"""What a stage writes when it copies a folder: all of it, and nothing that is not there, loads in stock diffusers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from pocketfusion.distill.decoder import copy_with_vae
from pocketfusion.distill.decoder_pruning import half_shape, prune_decoder
from pocketfusion.models.elastic_unet import load_elastic
from pocketfusion.models.loading import load_pipeline
from pocketfusion.models.slim_autoencoder import load_vae
from pocketfusion.models.writing import copy_folder, copy_with_unet, write_scheduler

CHECKER = {
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
}


@pytest.fixture(params=["present", "deleted"])
def checked(request, tiny_folder, tmp_path) -> Path:
    """SD-1.5's layout: a safety checker is listed, its folders are there or deleted; the weights' type is fp16."""
    folder = shutil.copytree(tiny_folder, tmp_path / "checked")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | CHECKER | {"requires_safety_checker": True}))
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    del config["dtype"]
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config | {"torch_dtype": "float16"}))
    if request.param == "present":
        for name in CHECKER:
            (folder / name).mkdir()
            (folder / name / "config.json").write_text("{}")
    return folder


def with_unet(source: Path, out: Path) -> None:
    copy_with_unet(source, out, load_elastic(source))


def with_unet_and_scheduler(source: Path, out: Path) -> None:
    with_unet(source, out)
    write_scheduler(out, DDIMScheduler.from_pretrained(source / "scheduler"))


def with_vae(source: Path, out: Path) -> None:
    vae = load_vae(source / "vae")
    copy_with_vae(source, out, prune_decoder(vae, half_shape(vae)))


@pytest.mark.parametrize("copy", [copy_folder, with_unet, with_unet_and_scheduler, with_vae])
def test_a_copied_folder_draws_in_stock_diffusers_with_no_type_given(checked, tmp_path, copy):
    out = tmp_path / "out"
    out.mkdir()
    copy(checked, out)
    index = json.loads((out / "model_index.json").read_text())
    listed = {name for name, entry in index.items() if isinstance(entry, list) and entry != [None, None]}
    assert listed == {path.name for path in out.iterdir() if path.is_dir()}
    assert index["requires_safety_checker"] is False
    draws(out)


def draws(folder: Path) -> None:
    """One step of a stock pipeline, loaded as the README of any checkpoint says."""
    stock = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    stock.set_progress_bar_config(disable=True)
    assert {stock.unet.dtype, stock.vae.dtype, stock.text_encoder.dtype} == {torch.float32}
    assert stock("a red apple", num_inference_steps=1).images[0].size == (64, 64)


def test_what_training_writes_draws_with_no_type_given(trained):
    draws(trained / "base")


@pytest.mark.parametrize("name", ["base", "eight", "evolved", "final"])
def test_the_committed_folders_draw_with_no_type_given(name):
    draws(Path(__file__).parents[2] / "models" / "emoji" / name)


def test_a_folder_is_opened_without_its_safety_checker(checked):
    assert load_pipeline(checked).safety_checker is None
