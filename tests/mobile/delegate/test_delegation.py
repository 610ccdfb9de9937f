"""Stable Diffusion's blocks are wholly on the GPU delegate, and right there: small ones always, real widths slowly."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from pocketfusion.latency.blocks import all_blocks, with_weights
from pocketfusion.mobile.delegate.oracle import Oracle
from pocketfusion.mobile.delegate.proof import partitions, prove
from pocketfusion.mobile.delegate.stack import GpuStack
from pocketfusion.mobile.devices import TARGETS
from pocketfusion.mobile.wrappers import nchw, nhwc

GPU = TARGETS["litert-gpu"]
STOCK = GPU.model_copy(update={"rewrites": ()})


@pytest.fixture(scope="module")
def fp32(fp32_stack: GpuStack) -> Iterator[Oracle]:
    with Oracle(fp32_stack, timeout=3600) as oracle:
        yield oracle


@pytest.fixture(scope="module")
def fp16(fp16_stack: GpuStack) -> Iterator[Oracle]:
    with Oracle(fp16_stack, timeout=3600) as oracle:
        yield oracle


class _Level(nn.Module):
    """A level of SD's UNet in miniature: ResNet, upsampler, and between them the transformer if there is one."""

    def __init__(self, transformer: bool) -> None:
        super().__init__()
        self.resnet = ResnetBlock2D(in_channels=16, out_channels=16, temb_channels=8, groups=4)
        self.attention = (
            Transformer2DModel(2, 8, in_channels=16, cross_attention_dim=12, norm_num_groups=4)
            if transformer
            else None
        )
        self.upsample = Upsample2D(16, use_conv=True)

    def forward(
        self, x: torch.Tensor, temb: torch.Tensor, states: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        y = self.resnet(nchw(x), temb)
        if self.attention is not None:
            y = self.attention(y, encoder_hidden_states=states, return_dict=False)[0]
        return {"y": nhwc(self.upsample(y))}


def samples(transformer: bool) -> dict[str, torch.Tensor]:
    given = {"x": torch.randn(1, 8, 8, 16), "temb": torch.randn(1, 8)}
    return given | {"states": torch.randn(1, 7, 12)} if transformer else given


def test_a_level_before_and_after(fp32: Oracle) -> None:
    level = _Level(transformer=False).eval()  # with fresh norms: their weights of one leave a BROADCAST_TO
    before = prove("level", level, samples(False), STOCK, {"fp32": fp32})
    assert not before.accepted and not before.proved and not before.parity
    assert before.refused["BROADCAST_TO"] >= 2 and before.partitions[0] > 1 and before.partitions[1] >= 1
    after = prove("level", level, samples(False), GPU, {"fp32": fp32})
    assert after.proved and after.partitions == (1, 0)
    assert after.parity["fp32"].max_error < 1e-5 and after.rewrites["group-norm"] == 2


@pytest.mark.parametrize("upsampling", ["upsample", "subpixel-upsample"])
def test_every_pass_is_taken(fp32: Oracle, upsampling: str) -> None:
    """Also those that `litert-gpu` does without; of two for upsamplers, each in its turn."""
    names = ("gelu", "linear-to-conv", "serialise-conv", "serialise-matmul", upsampling)
    limits = GPU.limits.model_copy(update={"weight_bytes": 1500, "attention_score_bytes": 8192})
    others = [name for name in GPU.rewrites if name != "subpixel-upsample"]
    target = GPU.model_copy(update={"rewrites": (*others, *names), "limits": limits})
    proof = prove("level", with_weights(_Level(transformer=True)), samples(True), target, {"fp32": fp32})
    assert proof.proved and proof.parity["fp32"].max_error < 1e-5
    assert all(proof.rewrites[name] for name in (*names, "attention", "geglu", "layer-norm"))


class _Text(nn.Module):
    """CLIP in miniature."""

    def __init__(self) -> None:
        super().__init__()
        config = CLIPTextConfig(
            vocab_size=40,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=12,
            bos_token_id=0,
            eos_token_id=2,
        )
        self.text_encoder = CLIPTextModel(config)

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.text_encoder(input_ids)[0]}


def test_text_layers_with_large_activations(fp32: Oracle, fp16: Oracle) -> None:
    """A residual stream of std 1000: squared in fp16, it is infinite."""
    text = with_weights(_Text(), scale=1000.0)
    ids = {"input_ids": torch.randint(0, 40, (1, 12)).int()}
    oracles = {"fp32": fp32, "fp16": fp16}
    after = prove("text", text, ids, GPU, oracles)
    assert after.proved and after.parity["fp32"].max_error < 1e-5
    before = prove("text", text, ids, STOCK, oracles)
    assert before.accepted and before.parity["fp32"].right and not before.parity["fp16"].right


def graph(*operations: tuple[int, list[int], list[int]]) -> SimpleNamespace:
    """A stub of operations (index, inputs, outputs) on the input 0."""

    def tensors(indices: list[int]) -> list[SimpleNamespace]:
        return [SimpleNamespace(index=index, constant=False) for index in indices]

    listed = [SimpleNamespace(index=i, given=tensors(a), outputs=tensors(b)) for i, a, b in operations]
    return SimpleNamespace(operations=listed, folded=set(), inputs={"x": tensors([0])[0]})


def test_partitions_by_hand() -> None:
    chain = graph((0, [0], [1]), (1, [1], [2]), (2, [2], [3]), (3, [3], [4]))
    assert partitions(chain, set()) == (1, 0)
    assert partitions(chain, {1}) == (2, 1)
    assert partitions(chain, {0, 1, 2, 3}) == (0, 1)
    # two branches, one refused operation in each: both run in one go on the CPU
    branches = graph((0, [0], [1]), (1, [0], [2]), (2, [1], [3]), (3, [2], [4]), (4, [3, 4], [5]))
    assert partitions(branches, {2, 3}) == (2, 1)


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_every_block_at_its_real_width(fp32: Oracle, fp16: Oracle) -> None:
    failed = {}
    for block in all_blocks():
        proof = prove(block.name, block.module, block.samples, GPU, {"fp32": fp32, "fp16": fp16})
        if not proof.proved or proof.parity["fp32"].max_error > 2e-5:
            failed[block.name] = proof
    assert not failed
