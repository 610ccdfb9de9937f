"""Evolved UNets as others meet them: saved and loaded, in pipelines and folders, exported, with LoRA adapters."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from unets import SD1, SD2, TWO_STAGES, block_names, inputs, run, stock_unet, zeroed

from pocketfusion.info import describe_model_folder
from pocketfusion.mobile import gate, wrappers
from pocketfusion.mobile.convert import DEFAULT_SIGNATURE, convert
from pocketfusion.models.elastic.architecture import MID, Architecture
from pocketfusion.models.elastic.presets import snapfusion
from pocketfusion.models.elastic.transfer import with_architecture
from pocketfusion.models.elastic_unet import ElasticUNet, as_elastic, load_elastic
from pocketfusion.models.loading import load_pipeline
from pocketfusion.models.writing import copy_with_unet


def mixed(architecture: Architecture) -> Architecture:
    """One of everything: blocks removed, copied and thinned, mid gone, a layer dropped with its partner."""
    architecture = architecture.remove("down_blocks.0.attentions.0").remove("up_blocks.2.resnets.0")
    architecture = architecture.duplicate("up_blocks.1.attentions.2").duplicate("up_blocks.3.resnets.0")
    architecture = architecture.without_self_attention("up_blocks.3.attentions.1")
    architecture = architecture.narrow_feed_forward("down_blocks.2.attentions.0", 0.5)
    architecture = architecture.drop_layer(MID, 0).drop_layer(MID, 1)
    return architecture.drop_layer("down_blocks.2", 1).drop_layer("up_blocks.1", 0)


def innermost_dropped(architecture: Architecture) -> Architecture:
    """No stage at 1/64, and no sampler to it."""
    for stage, layers in (("down_blocks.3", 2), (MID, 2), ("up_blocks.0", 3)):
        for index in range(layers):
            architecture = architecture.drop_layer(stage, index)
    return architecture.drop_sampler("down_blocks.2").drop_sampler("up_blocks.0")


def nothing_left(architecture: Architecture) -> Architecture:
    for name in architecture.names():
        architecture = architecture.remove(name)
    return architecture


EVOLVED = [mixed, innermost_dropped, nothing_left, snapfusion, lambda architecture: architecture]
IDS = ["mixed", "innermost dropped", "nothing left", "snapfusion", "stock"]


def evolved_from(elastic: ElasticUNet, change) -> ElasticUNet:
    return with_architecture(elastic, change(elastic.config if change is snapfusion else elastic.architecture))


def aligned(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """With its weights copied: a memory-mapped file's lie at odd addresses, where sums round another way."""
    for parameter in unet.parameters():
        parameter.data = parameter.data.clone()
    return unet


@pytest.mark.parametrize("config", [SD1, SD2], ids=["sd1", "sd2"])
@pytest.mark.parametrize("change", EVOLVED, ids=IDS)
def test_save_and_load(change, config, tmp_path):
    evolved = evolved_from(as_elastic(stock_unet(config)), change)
    evolved.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "ElasticUNet"
    loaded = aligned(ElasticUNet.from_pretrained(tmp_path, use_safetensors=True))
    assert loaded.architecture == evolved.architecture
    given = inputs(config, 9, 13, mask=True)
    assert torch.equal(run(loaded, given), run(evolved, given))


@pytest.fixture(scope="module")
def pipeline(tiny_folder) -> StableDiffusionPipeline:
    return load_pipeline(tiny_folder)


@pytest.fixture(scope="module")
def evolved(pipeline) -> ElasticUNet:
    return evolved_from(as_elastic(pipeline.unet), mixed)


def draw(pipeline: StableDiffusionPipeline) -> np.ndarray:
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    return pipeline("a red apple", num_inference_steps=3, latents=latents, output_type="np").images


def test_inside_a_pipeline_folder(pipeline, evolved, tmp_path):
    parts = {name: part for name, part in pipeline.components.items() if name != "unet"}
    changed = StableDiffusionPipeline(unet=evolved, **parts, requires_safety_checker=False)
    changed.set_progress_bar_config(disable=True)
    changed.save_pretrained(tmp_path / "saved")
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "saved", use_safetensors=True)
    again.set_progress_bar_config(disable=True)
    assert type(again.unet) is ElasticUNet and again.unet.architecture == evolved.architecture
    aligned(again.unet)
    assert np.abs(draw(again) - draw(changed)).max() < 1e-5  # text encoder and vae are memory-mapped, too
    assert np.abs(draw(again) - draw(pipeline)).max() > 1e-4


def test_a_written_folder_loads_in_a_process_of_its_own(tiny_folder, evolved, tmp_path):
    out = tmp_path / "evolved"
    out.mkdir()
    copy_with_unet(tiny_folder, out, evolved, dtype=torch.float32)
    loaded = aligned(load_pipeline(out).unet)
    assert torch.equal(run(loaded, GIVEN), run(evolved, GIVEN))
    assert load_elastic(out).architecture == loaded.architecture == evolved.architecture
    described = describe_model_folder(out)  # counts the evolved network's multiply-adds, not the stock one's
    assert described["networks"]["unet"]["class"] == "ElasticUNet"
    assert described["multiply_adds"]["unet"] < describe_model_folder(tiny_folder)["multiply_adds"]["unet"]
    alone = "import sys, pathlib; from pocketfusion.models.loading import load_pipeline; "
    alone += "print(type(load_pipeline(pathlib.Path(sys.argv[1])).unet).__name__)"  # nothing else imports the class
    done = subprocess.run([sys.executable, "-c", alone, str(out)], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "ElasticUNet", done.stderr


GIVEN = inputs(SD1 | {"cross_attention_dim": 32})


def small(architecture: Architecture) -> Architecture:
    """On two stages of one layer: removed, copied (with other channels, too), thinned."""
    architecture = architecture.remove("down_blocks.0.attentions.0").remove("up_blocks.0.resnets.1")
    architecture = architecture.duplicate("up_blocks.1.attentions.0").remove(f"{MID}.resnets.0")
    architecture = architecture.duplicate("up_blocks.1.resnets.0").narrow_feed_forward(f"{MID}.attentions.0", 0.5)
    return architecture.without_self_attention("up_blocks.1.attentions.1")


def dropped(architecture: Architecture) -> Architecture:
    """On two stages of two layers: a layer dropped with its partner, mid empty, one cross-attention block left."""
    architecture = architecture.drop_layer("down_blocks.1", 1).drop_layer("up_blocks.0", 0)
    for name in architecture.names():
        if name != "up_blocks.1.attentions.0" and ("attentions" in name or name.startswith(MID)):
            architecture = architecture.remove(name)
    return architecture


@pytest.mark.parametrize(("config", "change"), [(TWO_STAGES | {"layers_per_block": 1}, small), (TWO_STAGES, dropped)])
def test_exported_it_computes_what_pytorch_does(config, change, tmp_path: Path):
    evolved = evolved_from(as_elastic(stock_unet(config)), change)
    given = inputs(config) | {"timestep": torch.tensor([37.0, 801.0])}
    nhwc = given | {"sample": given["sample"].permute(0, 2, 3, 1).contiguous()}
    convert(wrappers.UNet(evolved), nhwc, tmp_path / "unet.tflite")
    arrays = {name: value.numpy() for name, value in nhwc.items()}
    (measured,) = gate.run(tmp_path / "unet.tflite", [arrays], "noise_pred", DEFAULT_SIGNATURE)
    expected = run(evolved, given).permute(0, 2, 3, 1).numpy()
    assert gate.sqnr(expected, measured) >= 60


REMOVED = [
    "down_blocks.0.attentions.0",
    "down_blocks.1.resnets.0",
    "mid_block.attentions.0",
    "mid_block.resnets.1",
    "up_blocks.1.attentions.2",
    "up_blocks.3.resnets.0",
]
TARGETS = [
    "to_q",
    "to_v",
    "to_out.0",
    "proj_in",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "time_emb_proj",
    "conv_shortcut",
]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> tuple[UNet2DConditionModel, Path]:
    """A stock UNet with a LoRA adapter that does something, and where it is saved."""
    from peft import LoraConfig

    base = stock_unet(SD1)
    base.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=TARGETS))
    torch.manual_seed(4)
    for name, parameter in base.named_parameters():
        if "lora_B" in name:  # zero at first
            torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("lora")
    base.save_lora_adapter(folder)
    return base, folder


@pytest.mark.parametrize("scale", [None, 0.5])
def test_a_bases_lora_applies_to_what_remains(adapter, scale):
    base, folder = adapter
    given = inputs(SD1) | ({} if scale is None else {"cross_attention_kwargs": {"scale": scale}})
    plain = as_elastic(stock_unet(SD1))
    architecture = plain.architecture
    for name in REMOVED:
        architecture = architecture.remove(name)
    evolved = with_architecture(plain, architecture)
    before = run(evolved, inputs(SD1))
    evolved.load_lora_adapter(folder, prefix=None, use_safetensors=True)
    with zeroed(base, REMOVED):
        expected = run(base, given)
    assert torch.equal(run(evolved, given), expected)
    assert (expected - before).abs().max() > 1e-2
    assert len(block_names(base)) == 38 == len(architecture.names()) + len(REMOVED)


def test_a_lora_leaves_copies_alone(adapter):
    _, folder = adapter
    plain = as_elastic(stock_unet(SD1))
    evolved = with_architecture(plain, plain.architecture.duplicate("up_blocks.1.attentions.0"))
    evolved.load_lora_adapter(folder, prefix=None, use_safetensors=True)
    adapted = {name.split(".lora_")[0] for name, _ in evolved.named_parameters() if ".lora_" in name}
    assert any(name.startswith("up_blocks.1.attentions.0.") for name in adapted)
    assert not any(name.startswith("up_blocks.1.attentions.0_1") for name in adapted)


def test_a_pipeline_loads_a_bases_lora_into_an_evolved_unet(pipeline, tmp_path):
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig, get_peft_model_state_dict

    base = as_elastic(pipeline.unet)
    base.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "ff.net.2"]))
    for name, parameter in base.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    weights = convert_state_dict_to_diffusers(get_peft_model_state_dict(base))
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=weights, safe_serialization=True)
    remaining = as_elastic(pipeline.unet)
    remaining = with_architecture(remaining, remaining.architecture.remove("mid_block.attentions.0"))
    parts = {name: part for name, part in pipeline.components.items() if name != "unet"}
    changed = StableDiffusionPipeline(unet=remaining, **parts, requires_safety_checker=False)
    changed.load_lora_weights(tmp_path, use_safetensors=True)
    base.skipped = frozenset({"mid_block.attentions.0"})
    assert torch.equal(run(changed.unet, GIVEN), run(base, GIVEN))
    changed.unload_lora_weights()
    assert not torch.equal(run(changed.unet, GIVEN), run(base, GIVEN))
