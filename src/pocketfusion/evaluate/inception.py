"""The Inception-v3 of FID: Szegedy et al. (arXiv 1512.00567) as TensorFlow's 2015-12-05 graph has it, up to pool3.

It takes the weights that pytorch-fid and torch-fidelity publish (`pt_inception-2015-12-05-6726825d.pth`,
`weights-inception-2015-12-05-6726825d.pth`: one network under the same names). It is here because both libraries need
torchvision, and torch-fidelity unpickles its weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from pocketfusion.errors import PocketfusionError

FEATURES = 2048
_SIDE = 299

Size = int | tuple[int, int]


class _Layer(NamedTuple):
    """A convolution with batch norm and ReLU, under its name in the published weights."""

    name: str
    width: int
    kernel: Size = 1
    stride: int = 1
    padding: Size = 0


class _Convolution(nn.Module):
    def __init__(self, width_in: int, layer: _Layer):
        super().__init__()
        self.conv = nn.Conv2d(width_in, layer.width, layer.kernel, layer.stride, layer.padding, bias=False)
        self.bn = nn.BatchNorm2d(layer.width, eps=1e-3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)))


class _Branch(NamedTuple):
    """Pooling (if any), a chain of layers, and (if any) a fork: layers side by side on the chain's end."""

    layers: tuple[_Layer, ...] = ()
    fork: tuple[_Layer, ...] = ()
    pool: str = ""  #: "mean", "max", or "halve" (maximum with stride 2)


def _pool(x: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "mean":  # TensorFlow leaves the padding out of the mean, unlike torchvision's network
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
    return F.max_pool2d(x, 3, stride=2) if kind == "halve" else F.max_pool2d(x, 3, stride=1, padding=1)


class _Mixed(nn.Module):
    """Branches on one input, concatenated in order."""

    def __init__(self, width: int, branches: tuple[_Branch, ...]):
        super().__init__()
        self.branches, self.width = branches, 0
        for branch in branches:
            widths = [width, *(layer.width for layer in branch.layers)]
            for width_in, layer in zip(widths, branch.layers, strict=False):
                self.add_module(layer.name, _Convolution(width_in, layer))
            for layer in branch.fork:
                self.add_module(layer.name, _Convolution(widths[-1], layer))
            self.width += sum(layer.width for layer in branch.fork) or widths[-1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        results = []
        for branch in self.branches:
            y = _pool(x, branch.pool) if branch.pool else x
            for layer in branch.layers:
                y = self.get_submodule(layer.name)(y)
            results += [self.get_submodule(layer.name)(y) for layer in branch.fork] or [y]
        return torch.cat(results, 1)


def _double(prefix: str, widths: tuple[int, int, int], stride: int = 1) -> tuple[_Layer, ...]:
    """1×1, 3×3, 3×3; the last one may halve."""
    last = _Layer(f"{prefix}_3", widths[2], 3, stride, 1 if stride == 1 else 0)
    return _Layer(f"{prefix}_1", widths[0]), _Layer(f"{prefix}_2", widths[1], 3, 1, 1), last


def _figure_5(pooled: int) -> tuple[_Branch, ...]:
    five = _Layer("branch5x5_1", 48), _Layer("branch5x5_2", 64, 5, 1, 2)
    return (
        _Branch((_Layer("branch1x1", 64),)),
        _Branch(five),
        _Branch(_double("branch3x3dbl", (64, 96, 96))),
        _Branch((_Layer("branch_pool", pooled),), pool="mean"),
    )


def _sevens(prefix: str, inner: int, ways: str) -> tuple[_Layer, ...]:
    """1×1, then 1×7 (h) and 7×1 (v) in the order of `ways`; the last one has 192 channels."""
    shapes = {"h": ((1, 7), (0, 3)), "v": ((7, 1), (3, 0))}
    widths = [inner] * (len(ways) - 1) + [192]
    layers = [
        _Layer(f"{prefix}_{number}", width, shapes[way][0], 1, shapes[way][1])
        for number, (way, width) in enumerate(zip(ways, widths, strict=True), 2)
    ]
    return _Layer(f"{prefix}_1", inner), *layers


def _figure_6(inner: int) -> tuple[_Branch, ...]:
    return (
        _Branch((_Layer("branch1x1", 192),)),
        _Branch(_sevens("branch7x7", inner, "hv")),
        _Branch(_sevens("branch7x7dbl", inner, "vhvh")),
        _Branch((_Layer("branch_pool", 192),), pool="mean"),
    )


def _figure_7(pool: str) -> tuple[_Branch, ...]:
    def fork(prefix: str) -> tuple[_Layer, ...]:
        return _Layer(f"{prefix}a", 384, (1, 3), 1, (0, 1)), _Layer(f"{prefix}b", 384, (3, 1), 1, (1, 0))

    double = _Layer("branch3x3dbl_1", 448), _Layer("branch3x3dbl_2", 384, 3, 1, 1)
    return (
        _Branch((_Layer("branch1x1", 320),)),
        _Branch((_Layer("branch3x3_1", 384),), fork("branch3x3_2")),
        _Branch(double, fork("branch3x3dbl_3")),
        _Branch((_Layer("branch_pool", 192),), pool=pool),
    )


_STEM = (
    _Layer("Conv2d_1a_3x3", 32, 3, 2),
    _Layer("Conv2d_2a_3x3", 32, 3),
    _Layer("Conv2d_2b_3x3", 64, 3, 1, 1),
    _Layer("Conv2d_3b_1x1", 80),  # a halving maximum before it and after the next one
    _Layer("Conv2d_4a_3x3", 192, 3),
)
_BLOCKS = {
    "Mixed_5b": _figure_5(32),
    "Mixed_5c": _figure_5(64),
    "Mixed_5d": _figure_5(64),
    "Mixed_6a": (
        _Branch((_Layer("branch3x3", 384, 3, 2),)),
        _Branch(_double("branch3x3dbl", (64, 96, 96), stride=2)),
        _Branch(pool="halve"),
    ),
    "Mixed_6b": _figure_6(128),
    "Mixed_6c": _figure_6(160),
    "Mixed_6d": _figure_6(160),
    "Mixed_6e": _figure_6(192),
    "Mixed_7a": (
        _Branch((_Layer("branch3x3_1", 192), _Layer("branch3x3_2", 320, 3, 2))),
        _Branch((*_sevens("branch7x7x3", 192, "hv"), _Layer("branch7x7x3_4", 192, 3, 2))),
        _Branch(pool="halve"),
    ),
    "Mixed_7b": _figure_7("mean"),
    "Mixed_7c": _figure_7("max"),  # the graph's last block pools by maximum, FID's known oddity
}


class FidInception(nn.Module):
    """Pictures → pool3 features."""

    def __init__(self) -> None:
        super().__init__()
        width = 3
        for layer in _STEM:
            self.add_module(layer.name, _Convolution(width, layer))
            width = layer.width
        for name, branches in _BLOCKS.items():
            block = _Mixed(width, branches)
            self.add_module(name, block)
            width = block.width

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [B, 3, H, W] → [B, 2048]; resized to 299 px and scaled to [-1, 1] as pytorch-fid does."""
        x = F.interpolate(images.float() / 255, (_SIDE, _SIDE), mode="bilinear", align_corners=False)
        return self.pool3(2 * x - 1)

    def pool3(self, x: torch.Tensor) -> torch.Tensor:
        """[B, 3, 299, 299] in [-1, 1] → [B, 2048]."""
        for layer in _STEM:
            x = self.get_submodule(layer.name)(F.max_pool2d(x, 3, 2) if layer.name == "Conv2d_3b_1x1" else x)
        x = F.max_pool2d(x, 3, 2)
        for name in _BLOCKS:
            x = self.get_submodule(name)(x)
        return x.mean((2, 3))

    @torch.no_grad()
    def features(self, images: np.ndarray, batch: int = 32) -> np.ndarray:
        """uint8 [N, H, W, 3] → [N, 2048] fp32."""
        device = next(self.parameters()).device
        parts = []
        for start in range(0, len(images), batch):
            part = torch.from_numpy(np.ascontiguousarray(images[start : start + batch])).to(device)
            parts.append(self(part.permute(0, 3, 1, 2)).cpu())
        return torch.cat(parts).numpy()


def load_inception(weights: Path) -> FidInception:
    """FID's Inception-v3 with the published weights (`.pth`, or the same as safetensors), on the GPU if there is one.

    Raises PocketfusionError if the file is missing, is not plain tensors, or holds another network.
    """
    from pocketfusion.evaluate.weights import read_weights

    given = read_weights(weights, "Inception-v3 weights")
    with torch.device("meta"):
        network = FidInception()
    wanted = network.state_dict()
    counters = {name for name in wanted if name.endswith("num_batches_tracked")}  # not used, not always there
    for name, tensor in wanted.items():
        if name not in counters and (name not in given or given[name].shape != tensor.shape):
            raise PocketfusionError(
                f"{weights} is not FID's Inception-v3 ({name} is missing or of another shape): give "
                "pt_inception-2015-12-05-6726825d.pth, which the pytorch-fid project publishes"
            )
    kept = {name: given[name].float() for name in wanted.keys() - counters}
    network.load_state_dict(kept | {name: torch.tensor(0) for name in counters}, assign=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return network.to(device).requires_grad_(False).eval()
