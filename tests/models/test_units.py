"""Pruned units: sliced networks equal the masked ones, live as configs and files do, and old configs are unchanged."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from unets import SD1, SD2, TWO_STAGES, inputs, run, stock_unet

from pocketfusion.errors import PocketfusionError
from pocketfusion.latency.part_modules import meta_unet, part_module
from pocketfusion.latency.profiling import PartJobs
from pocketfusion.latency.unet_parts import list_parts
from pocketfusion.mobile import gate, wrappers
from pocketfusion.mobile.convert import DEFAULT_SIGNATURE, convert
from pocketfusion.models.elastic.architecture import Architecture, Block
from pocketfusion.models.elastic.transfer import with_architecture, without_units
from pocketfusion.models.elastic.units import block_units
from pocketfusion.models.elastic_unet import ElasticUNet, as_elastic, as_stock
from pocketfusion.models.sd_configs import CONFIGS

RESNET, ATTENTION = "up_blocks.2.resnets.0", "up_blocks.2.attentions.1"  # the ResNet changes channels


@pytest.fixture(scope="module", params=[SD1, SD2], ids=["sd1", "sd2"])
def config(request):
    return request.param


@pytest.fixture(scope="module")
def elastic(config) -> ElasticUNet:
    return as_elastic(stock_unet(config))


def some(unet: ElasticUNet, names: list[str], seed: int = 0) -> dict:
    """About half of the units of every part of the named blocks, at random: kept indices."""
    generator, kept = torch.Generator().manual_seed(seed), {}
    for name in names:
        for units in block_units(unet.block(name)):
            order = torch.randperm(units.count, generator=generator)
            kept[name, units] = order[: max(1, units.count // 2)].sort().values
    return kept


def masked(unet: ElasticUNet, kept: dict) -> ElasticUNet:
    """`unet` with zeros, written by hand, where the removed units are read."""
    copy = with_architecture(unet, unet.architecture)
    with torch.no_grad():
        for (name, units), index in kept.items():
            gone = [i for i in range(units.count) if i not in index.tolist()]
            block = copy.block(name)
            if units.part == "inner_channels":
                size = block.norm2.num_channels // block.norm2.num_groups
                weight = block.conv2.weight
            else:
                inner = block.transformer_blocks[0]
                readers = {"self_heads": "attn1.to_out.0", "cross_heads": "attn2.to_out.0"}
                weight = inner.get_submodule(readers.get(units.part, "ff.net.2")).weight
                size = weight.shape[1] // units.count
            for unit in gone:
                weight[:, unit * size : (unit + 1) * size] = 0
    return copy


@pytest.mark.parametrize("part", ["inner_channels", "self_heads", "cross_heads", "feed_forward_units", "all"])
def test_sliced_equals_masked(elastic, config, part):
    names = elastic.architecture.names()
    kept = {place: index for place, index in some(elastic, names).items() if part in ("all", place[1].part)}
    sliced, by_hand = without_units(elastic, kept), masked(elastic, kept)
    for given in (inputs(config, mask=True), inputs(config, 9, 13)):
        expected = run(by_hand, given)
        torch.testing.assert_close(run(sliced, given), expected, rtol=0, atol=1e-5)
        assert (expected - run(elastic, given)).abs().max() > 1e-3  # what went was doing something
    gone = sum((u.count - len(k)) * u.parameters(elastic.block(n).state_dict()) for (n, u), k in kept.items())
    fewer = sum(p.numel() for p in elastic.parameters()) - sum(p.numel() for p in sliced.parameters())
    assert fewer == gone > 0


@pytest.mark.parametrize("source", ["sd-1.5", "sd-2.1"])
def test_sliced_equals_masked_at_real_widths(source):
    # one layer of 320 channels: a ResNet and a cross-attention block of Stable Diffusion's own sizes
    config = {
        **CONFIGS[source]["unet"],
        "sample_size": 16,
        "down_block_types": ["CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D"],
        "block_out_channels": [320],
        "layers_per_block": 1,
        "mid_block_type": None,
    }
    if source == "sd-2.1":
        config["attention_head_dim"] = [5]
    unet = as_elastic(stock_unet(config))
    names = ["down_blocks.0.resnets.0", "down_blocks.0.attentions.0"]
    counts = {u.part: (u.count, u.size) for name in names for u in block_units(unet.block(name))}
    heads = (8, 40) if source == "sd-1.5" else (5, 64)
    assert counts == {
        "inner_channels": (32, 10),
        "self_heads": heads,
        "cross_heads": heads,
        "feed_forward_units": (1280, 1),
    }
    kept = some(unet, names)
    given = inputs(config, 16, 16)
    torch.testing.assert_close(
        run(without_units(unet, kept), given), run(masked(unet, kept), given), rtol=0, atol=1e-5
    )


def test_pruning_twice_and_pruning_copies(elastic, config):
    architecture = elastic.architecture.duplicate(ATTENTION).duplicate(RESNET).narrow_feed_forward(ATTENTION, 0.5)
    unet = with_architecture(elastic, architecture.without_self_attention("mid_block.attentions.0"))
    names = [RESNET, f"{RESNET}_1", ATTENTION, f"{ATTENTION}_1", "mid_block.attentions.0"]
    once = without_units(unet, first := some(unet, names))
    twice = without_units(once, second := some(once, names, seed=1))
    torch.testing.assert_close(
        run(twice, inputs(config)), run(masked(once, second), inputs(config)), rtol=0, atol=1e-5
    )
    assert sum(p.numel() for p in twice.parameters()) < sum(p.numel() for p in once.parameters())
    torch.testing.assert_close(run(once, inputs(config)), run(masked(unet, first), inputs(config)), rtol=0, atol=1e-5)


def test_copies_of_pruned_blocks_are_pruned(elastic, config):
    pruned = without_units(elastic, some(elastic, [RESNET, ATTENTION]))
    for name in (RESNET, ATTENTION, "up_blocks.1.resnets.1"):
        copied = with_architecture(pruned, pruned.architecture.duplicate(name))
        assert copied.architecture.get(f"{name}_1").inner_channels == pruned.architecture.get(name).inner_channels
        assert run(copied, inputs(config)).isfinite().all()
    # a ResNet that changes channels: its copy begins as the identity
    copied = with_architecture(pruned, pruned.architecture.duplicate(RESNET))
    torch.testing.assert_close(run(copied, inputs(config)), run(pruned, inputs(config)), rtol=0, atol=1e-5)


def test_with_architecture_keeps_the_strongest_units(elastic, config):
    (units,) = block_units(elastic.block(RESNET))
    narrow = elastic.architecture.keep_units(RESNET, "inner_channels", 3 * units.size)
    block = elastic.block(RESNET)
    strength = [
        float(
            (block.conv1.weight[at].norm() * block.norm2.weight[at].norm() * block.conv2.weight[:, at].norm()).detach()
        )
        for at in (slice(i * units.size, (i + 1) * units.size) for i in range(units.count))
    ]
    strongest = torch.tensor(sorted(sorted(range(units.count), key=lambda i: -strength[i])[:3]))
    expected = without_units(elastic, {(RESNET, units): strongest})
    assert torch.equal(run(with_architecture(elastic, narrow), inputs(config)), run(expected, inputs(config)))


def test_saved_and_loaded(elastic, config, tmp_path):
    pruned = without_units(elastic, some(elastic, elastic.architecture.names()))
    pruned.save_pretrained(tmp_path)
    loaded = ElasticUNet.from_pretrained(tmp_path, use_safetensors=True)
    assert loaded.architecture == pruned.architecture and as_stock(loaded) is loaded
    torch.testing.assert_close(run(loaded, inputs(config)), run(pruned, inputs(config)), rtol=0, atol=1e-5)


def test_made_from_its_config_alone_it_has_sound_weights(elastic, config):
    pruned = without_units(elastic, some(elastic, elastic.architecture.names()))
    torch.manual_seed(0)
    fresh = ElasticUNet.from_config(pruned.config).eval()
    assert {n: p.shape for n, p in fresh.named_parameters()} == {n: p.shape for n, p in pruned.named_parameters()}
    assert run(fresh, inputs(config)).abs().max() < 100


def test_configs_without_pruning_are_as_they_were():
    assert Block().model_dump(mode="json") == {"number": 0, "self_attention": True, "feed_forward": 1.0}
    stock = Architecture.stock(SD1 | {"mid_block_type": "UNetMidBlock2DCrossAttn"})
    assert json.loads(stock.model_dump_json()) == stock.model_dump(mode="json")
    assert "heads" not in stock.model_dump_json() and "inner" not in stock.model_dump_json()
    before = {"number": 0, "self_attention": False, "feed_forward": 0.5}  # as evolved folders of today hold it
    assert Block.model_validate(before).model_dump(mode="json") == before
    pruned = Block(cross_heads=3)
    assert pruned.model_dump(mode="json") == Block().model_dump(mode="json") | {"cross_heads": 3}
    assert Block.model_validate_json(pruned.model_dump_json()) == pruned


def test_impossible_widths_are_refused(elastic, config):
    base = elastic.architecture
    for name, part, count in (
        (RESNET, "inner_channels", 1000),
        (RESNET, "inner_channels", 7),
        (ATTENTION, "self_heads", 99),
        (ATTENTION, "feed_forward_units", 4097),
    ):
        with pytest.raises(PocketfusionError, match=rf"keeps {count} .* of a block that has \d+: give a multiple of"):
            with_architecture(elastic, base.keep_units(name, part, count))
    with pytest.raises(PocketfusionError, match="mid_block.resnets.0 has no self heads to prune"):
        base.keep_units("mid_block.resnets.0", "self_heads", 1)
    pruned = without_units(elastic, some(elastic, [RESNET]))
    with pytest.raises(PocketfusionError, match="no longer in this UNet"):
        with_architecture(pruned, base)


def test_exported_it_computes_what_pytorch_does(tmp_path):
    config = TWO_STAGES | {"layers_per_block": 1}
    unet = as_elastic(stock_unet(config))
    pruned = without_units(unet, some(unet, unet.architecture.names()))
    given = inputs(config) | {"timestep": torch.tensor([37.0, 801.0])}
    nhwc = given | {"sample": given["sample"].permute(0, 2, 3, 1).contiguous()}
    convert(wrappers.UNet(pruned), nhwc, tmp_path / "unet.tflite")
    arrays = {name: value.numpy() for name, value in nhwc.items()}
    (measured,) = gate.run(tmp_path / "unet.tflite", [arrays], "noise_pred", DEFAULT_SIGNATURE)
    assert gate.sqnr(run(pruned, given).permute(0, 2, 3, 1).numpy(), measured) >= 60


def test_the_latency_table_knows_pruned_parts(elastic, config):
    pruned = without_units(elastic, some(elastic, [RESNET, ATTENTION]))
    before, after = (
        {part.name: part for part in list_parts(pruned.config, architecture, 6)}
        for architecture in (elastic.architecture, pruned.architecture)
    )
    assert {name for name, part in after.items() if part.key != before[name].key} == {RESNET, ATTENTION}
    for name in (RESNET, ATTENTION):
        module = part_module(meta_unet(pruned.config, pruned.architecture), after[name])
        made, wanted = (sum(p.numel() for p in m.parameters()) for m in (module, pruned.block(name)))
        assert made == wanted < sum(p.numel() for p in elastic.block(name).parameters())
    target = SimpleNamespace(config=pruned.config, architecture=pruned.architecture, text_length=6)
    assert after[RESNET].key in PartJobs(target, base_only=False).parts
    assert after[RESNET].key not in PartJobs(target, base_only=True).parts
