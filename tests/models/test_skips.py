"""Architectures whose skips cannot line up are refused with the block and the reason; SD's family alone is taken."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import UNet2DConditionModel
from unets import NO_MID, ONE_LAYER, SD1, TWO_STAGES

from pocketfusion.errors import PocketfusionError
from pocketfusion.models.elastic.architecture import MID, Architecture, Block, Layer, Stage
from pocketfusion.models.elastic.skips import check_architecture, layer_shapes, stock_skips
from pocketfusion.models.elastic_unet import ElasticUNet, as_elastic, check_family, load_elastic

CONFIG = {"mid_block_type": "UNetMidBlock2DCrossAttn"} | SD1
STOCK = Architecture.stock(CONFIG)
A_LAYER = Layer(index=7, resnets=(Block(),))


def with_stage(name: str, **changed) -> Architecture:
    return Architecture(stages={**STOCK.stages, name: STOCK.stages[name].model_copy(update=changed)})


@pytest.mark.parametrize("config", [CONFIG, NO_MID, {**CONFIG, **ONE_LAYER}, {**CONFIG, **TWO_STAGES}])
def test_shapes_are_those_of_the_stock_modules(config):
    unet = UNet2DConditionModel(**config)
    check_architecture(Architecture.stock(unet.config), unet.config)
    skips = stock_skips(unet.config)
    for (stage, index), shape in layer_shapes(unet.config).items():
        if stage == MID and unet.mid_block is None:
            continue
        resnet = unet.get_submodule(f"{stage}.resnets.{index}")
        assert (resnet.in_channels, resnet.out_channels) == (shape.hidden + shape.skip, shape.out), (stage, index)
    assert len(skips) == sum(len(block.resnets) for block in unet.up_blocks)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        (
            STOCK.drop_layer("down_blocks.2", 1),
            r"up_blocks.1 layer 1 takes a skip of 24 channels at 1/4 .* that of down_blocks.1's downsampler, 16 at",
        ),
        (STOCK.drop_layer("up_blocks.3", 2), r"the skip of conv_in is taken by no up layer: drop that layer too"),
        (STOCK.drop_layer("down_blocks.1", 0), r"down_blocks.1 layer 1 takes 16 channels but gets 8: keep the layer"),
        (STOCK.drop_layer("up_blocks.2", 0).drop_layer("down_blocks.1", 1), r"up_blocks.2 layer 1 takes 16 channels"),
        (STOCK.drop_sampler("down_blocks.0"), r"down_blocks.1 layer 0 runs at 1/1 .* in the base at 1/2"),
        (STOCK.drop_sampler("up_blocks.0"), r"up_blocks.1 layer 0 runs at 1/8 .* in the base at 1/4"),
        (with_stage("down_blocks.3", sampler=True), r"down_blocks.3 has no sampler in the base"),
        (with_stage("down_blocks.3", layers=(A_LAYER,)), r"down_blocks.3 layer 7 is not in the base"),
        (
            with_stage(MID, layers=(Layer(index=1, resnets=(Block(),), attentions=(Block(),)),)),
            r"mid_block layer 1 has no cross-attention in the base",
        ),
        (with_stage(MID, layers=(Layer(index=0, resnets=(Block(), Block())),)), r"mid_block layer 0 names one of its"),
        (Architecture(stages={**STOCK.stages, "up_blocks.4": Stage(layers=())}), r"has the stage up_blocks.4"),
        (
            Architecture(stages={k: v for k, v in STOCK.stages.items() if k != MID}),
            r"lacks the stage mid_block: the base has down_blocks.0",
        ),
    ],
)
def test_what_cannot_line_up_is_named(architecture, message):
    with pytest.raises(PocketfusionError, match=message):
        check_architecture(architecture, CONFIG)
    with pytest.raises(PocketfusionError, match=message):
        ElasticUNet(**SD1, architecture=architecture.model_dump())


def test_stages_in_another_order_are_refused():
    shuffled = dict(reversed(STOCK.stages.items()))
    with pytest.raises(PocketfusionError):
        check_architecture(Architecture(stages=shuffled), CONFIG)


def test_a_layer_dropped_with_its_partner_is_fine():
    check_architecture(STOCK.drop_layer("down_blocks.2", 1).drop_layer("up_blocks.1", 0), CONFIG)
    with pytest.raises(PocketfusionError, match="down_blocks.2 has no layer 1"):
        STOCK.drop_layer("down_blocks.2", 1).drop_layer("down_blocks.2", 1)


XL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 36,
}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (XL, "its addition_embed_type is 'text_time' instead of None; SDXL"),
        ({"transformer_layers_per_block": [1, 2, 4, 4]}, r"its transformer_layers_per_block is \[1, 2, 4, 4\]"),
        ({"class_embed_type": "timestep"}, "its class_embed_type is 'timestep'"),
        ({"num_class_embeds": 10}, "its num_class_embeds is 10"),
        ({"time_embedding_act_fn": "silu"}, "its time_embedding_act_fn is 'silu'"),
        ({"resnet_time_scale_shift": "scale_shift"}, "its resnet_time_scale_shift is 'scale_shift'"),
        ({"mid_block_type": "UNetMidBlock2D"}, "its mid_block_type is 'UNetMidBlock2D'"),
        ({"encoder_hid_dim": 12}, "its encoder_hid_dim_type is 'text_proj'"),
        (
            {"down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["ResnetDownsampleBlock2D"]},
            "its down_block_types holds ResnetDownsampleBlock2D instead of CrossAttnDownBlock2D or DownBlock2D",
        ),
        ({"layers_per_block": [1, 2, 2, 2]}, r"its layers_per_block is \[1, 2, 2, 2\] instead of a number"),
    ],
)
def test_other_families_are_refused_saying_what_differs(changed, message):
    config = SD1 | changed
    with pytest.raises(PocketfusionError, match=message):
        as_elastic(UNet2DConditionModel(**config))
    if "encoder_hid_dim" not in changed:  # diffusers fills in the type when it builds
        with pytest.raises(PocketfusionError, match=message):
            check_family(config)


def test_another_class_is_refused():
    with pytest.raises(PocketfusionError, match="the UNet is a SD3Transformer2DModel: only UNet2DConditionModel"):
        check_family({"_class_name": "SD3Transformer2DModel"})


def test_a_folder_of_another_family_is_refused_by_path(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"addition_embed_type": "text_time"}))
    with pytest.raises(PocketfusionError, match=r"model/unet is not of .* addition_embed_type is 'text_time'"):
        load_elastic(folder)
    with pytest.raises(PocketfusionError, match="nowhere/unet/config.json cannot be read"):
        load_elastic(tmp_path / "nowhere")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"damaged")
    path.write_text((tiny_folder / "unet" / "config.json").read_text())
    with pytest.raises(PocketfusionError, match="model/unet could not be loaded"):
        load_elastic(folder)


def test_heads_of_the_tiny_folder_survive(tiny_folder):
    unet = load_elastic(tiny_folder)
    assert len(unet.architecture.names()) == 38 and unet.dtype == torch.float32
