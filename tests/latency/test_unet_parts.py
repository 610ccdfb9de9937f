"""The parts are the network: run in sequence they give its output, and their sizes add up to its."""

from __future__ import annotations

import pytest
import torch

from pocketfusion.latency.part_modules import (
    meta_unet,
    part_module,
    part_samples,
    unet_module,
    unet_samples,
    with_random_weights,
)
from pocketfusion.latency.profiling import distinct_parts
from pocketfusion.latency.target import validation_architectures
from pocketfusion.latency.unet_parts import Part, action_architectures, list_parts, stage_names
from pocketfusion.mobile.pipeline_specs import multiply_adds
from pocketfusion.mobile.wrappers import nchw, nhwc
from pocketfusion.models.elastic.architecture import FEED_FORWARD_SHARES, Architecture, BlockName
from pocketfusion.models.elastic_unet import ElasticUNet
from pocketfusion.models.sd_configs import CONFIGS
from tiny import MAX_LENGTH, tiny_pipeline

CONFIG = {k: v for k, v in tiny_pipeline().unet.config.items() if not k.startswith("_")}
BASE = Architecture.stock(CONFIG)
MIXED = (
    BASE.remove("down_blocks.0.attentions.0")
    .remove("down_blocks.1.resnets.0")
    .remove("down_blocks.2.resnets.0")
    .remove("up_blocks.0.resnets.1")
    .duplicate("up_blocks.1.attentions.1")
    .duplicate("up_blocks.2.resnets.0")
    .duplicate("down_blocks.1.resnets.1")
    .without_self_attention("mid_block.attentions.0")
    .narrow_feed_forward("up_blocks.3.attentions.0", 0.5)
)
ARCHITECTURES = {"base": BASE, "mixed": MIXED, **validation_architectures(CONFIG, 8)}


def random_unet(config: dict, architecture: Architecture) -> ElasticUNet:
    torch.manual_seed(0)
    return ElasticUNet(**config, architecture=architecture.model_dump(mode="json")).eval()


def run_parts(unet: ElasticUNet, architecture: Architecture, sample: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """The parts alone, one after the other, skips handed on as the UNet's papers draw them. NCHW in and out."""
    queue = list_parts(CONFIG, architecture, MAX_LENGTH)
    x, temb = nhwc(sample), torch.empty(0)

    def run(skip: torch.Tensor | None = None) -> None:
        nonlocal x, temb
        part = queue.pop(0)
        module, arguments = part_module(unet, part), {"x": x}
        if part.kind == "time":
            temb = module(torch.full((len(sample),), 500.0))["temb"]
            return
        assert x.shape[1:] == (*part.sizes[0], part.channels[0])
        if part.kind == "resnet":
            arguments["temb"] = temb
        if part.kind == "attention":
            arguments["encoder_hidden_states"] = text
        if part.skip:
            assert skip is not None and skip.shape[-1] == part.skip
            arguments["skip"] = skip
        x = module(**arguments)["y"]
        assert x.shape[1:] == (*part.sizes[1], part.channels[1])

    def in_layer(part: Part, stage: str, index: int) -> bool:
        blocks = ("resnet", "shortcut", "attention")
        return part.stage == stage and part.kind in blocks and BlockName.parse(part.name).index == index

    run()
    skips = [x]
    run()
    for name, stage in architecture.stages.items():
        for layer in stage.layers:
            skip = skips.pop() if name.startswith("up") else None
            while in_layer(queue[0], name, layer.index):
                run(skip)
            if name.startswith("down"):
                skips.append(x)
        if stage.sampler:
            run()
            if name.startswith("down"):
                skips.append(x)
    run()
    assert not queue and not skips
    return nchw(x)


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_parts_in_sequence_are_the_network(name: str) -> None:
    unet = random_unet(CONFIG, ARCHITECTURES[name])
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, MAX_LENGTH, CONFIG["cross_attention_dim"], generator=generator)
    expected = unet(sample, torch.full((2,), 500.0), text).sample
    torch.testing.assert_close(run_parts(unet, ARCHITECTURES[name], sample, text), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parameters_and_macs_add_up(name: str) -> None:
    architecture = ARCHITECTURES[name]
    parts = list_parts(CONFIG, architecture, MAX_LENGTH)
    unet = meta_unet(CONFIG, architecture)
    modules = [part_module(unet, part) for part in parts]
    assert sum(p.numel() for m in modules for p in m.parameters()) == sum(p.numel() for p in unet.parameters())
    macs = 0
    for part, module in zip(parts, modules, strict=True):
        samples = part_samples(CONFIG, part, MAX_LENGTH, 1)
        macs += multiply_adds(module, {key: value.to("meta") for key, value in samples.items()})
    whole = {key: value.to("meta") for key, value in unet_samples(CONFIG, MAX_LENGTH, 1).items()}
    assert macs == multiply_adds(unet_module(CONFIG, architecture), whole)


def test_stored_parts_cover_every_action() -> None:
    """Any block removed, copied (also twice), thinned, and any of these after another: no key is missing."""
    known = set(distinct_parts(CONFIG, action_architectures(CONFIG), MAX_LENGTH))
    for architecture in ARCHITECTURES.values():
        assert {part.key for part in list_parts(CONFIG, architecture, MAX_LENGTH)} <= known
    for name in BASE.names():
        for changed in (BASE.remove(name), BASE.duplicate(name), BASE.duplicate(name).remove(name)):
            assert {part.key for part in list_parts(CONFIG, changed, MAX_LENGTH)} <= known
        if ".attentions." in name:
            for share in FEED_FORWARD_SHARES:
                thin = BASE.narrow_feed_forward(name, share).without_self_attention(name).duplicate(name)
                assert {part.key for part in list_parts(CONFIG, thin, MAX_LENGTH)} <= known


def test_equal_keys_have_equal_shapes() -> None:
    """A key says all that a part's cost depends on: parts that share one have the same parameters and inputs."""
    seen: dict[str, tuple] = {}
    for architecture in action_architectures(CONFIG):
        unet = meta_unet(CONFIG, architecture)
        for part in list_parts(CONFIG, architecture, MAX_LENGTH):
            shapes = sorted((name, tuple(p.shape)) for name, p in part_module(unet, part).named_parameters())
            inputs = {name: tuple(x.shape) for name, x in part_samples(CONFIG, part, MAX_LENGTH, 2).items()}
            assert seen.setdefault(part.key, (shapes, inputs)) == (shapes, inputs)
    assert len(seen) < len(list_parts(CONFIG, BASE, MAX_LENGTH)) * 2  # shared, not one a block


def test_shortcut_keeps_the_concatenation() -> None:
    (part,) = [p for p in list_parts(CONFIG, BASE.remove("up_blocks.1.resnets.0"), MAX_LENGTH) if p.kind == "shortcut"]
    assert (part.name, part.channels, part.skip) == ("up_blocks.1.resnets.0", (32, 32), 32)
    module = with_random_weights(part_module(meta_unet(CONFIG, BASE.remove(part.name)), part))
    assert module(**part_samples(CONFIG, part, MAX_LENGTH, 2))["y"].shape == (2, 2, 2, 32)
    assert sum(p.numel() for p in module.parameters()) == (32 + 32) * 32 + 32


def test_odd_sizes() -> None:
    """7 latents halve to 4, 2, 1 and come back as 2, 4, 7."""
    config = {**CONFIG, "sample_size": 7}
    parts = list_parts(config, BASE, MAX_LENGTH)
    sizes = [part.sizes[1][0] for part in parts if part.kind in ("downsample", "upsample")]
    assert sizes == [4, 2, 1, 2, 4, 7]
    unet = meta_unet(config, BASE)
    up = [part for part in parts if part.kind == "upsample"][-1]
    module = with_random_weights(part_module(unet, up))
    assert module(**part_samples(config, up, MAX_LENGTH, 1))["y"].shape[1:3] == (7, 7)


def test_stage_names_are_the_papers() -> None:
    names = stage_names(CONFIG)
    assert list(dict.fromkeys(names.values())) == ["Down-1", "Down-2", "Down-3", "Mid", "Up-1", "Up-2", "Up-3"]
    assert [name for name, stage in names.items() if stage == "Mid"] == ["down_blocks.3", "mid_block", "up_blocks.0"]


def test_multiply_adds_of_sd_by_stage() -> None:
    """SD-1.5's 401.6 GMAC by SnapFusion's stages, ResNets and attention: derived apart from this code."""
    config = CONFIGS["sd-1.5"]["unet"] | {"mid_block_type": "UNetMidBlock2DCrossAttn"}
    expected = {
        "Down-1": (15.1, 38.7),
        "Down-2": (13.4, 19.8),
        "Down-3": (13.4, 17.5),
        "Mid": (16.7, 2.3),
        "Up-1": (34.4, 26.3),
        "Up-2": (38.6, 29.7),
        "Up-3": (40.7, 58.1),
    }
    architecture = Architecture.stock(config)
    unet, names = meta_unet(config, architecture), stage_names(config)
    known: dict[str, float] = {}
    found = {stage: [0.0, 0.0] for stage in expected}
    total = 0.0
    for part in list_parts(config, architecture, 77):
        if part.key not in known:
            samples = {key: value.to("meta") for key, value in part_samples(config, part, 77, 1).items()}
            known[part.key] = multiply_adds(part_module(unet, part), samples) / 1e9
        total += known[part.key]
        if part.kind in ("resnet", "attention"):
            found[names[part.stage]][part.kind == "attention"] += known[part.key]
    assert round(total, 1) == 401.6
    assert {stage: tuple(round(value, 1) for value in pair) for stage, pair in found.items()} == expected
