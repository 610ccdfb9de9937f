"""Pruned decoders: which channels stay, when the result is exact, what it costs, how it is stored."""

import math

import pytest
import torch
from diffusers import AutoencoderKL

from pocketfusion.distill.decoder_pruning import Space, half_shape, prune_decoder, tiny_shape
from pocketfusion.errors import PocketfusionError
from pocketfusion.mobile.pipeline_specs import multiply_adds
from pocketfusion.models.sd_configs import CONFIGS
from pocketfusion.models.slim_autoencoder import DecoderShape, SlimAutoencoderKL, load_vae


def autoencoder(widths, layers=1, groups=4, seed=0):
    """A random autoencoder of factor 2^(stages - 1)."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=layers,
        latent_channels=4,
        norm_num_groups=groups,
    )
    for name, parameter in vae.decoder.named_parameters():
        if "norm" in name:  # the gains of a new network are all equal
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return vae.eval().requires_grad_(False)


def doubled(small, order):
    """An autoencoder of twice `small`'s widths that decodes as it does: each channel twice, only one copy read.

    `order` (0 or 1) is the copy that is read.
    """
    teacher = autoencoder([2 * width for width in small.config.block_out_channels], seed=1)

    def once(weight, axis):
        parts = [torch.zeros_like(weight), torch.zeros_like(weight)]
        parts[order] = weight
        return torch.stack(parts, axis + 1).flatten(axis, axis + 1)

    state = {}
    for name, weight in small.decoder.state_dict().items():
        if ".to_q." in name:  # logits are divided by the root of the head's width
            weight = once(math.sqrt(2) * weight, 0)
        elif not name.startswith("conv_out."):
            weight = weight.repeat_interleave(2, dim=0)
        if weight.ndim > 1 and not name.startswith("conv_in."):
            weight = once(weight, 1)
        state[name] = weight
    teacher.decoder.load_state_dict(state)
    teacher.post_quant_conv.load_state_dict(small.post_quant_conv.state_dict())
    return teacher


@pytest.mark.parametrize("order", [0, 1])
def test_pruning_is_exact_where_the_removed_channels_repeat_kept_ones(order):
    small = autoencoder((16, 32, 32))  # a stage that changes channels and one that does not
    teacher, z = doubled(small, order), torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(2))
    wanted = small.decode(z).sample
    assert torch.allclose(teacher.decode(z).sample, wanted, atol=1e-5)  # else this test proves nothing
    pruned = prune_decoder(teacher, half_shape(teacher))
    for name, weight in small.decoder.state_dict().items():
        assert torch.allclose(pruned.decoder.state_dict()[name], weight, rtol=1e-6), name
    assert torch.allclose(pruned.decode(z).sample, wanted, atol=1e-5)


def test_merged_norm_groups_divide_by_the_statistics_of_the_teachers_union():
    teacher, z = doubled(autoencoder((8, 16, 16)), 0), torch.randn(2, 4, 6, 6)
    pruned = prune_decoder(teacher, half_shape(teacher))  # 16 channels in 4 groups become 8 in 2
    assert DecoderShape.of(pruned).norm_num_groups == 2
    assert not torch.allclose(pruned.decode(z).sample, teacher.decode(z).sample, atol=1e-2)
    for norm in group_norms(teacher):
        norm.num_groups = 2
    assert torch.allclose(pruned.decode(z).sample, teacher.decode(z).sample, atol=1e-5)


def group_norms(vae):
    return [module for module in vae.decoder.modules() if isinstance(module, torch.nn.GroupNorm)]


def level_response(vae, z):
    """How much pictures move, by their own deviation, when each last channel gets a gain and an offset of its own."""
    generator = torch.Generator().manual_seed(0)
    channels = vae.decoder.conv_norm_out.num_channels
    gain = 0.5 + 4 * torch.rand(channels, 1, 1, generator=generator)
    offset = 5 * torch.randn(channels, 1, 1, generator=generator)
    before = vae.decode(z).sample
    hook = vae.decoder.conv_norm_out.register_forward_pre_hook(lambda norm, inputs: (inputs[0] * gain + offset,))
    after = vae.decode(z).sample
    hook.remove()
    return ((after - before).square().mean().sqrt() / before.std()).item()


@pytest.mark.parametrize("make", [half_shape, tiny_shape])
@pytest.mark.parametrize("widths", [(16, 48, 96, 128), (32, 64, 96, 128)])
def test_levels_reach_the_picture(widths, make):
    """With one channel a group, as emoji64's half decoder had, a norm throws away the level of each channel."""
    teacher, z = autoencoder(widths, groups=8), torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    pruned = prune_decoder(teacher, make(teacher))
    assert level_response(teacher, z) > 0.1 and level_response(pruned, z) > 0.1
    for norm in group_norms(pruned):
        assert norm.num_channels >= 4 * norm.num_groups


def test_one_channel_a_group_throws_levels_away():
    """What `half` made of emoji64's autoencoder before: the measure above tells."""
    teacher, z = autoencoder((16, 48, 96, 128), groups=8), torch.randn(2, 4, 4, 4)
    instance = prune_decoder(teacher, DecoderShape((8, 24, 48, 64), 1, True, 8))
    assert level_response(instance, z) < 0.01


@pytest.mark.parametrize(
    ("widths", "groups", "ratio", "kept", "kept_groups"),
    [
        ((128, 256, 512, 512), 32, 0.5, (64, 128, 256, 256), 16),  # SD
        ((16, 48, 96, 128), 8, 0.5, (8, 24, 48, 64), 2),
        ((32, 64, 96, 128), 8, 0.5, (16, 32, 48, 64), 4),
        ((8, 16), 4, 0.5, (4, 8), 1),
        ((8, 16), 4, 0.6, (3, 6), 1),
        ((8, 16), 4, 0.75, (2, 4), 1),
        ((8, 16), 4, 0.0, (8, 16), 4),  # as it was
        ((4, 16), 4, 0.0, (4, 16), 1),  # but never one channel
    ],
)
def test_as_many_norm_groups_as_leave_four_channels(widths, groups, ratio, kept, kept_groups):
    with torch.device("meta"):
        shape = half_shape(autoencoder(widths, groups=groups), ratio)
    assert (shape.block_out_channels, shape.norm_num_groups) == (kept, kept_groups)


def test_nothing_removed_is_the_teacher_bit_for_bit():
    teacher, z = autoencoder((8, 16, 16)), torch.randn(2, 4, 6, 6)
    pruned = prune_decoder(teacher, half_shape(teacher, 0.0))
    assert torch.equal(pruned.decode(z).sample, teacher.decode(z).sample)


def test_the_encoder_is_untouched_and_a_pruned_decoder_prunes_again():
    teacher, x = autoencoder((16, 32)), torch.randn(1, 3, 8, 8)
    once = prune_decoder(teacher, half_shape(teacher))
    twice = prune_decoder(once, tiny_shape(once, 0.5))
    assert DecoderShape.of(once) == DecoderShape((8, 16), 1, True, 2)
    assert DecoderShape.of(twice) == DecoderShape((4, 8), 0, False, 1)
    for vae in (once, twice):
        assert torch.equal(vae.encode(x).latent_dist.mean, teacher.encode(x).latent_dist.mean)
        assert vae.decode(torch.randn(1, 4, 4, 4)).sample.shape == (1, 3, 8, 8)


def test_stages_whose_widths_become_equal_lose_their_shortcut():
    teacher = autoencoder((4, 12, 16))
    pruned = prune_decoder(teacher, tiny_shape(teacher, 0.75))  # 4, 4, 4
    assert teacher.decoder.up_blocks[1].resnets[0].conv_shortcut is not None
    assert pruned.decoder.up_blocks[1].resnets[0].conv_shortcut is None
    assert torch.isfinite(pruned.decode(torch.randn(1, 4, 4, 4)).sample).all()


def test_each_norm_group_keeps_its_most_important_channels():
    weights = {
        "a.weight": torch.tensor([3.0, 1.0, 2.0, 9.0, 8.0, 7.0])[:, None],
        "b.weight": torch.tensor([[1.0, 1.0, 4.0, 1.0, 0.0, 2.0], [0.0, 0.0, 3.0, 0.0, 0.0, 0.0]]),
        "norm.weight": torch.tensor([1.0, 2.0, 1.0, 1.0, 1.0, 1.0]),
    }
    space = Space()
    space.produce("a")
    space.consumed.append(("b.weight", 1, space.norm("norm")))
    assert space.importance(weights).tolist() == pytest.approx([3, 2, 10, 9, 0, 14])
    assert space.choose(weights, 2, 2, 2).tolist() == [2, 5]
    assert space.choose(weights, 4, 2, 2).tolist() == [0, 2, 3, 5]
    # merged to one group: as many of each half, and the best of what is left (a.0 is 3, a.3 is 9)
    assert space.choose(weights, 2, 2, 1).tolist() == [2, 5]
    assert space.choose(weights, 3, 2, 1).tolist() == [2, 3, 5]
    assert space.choose(weights, 4, 2, 1).tolist() == [0, 2, 3, 5]
    assert space.choose(weights, 3, 1, 1).tolist() == [2, 3, 5]


def test_presets_at_the_size_of_stable_diffusion():
    """SnapFusion: 49.5 M parameters become 13 M; ours of 0.5 has 12.4 M. tiny: at most 1.5 M, no attention."""
    with torch.device("meta"):
        teacher = AutoencoderKL(**CONFIGS["sd-1.5"]["vae"])
        students = {}
        for make in (half_shape, tiny_shape):
            shape = make(teacher)
            students[make] = SlimAutoencoderKL(
                **CONFIGS["sd-1.5"]["vae"], **{f"decoder_{key}": value for key, value in vars(shape).items()}
            ).decoder
        z = torch.zeros(1, 4, 16, 16)
    count = {key: sum(p.numel() for p in decoder.parameters()) for key, decoder in students.items()}
    assert sum(p.numel() for p in teacher.decoder.parameters()) == 49_490_179
    assert count[half_shape] == 12_387_459
    assert count[tiny_shape] <= 1_500_000 and not any(
        "attentions" in name for name in students[tiny_shape].state_dict()
    )
    costs = [multiply_adds(net, {"sample": z}) for net in (teacher.decoder, *students.values())]
    assert 3.8 < costs[0] / costs[1] < 4.1 and costs[0] / costs[2] > 25


@pytest.mark.parametrize(
    ("ratio", "message"),
    [
        (1.0, "--ratio 1 is not between 0 and 1"),
        (-0.2, "--ratio -0.2 is not between 0 and 1"),
        (float("nan"), "--ratio nan is not between"),
        (0.8, r"--ratio 0.8 leaves 1.6 of 8 channels, fewer than the 2 that a norm group needs: choose at most 0.75"),
    ],
)
def test_ratios_that_cannot_be_are_refused(ratio, message):
    with pytest.raises(PocketfusionError, match=message):
        half_shape(autoencoder((8, 16)), ratio)


def test_norm_groups_that_cannot_be_are_refused():
    teacher = autoencoder((8, 16))
    with pytest.raises(PocketfusionError, match="3 norm groups are not made of whole ones of 4: choose a divisor"):
        prune_decoder(teacher, DecoderShape((6, 12), 1, True, 3))
    with pytest.raises(PocketfusionError, match=r"\[8, 16\] channels cannot have 3 norm groups"):
        SlimAutoencoderKL(**teacher.config, decoder_norm_num_groups=3)


def test_a_folder_without_norm_groups_of_its_own_has_the_encoders():
    teacher = autoencoder((8, 16))
    slim = SlimAutoencoderKL(**teacher.config, decoder_block_out_channels=[4, 8])
    assert DecoderShape.of(slim).norm_num_groups == 4
    assert {norm.num_groups for norm in group_norms(slim)} == {4}


def test_a_slim_autoencoder_is_stored_and_loaded(tmp_path):
    teacher, z = autoencoder((8, 16)), torch.randn(1, 4, 4, 4)
    pruned = prune_decoder(teacher, tiny_shape(teacher, 0.5))
    pruned.save_pretrained(tmp_path)
    loaded = load_vae(tmp_path)
    assert type(loaded) is SlimAutoencoderKL and DecoderShape.of(loaded) == DecoderShape((4, 8), 0, False, 1)
    assert torch.equal(loaded.decode(z).sample, pruned.decode(z).sample)
    teacher.save_pretrained(tmp_path / "stock")
    assert type(load_vae(tmp_path / "stock")) is AutoencoderKL
    (tmp_path / "config.json").write_text('{"_class_name": "AsymmetricAutoencoderKL"}')
    with pytest.raises(PocketfusionError, match="the vae is a 'AsymmetricAutoencoderKL'"):
        load_vae(tmp_path)
