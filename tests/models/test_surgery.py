"""Weights carried from one architecture to another: kept, copied, cut, and what is said when they are gone."""

from __future__ import annotations

import pytest
import torch
from unets import SD1, SD2, inputs, run, stock_unet

from pocketfusion.errors import PocketfusionError
from pocketfusion.models.elastic.transfer import with_architecture
from pocketfusion.models.elastic_unet import as_elastic

CHANGES = ["up_blocks.2.resnets.0", "up_blocks.3.resnets.0", "down_blocks.1.resnets.0"]  # of channels, as copies


@pytest.fixture(scope="module", params=[SD1, SD2], ids=["sd1", "sd2"])
def stock(request):
    return stock_unet(request.param)


@pytest.fixture(scope="module")
def elastic(stock):
    return as_elastic(stock)


def of_block(unet, name: str) -> dict[str, torch.Tensor]:
    return unet.block(name).state_dict()


def test_kept_weights_are_equal_and_the_source_is_untouched(elastic):
    before = {name: value.clone() for name, value in elastic.state_dict().items()}
    architecture = elastic.architecture.remove("mid_block.attentions.0").duplicate("up_blocks.2.attentions.1")
    evolved = with_architecture(elastic, architecture)
    kept = set(before) & set(evolved.state_dict())
    assert len(kept) == len([name for name in before if not name.startswith("mid_block.attentions")])
    for name in kept:
        assert torch.equal(evolved.state_dict()[name], before[name]), name
    with torch.no_grad():
        for parameter in evolved.parameters():
            parameter.zero_()
    for name, value in elastic.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert "up_blocks.2.attentions.1_1" not in elastic.architecture.names()


@pytest.mark.parametrize(
    "name", ["up_blocks.1.attentions.0", "mid_block.resnets.1", "up_blocks.0.resnets.1", "up_blocks.3.resnets.2"]
)
def test_a_copy_begins_with_its_source(elastic, name):
    evolved = with_architecture(elastic, elastic.architecture.duplicate(name).duplicate(name))
    source = of_block(elastic, name)
    for copy in (f"{name}_1", f"{name}_2"):
        values = of_block(evolved, copy)
        assert values.keys() == source.keys() and all(torch.equal(values[key], source[key]) for key in source)
    assert evolved.block(f"{name}_1") is not evolved.block(f"{name}_2")


@pytest.mark.parametrize("name", CHANGES)
def test_a_copy_of_a_resnet_that_changes_channels_begins_as_the_identity(stock, elastic, name):
    given = inputs(SD1, 9, 13)
    evolved = with_architecture(elastic, elastic.architecture.duplicate(name))
    assert torch.equal(run(evolved, given), run(stock, given))
    wide, narrow = elastic.block(name).conv1.weight.shape, evolved.block(f"{name}_1").conv1.weight.shape
    assert wide != narrow and wide[0] == narrow[0]
    evolved(**given).sample.square().mean().backward()  # and can be trained away from it
    assert evolved.block(f"{name}_1").conv2.weight.grad.abs().max() > 0


def test_without_self_attention_it_is_stock_with_that_branch_zeroed(stock, elastic):
    names = ["down_blocks.0.attentions.1", "mid_block.attentions.0", "up_blocks.3.attentions.0"]
    architecture, by_hand = elastic.architecture, as_elastic(stock)
    for name in names:
        architecture = architecture.without_self_attention(name)
        for parameter in by_hand.block(name).transformer_blocks[0].attn1.to_out[0].parameters():
            parameter.data.zero_()
    evolved = with_architecture(elastic, architecture)
    given = inputs(SD1, mask=True)
    assert torch.equal(run(evolved, given), run(by_hand, given))
    assert not torch.equal(run(evolved, given), run(stock, given))
    assert not any(f"{name}.transformer_blocks.0.attn1" in key for name in names for key in evolved.state_dict())


@pytest.mark.parametrize("share", [0.5, 0.25])
def test_a_narrow_feed_forward_is_stock_with_its_weakest_channels_zeroed(elastic, share):
    name, full = "up_blocks.2.attentions.1", elastic.double()
    try:
        evolved = with_architecture(full, full.architecture.narrow_feed_forward(name, share))
        by_hand = with_architecture(full, full.architecture)
    finally:
        elastic.float()
    forward = by_hand.block(name).transformer_blocks[0].ff
    gate, out = forward.net[0].proj.weight, forward.net[2].weight
    width = out.shape[1]
    with torch.no_grad():
        strength = [float(gate[i].norm() * gate[width + i].norm() * out[:, i].norm()) for i in range(width)]
    weakest = sorted(range(width), key=lambda i: strength[i])[: width - int(width * share)]
    out.data[:, weakest] = 0
    kept = evolved.block(name).transformer_blocks[0].ff
    assert kept.net[2].in_features == width * share and kept.net[0].proj.out_features == 2 * width * share
    given = {key: value.double() if value.is_floating_point() else value for key, value in inputs(SD1).items()}
    torch.testing.assert_close(run(evolved, given), run(by_hand, given), rtol=0, atol=1e-12)
    assert (run(evolved, given) - run(full.double(), given)).abs().max() > 1e-6
    elastic.float()


def test_narrowing_twice_is_narrowing_once(elastic):
    name = "up_blocks.2.attentions.1"
    half = with_architecture(elastic, elastic.architecture.narrow_feed_forward(name, 0.5))
    quarter = with_architecture(half, half.architecture.narrow_feed_forward(name, 0.25))
    at_once = with_architecture(elastic, elastic.architecture.narrow_feed_forward(name, 0.25))
    for key, value in of_block(at_once, name).items():
        assert torch.equal(of_block(quarter, name)[key], value), key


def test_a_copy_of_a_thinned_block_is_thin(elastic):
    name = "up_blocks.2.attentions.1"
    architecture = elastic.architecture.narrow_feed_forward(name, 0.5).without_self_attention(name).duplicate(name)
    source = with_architecture(elastic, architecture)
    assert of_block(source, f"{name}_1").keys() == of_block(source, name).keys()
    assert all(torch.equal(of_block(source, f"{name}_1")[k], v) for k, v in of_block(source, name).items())


def test_weights_that_are_gone_cannot_come_back(elastic):
    base = elastic.architecture
    name = "down_blocks.1.attentions.0"
    removed = with_architecture(elastic, base.remove(name))
    with pytest.raises(PocketfusionError, match=f"{name} is no longer in this UNet: begin from the base"):
        with_architecture(removed, base)
    thinned = with_architecture(elastic, base.without_self_attention(name))
    with pytest.raises(PocketfusionError, match=rf"{name}.*(norm1|attn1).*no longer in this UNet"):
        with_architecture(thinned, base)
    narrowed = with_architecture(elastic, base.narrow_feed_forward(name, 0.5))
    with pytest.raises(PocketfusionError, match=rf"{name}.*no longer in this UNet"):
        with_architecture(narrowed, base)


def test_a_resnet_has_no_attention_to_thin(elastic):
    with pytest.raises(PocketfusionError, match="mid_block.resnets.0 is a ResNet"):
        elastic.architecture.without_self_attention("mid_block.resnets.0")
    with pytest.raises(PocketfusionError, match="mid_block.resnets.0 is a ResNet"):
        elastic.architecture.narrow_feed_forward("mid_block.resnets.0", 0.5)


def test_what_a_copy_adds_is_the_same_whenever_it_is_made(elastic):
    architecture = elastic.architecture.duplicate(CHANGES[0])
    one = of_block(with_architecture(elastic, architecture), f"{CHANGES[0]}_1")
    torch.manual_seed(5)
    two, after = of_block(with_architecture(elastic, architecture), f"{CHANGES[0]}_1"), torch.rand(1)
    assert all(torch.equal(one[name], two[name]) for name in one)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))  # and no other draw is disturbed
