"""Two bundles for Core ML, made once: of a model with an evolved UNet, and of one with CLIP in Apple's layout.

Both are as small as their kinds can be: a conversion takes seconds, which go into graphs, not into weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

INSTALL = "pip install '.[compress,dev,coreml]' in pocketfusion's clone"


@pytest.fixture(scope="session", autouse=True)
def _coremltools() -> None:
    """All of this folder's tests need the extra."""
    for package in ("coremltools", "sklearn"):
        pytest.importorskip(package, reason=f"{package} is not installed: {INSTALL}")


@pytest.fixture(scope="session")
def coreml_folder(once: Callable) -> Path:
    """A model folder with an evolved UNet of two levels and a decoder of one doubling. Read only."""
    return once("coreml-folder", lambda root: make_folder(root / "model")) / "model"


@pytest.fixture(scope="session")
def coreml_bundle(coreml_folder: Path, once: Callable) -> Path:
    """Its bundle for iOS 17. Read only."""
    from pocketfusion.mobile.export import export

    return once("coreml-bundle", lambda root: export(coreml_folder, root / "b", target="coreml", gate_steps=1)) / "b"


@pytest.fixture(scope="session")
def apple_bundle(once: Callable) -> tuple[Path, Path]:
    """Folder and bundle of a model with CLIP's text encoder in Apple's layout, its UNet in two chunks. Read only."""
    root = once("coreml-apple", _make_apple)
    return root / "model", root / "b"


def _make_apple(root: Path) -> None:
    from pocketfusion.mobile.coreml import core_ml
    from pocketfusion.mobile.export import export

    make_folder(root / "model", clip=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core_ml, "CHUNK_ABOVE", 1000)
        export(root / "model", root / "b", target="coreml", layout="apple", gate_steps=1)


def make_folder(path: Path, clip: bool = False) -> Path:
    """Random weights; latents 8x8, pictures 16x16. With `clip` a stock UNet and the files that SD-1.5's folder has."""
    import shutil

    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel

    from guided import small_unet
    from pocketfusion.models.elastic.architecture import Architecture
    from pocketfusion.models.elastic_unet import ElasticUNet
    from tiny import tiny_pipeline
    from tiny_clip import clip_tokenizer, text_config

    pipeline = tiny_pipeline()
    torch.manual_seed(5)
    unet = small_unet()
    if clip:
        pipeline.register_modules(text_encoder=CLIPTextModel(text_config(32)).eval(), tokenizer=clip_tokenizer())
    else:
        config = {key: value for key, value in unet.config.items() if not key.startswith("_")}
        evolved = Architecture.stock(config).remove("down_blocks.0.attentions.0").duplicate("up_blocks.1.resnets.0")
        unet = ElasticUNet(**config, architecture=evolved.model_dump(mode="json")).eval()
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.7,
    )
    pipeline.register_modules(unet=unet, vae=vae)
    shutil.rmtree(path, ignore_errors=True)
    pipeline.save_pretrained(path, safe_serialization=True)
    return path


@pytest.fixture
def convert() -> Callable:
    """`coreml.program.convert` of a module that needs no rewrite, for iOS 17 in fp16 unless it is said otherwise."""
    from pocketfusion.mobile.coreml.program import convert
    from pocketfusion.mobile.devices import TARGETS

    return lambda module, samples, path, **more: convert(module, samples, path, TARGETS["coreml"], **more)
