"""The elastic UNet against stock diffusers: whole, with each block removed or skipped, and with blocks copied."""

from __future__ import annotations

import random

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from unets import NO_MID, ONE_LAYER, SD1, SD2, TWO_STAGES, block_names, inputs, run, stock_unet, zeroed

from pocketfusion.errors import PocketfusionError
from pocketfusion.models.elastic.architecture import MID, MOST_BLOCKS, Architecture
from pocketfusion.models.elastic.transfer import with_architecture
from pocketfusion.models.elastic_unet import ElasticUNet, as_elastic, as_stock

NAMES = Architecture.stock({**SD1, "mid_block_type": "UNetMidBlock2DCrossAttn"}).names()


@pytest.fixture(scope="module", params=[SD1, SD2], ids=["sd1", "sd2"])
def config(request):
    return request.param


@pytest.fixture(scope="module")
def stock(config):
    return stock_unet(config)


@pytest.fixture(scope="module")
def elastic(stock):
    return as_elastic(stock)


@pytest.fixture(scope="module")
def whole(stock, config):
    return run(stock, inputs(config, mask=True))


@pytest.mark.parametrize("config", [SD1, SD2, NO_MID, ONE_LAYER, TWO_STAGES])
def test_whole_it_is_stock_bit_for_bit(config):
    stock = stock_unet(config)
    elastic = as_elastic(stock)
    for size in ((8, 8), (16, 24), (9, 13), (5, 8)):
        for mask in (False, True):
            given = inputs(config, *size, mask=mask)
            assert torch.equal(run(elastic, given), run(stock, given)), (size, mask)


def test_it_has_the_38_blocks_of_stock(stock, elastic):
    assert sorted(elastic.architecture.names()) == sorted(block_names(stock)) and len(NAMES) == 38
    assert list(stock.state_dict()) != [] and set(stock.state_dict()) == set(elastic.state_dict())
    assert as_stock(elastic).state_dict().keys() == stock.state_dict().keys()


@pytest.mark.parametrize("config", [SD1], ids=["sd1"], indirect=True)  # SD-2.x's: the next test
@pytest.mark.parametrize("name", NAMES)
def test_a_removed_or_skipped_block_is_a_zeroed_branch(stock, elastic, config, whole, name):
    given = inputs(config, mask=True)
    removed = with_architecture(elastic, elastic.architecture.remove(name))
    elastic.skipped = frozenset({name})
    try:
        skipped = run(elastic, given)
    finally:
        elastic.skipped = frozenset()
    with zeroed(stock, [name]):
        expected = run(stock, given)
    assert torch.equal(run(removed, given), expected) and torch.equal(skipped, expected)
    assert not torch.equal(expected, whole)
    assert name not in removed.architecture.names() and len(removed.architecture.names()) == 37
    fewer = sum(p.numel() for p in stock.parameters()) - sum(p.numel() for p in removed.parameters())
    shortcut = getattr(stock.get_submodule(name), "conv_shortcut", None)
    kept = sum(p.numel() for p in shortcut.parameters()) if shortcut is not None else 0
    assert fewer == sum(p.numel() for p in stock.get_submodule(name).parameters()) - kept


@pytest.mark.parametrize("count", [5, 20, 38])
def test_many_blocks_removed_or_skipped(stock, elastic, config, count):
    names = random.Random(count).sample(NAMES, count)
    architecture = elastic.architecture
    for name in names:
        architecture = architecture.remove(name)
    given = inputs(config, 9, 13)
    with zeroed(stock, names):
        expected = run(stock, given)
    assert torch.equal(run(with_architecture(elastic, architecture), given), expected)
    architecture = elastic.architecture
    for name in names[: count // 2]:
        architecture = architecture.remove(name)
    part = with_architecture(elastic, architecture)
    part.skipped = frozenset(names[count // 2 :])  # half removed, half skipped
    assert torch.equal(run(part, given), expected)


@pytest.mark.parametrize("stage", ["down_blocks.0", "down_blocks.3", MID, "up_blocks.0", "up_blocks.2"])
def test_a_stage_without_blocks_or_without_attention(stock, elastic, config, stage):
    inside = [name for name in NAMES if name.startswith(f"{stage}.")]
    for names in (inside, [name for name in inside if "attentions" in name]):
        architecture = elastic.architecture
        for name in names:
            architecture = architecture.remove(name)
        with zeroed(stock, names):
            expected = run(stock, inputs(config))
        assert torch.equal(run(with_architecture(elastic, architecture), inputs(config)), expected)
    assert architecture.count(stage, "attentions") == 0


def test_without_mid_layers(stock, elastic, config):
    without = elastic.architecture.drop_layer(MID, 0).drop_layer(MID, 1)
    names = [name for name in NAMES if name.startswith(MID)]
    with zeroed(stock, names):
        expected = run(stock, inputs(config))
    assert len(names) == 3 and torch.equal(run(with_architecture(elastic, without), inputs(config)), expected)


class Repeated(nn.Module):
    """A stock block that runs several times, its output going in again."""

    def __init__(self, block: nn.Module, times: int):
        super().__init__()
        self.block, self.times = block, times

    def forward(self, x, *args, **kwargs):
        for _ in range(self.times):
            out = self.block(x, *args, **kwargs)
            x = out[0] if isinstance(out, tuple) else out
        return (x,) if isinstance(out, tuple) else x


@pytest.mark.parametrize(
    ("name", "times"), [("up_blocks.1.attentions.2", 3), ("down_blocks.1.resnets.1", 2), ("mid_block.attentions.0", 7)]
)
def test_copies_run_in_turn(stock, elastic, config, name, times):
    architecture = elastic.architecture
    for _ in range(times - 1):
        architecture = architecture.duplicate(name)
    copied = with_architecture(elastic, architecture)
    by_hand = stock_unet(config)
    container, index = by_hand.get_submodule(name.rsplit(".", 1)[0]), int(name.rsplit(".", 1)[1])
    container[index] = Repeated(container[index], times)
    assert torch.equal(run(copied, inputs(config)), run(by_hand, inputs(config)))
    assert len(copied.architecture.names()) == 38 + times - 1


def test_seven_of_everything_runs_and_an_eighth_is_refused(elastic, config):
    architecture = elastic.architecture
    for name in NAMES:
        for _ in range(MOST_BLOCKS - 1):
            architecture = architecture.duplicate(name)
    assert len(architecture.names()) == 7 * 38
    full = with_architecture(elastic, architecture)
    out = run(full, inputs(config))
    assert out.shape == (2, 4, 8, 8) and out.isfinite().all()
    with pytest.raises(PocketfusionError, match=r"mid_block.resnets.1 cannot be copied: its layer has 7"):
        architecture.duplicate("mid_block.resnets.1")


def bk_sdm_tiny(architecture: Architecture) -> Architecture:
    """BK-SDM-Tiny by its paper (arXiv 2305.15798, section 3.1): one layer a down stage, two an up stage, no 1/64."""
    for i in range(3):
        architecture = architecture.drop_layer(f"down_blocks.{i}", 1).drop_layer(f"up_blocks.{i + 1}", 1)
    for stage, layers in (("down_blocks.3", 2), (MID, 2), ("up_blocks.0", 3)):
        for index in range(layers):
            architecture = architecture.drop_layer(stage, index)
    return architecture.drop_sampler("down_blocks.2").drop_sampler("up_blocks.0")


@pytest.mark.parametrize("size", [(8, 8), (9, 13)])
def test_bk_sdm_tiny_is_the_stock_unet_of_its_own_config(stock, elastic, config, size):
    heads = config["attention_head_dim"]
    small = config | {
        "down_block_types": ["CrossAttnDownBlock2D"] * 3,
        "up_block_types": ["CrossAttnUpBlock2D"] * 3,
        "block_out_channels": config["block_out_channels"][:3],
        "attention_head_dim": heads if isinstance(heads, int) else heads[:3],
        "layers_per_block": 1,
        "mid_block_type": None,
    }
    tiny = UNet2DConditionModel(**small).eval()
    weights = {}
    for name in tiny.state_dict():
        source, parts = name, name.split(".")
        if name.startswith("up_blocks"):
            parts[1] = f"{int(parts[1]) + 1}"
            if parts[2] in ("resnets", "attentions"):
                parts[3] = {"0": "0", "1": "2"}[parts[3]]
            source = ".".join(parts)
        weights[name] = stock.state_dict()[source]
    tiny.load_state_dict(weights)
    evolved = with_architecture(elastic, bk_sdm_tiny(elastic.architecture))
    assert torch.equal(run(evolved, inputs(config, *size)), run(tiny, inputs(config, *size)))
    assert sum(p.numel() for p in evolved.parameters()) == sum(p.numel() for p in tiny.parameters())


@pytest.mark.parametrize("skipped", [frozenset(), frozenset({"down_blocks.1.attentions.0", "up_blocks.2.resnets.1"})])
def test_gradient_checkpointing_changes_no_gradient(stock, skipped):
    given, gradients, calls = inputs(SD1), [], []
    for checkpointing in (False, True):
        unet = as_elastic(stock).train()
        unet.skipped = skipped
        if checkpointing:
            unet.enable_gradient_checkpointing()
        seen: list[int] = []
        for name in ("down_blocks.1.resnets.0", "up_blocks.1.resnets.2", "mid_block.resnets.0"):
            unet.block(name).register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        unet(**given).sample.square().mean().backward()
        gradients.append({name: p.grad for name, p in unet.named_parameters()})
        calls.append(len(seen))
    assert calls == [3, 6]  # each block runs once more in the backward pass
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        other = gradients[1][name]
        assert (
            (gradient is None)
            == (other is None)
            == any(name.startswith(f"{s}.") and "shortcut" not in name for s in skipped)
        ), name
        assert gradient is None or torch.equal(gradient, other), name


def test_gradients_are_stocks(stock, elastic):
    given = inputs(SD1)
    for unet in (stock, elastic):
        unet.zero_grad()
        unet(**given).sample.square().mean().backward()
    theirs = dict(stock.named_parameters())
    for name, parameter in elastic.named_parameters():
        assert torch.equal(parameter.grad, theirs[name].grad), name
    stock.zero_grad()
    elastic.zero_grad()


def test_a_block_that_is_not_there_is_named(elastic):
    with pytest.raises(PocketfusionError, match=r"no block up_blocks.0.attentions.0"):
        elastic.block("up_blocks.0.attentions.0")
    with pytest.raises(PocketfusionError, match="names no block"):
        elastic.architecture.remove("up_blocks.0")


def test_an_elastic_unet_without_architecture_is_the_stock_one():
    torch.manual_seed(0)
    unet = ElasticUNet(**TWO_STAGES).eval()
    assert torch.equal(run(as_stock(unet), inputs(TWO_STAGES)), run(unet, inputs(TWO_STAGES)))
    assert type(as_stock(unet)) is UNet2DConditionModel
