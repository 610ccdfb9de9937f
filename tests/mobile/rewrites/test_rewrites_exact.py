"""Every rewrite gives stock torch's, diffusers' and transformers' numbers, at the module's path, weights shared."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel, CLIPTextConfig, CLIPTextModel

from pocketfusion.mobile.devices import TARGETS, Limits, Target
from pocketfusion.mobile.rewrites import PASSES, rewrite
from pocketfusion.mobile.rewrites.activations import ClampedGELU, ClampedQuickGELU
from pocketfusion.mobile.rewrites.attention import UNetAttention, query_rows
from pocketfusion.mobile.rewrites.convolution import SerialConv, parts_needed
from pocketfusion.mobile.rewrites.linear import SerialLinear
from pocketfusion.mobile.rewrites.norms import GroupNormNHWC, ScaledLayerNorm

GPU = TARGETS["litert-gpu"]


def limited(**limits: int) -> Target:
    """litert-gpu with other limits."""
    return Target(name="litert-gpu", rewrites=(), limits=Limits(float16=True, **limits))


@torch.no_grad()
def compare(
    module: nn.Module, names: tuple[str, ...], *inputs: torch.Tensor, target: Target = GPU, shared: bool = True
) -> nn.Module:
    """Rewrites and runs both; their difference is at most 1e-5 of the output's scale. Returns the rewritten module.

    `shared`: the rewritten module must have no weights of its own.
    """
    torch.manual_seed(1)
    for parameter in module.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 0.5)
    changed, counts = rewrite(module.eval(), target, names)
    assert all(counts.values()), counts
    expected, got = module(*inputs), changed(*inputs)
    if isinstance(expected, tuple):
        expected, got = expected[0], got[0]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    memory = {p.untyped_storage().data_ptr() for p in module.parameters()}
    assert not shared or {p.untyped_storage().data_ptr() for p in changed.parameters()} <= memory
    return changed


@pytest.mark.parametrize("scale", [1e-3, 1.0, 400.0, 2e4])
@pytest.mark.parametrize("shape", [(2, 12, 5, 7), (1, 12, 9)])
def test_group_norm_fp16_safe(scale: float, shape: tuple[int, ...]) -> None:
    changed = compare(nn.GroupNorm(3, 12, eps=1e-6), ("group-norm",), torch.randn(shape) * scale)
    assert isinstance(changed, GroupNormNHWC) and changed.float16


@pytest.mark.parametrize("scale", [1e-3, 1.0, 400.0])
def test_layer_norm_fp16_safe(scale: float) -> None:
    assert isinstance(compare(nn.LayerNorm(16), ("layer-norm",), torch.randn(2, 7, 16) * scale), ScaledLayerNorm)


@pytest.mark.parametrize("norm", [nn.GroupNorm(3, 12), nn.LayerNorm(12)])
def test_norms_of_a_constant(norm: nn.Module) -> None:
    compare(norm, ("group-norm",) if isinstance(norm, nn.GroupNorm) else ("layer-norm",), torch.full((1, 12, 12), 3.0))


def test_norm_in_half_precision_where_torchs_squares_overflow() -> None:
    """The rewritten arithmetic, done by torch in fp16 throughout, keeps 1 % at deviations of 2,000."""
    torch.manual_seed(0)
    x = torch.randn(1, 8, 16, 16) * 2000
    norm = nn.GroupNorm(2, 8)
    expected = norm(x)
    half = rewrite(norm, GPU, ("group-norm",))[0].half()(x.half())
    assert (half - expected).abs().max() < 0.01 * expected.abs().max()
    plain = rewrite(norm, TARGETS["litert-cpu"], ("group-norm",))[0].half()(x.half())
    assert not (plain - expected).abs().max() < 0.5 * expected.abs().max()


@torch.no_grad()
def test_gelu_within_4e_6_of_erf() -> None:
    x = torch.cat([torch.linspace(-12, 12, 100_001, dtype=torch.float64), torch.tensor([-300.0, 300.0, 6e4])])
    expected = F.gelu(x)
    assert (ClampedGELU()(x) - expected).abs().max() < 4e-6
    half = ClampedGELU()(x.half()).double()
    assert torch.isfinite(half).all() and ((half - expected).abs() / expected.abs().clamp_min(1)).max() < 4e-3


def test_quick_gelu() -> None:
    x = torch.cat([torch.linspace(-30, 30, 10_001), torch.tensor([-300.0, 300.0])])
    torch.testing.assert_close(ClampedQuickGELU()(x), x * torch.sigmoid(1.702 * x), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("names", [("gelu",), ("geglu",), ("geglu", "gelu"), ("geglu", "linear-to-conv", "gelu")])
def test_transformer_block(names: tuple[str, ...]) -> None:
    block = BasicTransformerBlock(16, 2, 8, cross_attention_dim=12)
    x, states = torch.randn(2, 9, 16), torch.randn(2, 5, 12)
    changed = compare(_With(block, encoder_hidden_states=states), (*names, "attention", "layer-norm"), x)
    assert isinstance(changed.get_submodule("block.attn1"), UNetAttention)
    assert dict(changed.named_parameters())["block.attn1.to_q.weight"].shape[:2] == (16, 16)


class _With(nn.Module):
    """`block` with fixed keyword arguments."""

    def __init__(self, block: nn.Module, **arguments: object):
        super().__init__()
        self.block, self.arguments = block, arguments

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.block(*inputs, **self.arguments)


def test_autoencoder_attention() -> None:
    attention = Attention(
        16, heads=1, dim_head=16, bias=True, norm_num_groups=4, residual_connection=True, rescale_output_factor=1.5
    )
    compare(attention, ("attention", "group-norm", "linear-to-conv"), torch.randn(2, 16, 5, 6))


@pytest.mark.parametrize(("score_bytes", "slices"), [(2 * 4 * 24 * 24, 1), (2 * 4 * 24 * 10, 3), (1, 24)])
def test_attention_slices(score_bytes: int, slices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch 2 of 2 heads: 4 score matrices of 24 x 24 in fp16, stored as a whole or by queries."""
    sizes: list[torch.Size] = []
    softmax = torch.softmax
    monkeypatch.setattr(torch, "softmax", lambda x, dim: sizes.append(x.shape) or softmax(x, dim))
    target = limited(attention_score_bytes=score_bytes)
    compare(Attention(16, heads=2, dim_head=8), ("attention",), torch.randn(2, 24, 16), target=target)
    assert len(sizes) == slices and sum(s[1] for s in sizes) == 24
    assert all(s.numel() * 2 <= score_bytes or s[1] == 1 for s in sizes)


def test_query_rows_are_even() -> None:
    limits = Limits(float16=True, attention_score_bytes=128 << 20)
    assert query_rows(8, 4096, 4096, limits) == 2048  # 256 MiB: two slices
    assert query_rows(5, 4096, 4096, limits) == 2048  # 160 MiB: two even slices, not 3276 and 820
    assert query_rows(8, 4096, 77, limits) == 4096
    assert query_rows(8, 4096, 4096, Limits()) == 4096


def test_bert_with_padding_and_batch() -> None:
    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    mask = torch.ones(2, 1, 1, 6)
    mask[0, :, :, 4:] = 0
    additive = (1 - mask) * -1e4
    model = _With(BertModel(config), attention_mask=additive.expand(-1, 1, 6, -1), return_dict=False)
    compare(model, ("attention", "gelu", "layer-norm"), torch.randint(0, 30, (2, 6)))


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("names", [("masks",), ("attention",), ("masks", "attention", "gelu", "layer-norm")])
def test_clip(act: str, names: tuple[str, ...]) -> None:
    config = CLIPTextConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        hidden_act=act,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=2,
    )
    changed = compare(_With(CLIPTextModel(config), return_dict=False), names, torch.randint(0, 30, (1, 8)))
    assert "block.encoder.layers.0.self_attn.q_proj.weight" in dict(changed.named_parameters())


@pytest.mark.parametrize("shape", [(3, 6), (2, 5, 6), (2, 3, 5, 6)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_to_conv(shape: tuple[int, ...], bias: bool) -> None:
    compare(nn.Linear(6, 8, bias=bias), ("linear-to-conv",), torch.randn(shape))


def test_serial_linear() -> None:
    changed = compare(
        nn.Linear(6, 8), ("serialise-matmul",), torch.randn(2, 5, 6), target=limited(weight_bytes=2 * 6 * 3)
    )
    assert isinstance(changed, SerialLinear) and [part.out_features for part in changed.parts] == [3, 3, 2]


@pytest.mark.parametrize("along", ["inputs", "outputs"])
@pytest.mark.parametrize("bias", [True, False])
def test_serial_conv(along: str, bias: bool) -> None:
    conv = nn.Conv2d(10, 9, 3, padding=1, stride=2, bias=bias)
    x = torch.randn(2, 10, 7, 7)
    torch.testing.assert_close(SerialConv(conv, 3, along)(x), conv(x))


def test_papers_example_is_split_in_two() -> None:
    """3x3, 1920 -> 640: Winograd's transformed input is 36 * 480 = 17,280 texels high, the limit 16,384."""
    with torch.device("meta"):
        conv, fits = nn.Conv2d(1920, 640, 3, padding=1), nn.Conv2d(1820, 640, 3, padding=1)
        pointwise = nn.Conv2d(1920, 640, 1)
    image = Limits(image2d=GPU.limits.image2d)
    assert [parts_needed(one, image) for one in (conv, fits, pointwise)] == [2, 1, 1]
    assert parts_needed(conv, Limits()) == 1
    target = GPU.model_copy(update={"limits": image})
    changed, counts = rewrite(nn.Sequential(conv, fits), target, ["serialise-conv"])
    assert counts == {"serialise-conv": 1}
    assert [part.in_channels for part in changed[0].parts] == [960, 960]


def test_split_for_fp16_sums() -> None:
    """5,760 products in one sum: 640 channels of 3x3; Stable Diffusion's widest have 2,560."""
    with torch.device("meta"):
        convs = [nn.Conv2d(channels, 1280, 3) for channels in (640, 641, 1280, 1920, 2560)]
        pointwise = nn.Conv2d(5120, 1280, 1)
    assert [parts_needed(one, Limits(sum_terms=5760)) for one in (*convs, pointwise)] == [1, 2, 2, 3, 4, 1]
    assert [parts_needed(one, GPU.limits) for one in convs] == [2, 2, 3, 4, 5]


def test_a_sum_in_half_precision_is_nearer_in_parts() -> None:
    """Sums kept in fp16, as the delegate keeps them, against doubles: in four parts at least a third nearer."""
    generator = np.random.default_rng(0)
    x, w = generator.standard_normal((200, 11520)), generator.standard_normal((200, 11520))
    products = (x.astype(np.float16) * w.astype(np.float16)).astype(np.float16)

    def error(parts: int) -> float:
        sums = [np.cumsum(part, 1, dtype=np.float16)[:, -1] for part in np.split(products, parts, 1)]
        total = np.cumsum(np.stack(sums, 1), 1, dtype=np.float16)[:, -1]
        return float(np.square(total - products.astype(np.float64).sum(1)).mean() ** 0.5)

    assert error(4) < error(1) / 1.5


def test_split_for_a_cache() -> None:
    """16 output channels of 3x3x640 weights are 360 KiB in float32: more than half of 512 KiB."""
    with torch.device("meta"):
        wide, narrow = nn.Conv2d(640, 64, 3), nn.Conv2d(320, 64, 3)
        odd = nn.Conv2d(1000, 64, 3)
    limits = Limits(cache_bytes=512 << 10)
    assert [parts_needed(one, limits) for one in (wide, narrow, odd)] == [2, 1, 3]
    assert [part.in_channels for part in SerialConv(wide, 2).parts] == [320, 320]
    assert [part.in_channels for part in SerialConv(odd, 3).parts] == [352, 352, 296]


@pytest.mark.parametrize("name", ["upsample", "subpixel-upsample"])
@pytest.mark.parametrize("size", [None, (10, 14), (9, 13), (10, 13)])
def test_upsample(name: str, size: tuple[int, int] | None) -> None:
    arguments = {} if size is None else {"output_size": size}
    module = _With(Upsample2D(4, use_conv=True, out_channels=3), **arguments)
    compare(module, (name,), torch.randn(2, 4, 5, 7), shared=name == "upsample")


@pytest.mark.parametrize("shape", [(2, 4, 6, 8), (2, 4, 5, 7), (1, 4, 5, 8)])
def test_padding(shape: tuple[int, ...]) -> None:
    compare(Downsample2D(4, use_conv=True, padding=1), ("padding",), torch.randn(shape))


def test_every_pass_says_what_and_why() -> None:
    for name, one in PASSES.items():
        assert one.name == name and one.summary and one.source
    for target in TARGETS.values():
        assert set(target.rewrites) <= PASSES.keys()
