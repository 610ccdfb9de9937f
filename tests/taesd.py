"""TAESD as its author's files have it: two plain sequences of layers, written down here on their own."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn


class Clamp(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x / 3) * 3


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        convolutions = [nn.Conv2d(width, width, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1], nn.ReLU(), convolutions[2])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.conv(x) + x)


def decoder(width: int, channels: int = 4) -> nn.Sequential:
    """Latents [N, C, h, w] → pictures [N, 3, 8h, 8w] in [0, 1]."""
    layers: list[nn.Module] = [Clamp(), nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
    for _ in range(3):
        layers += [*(Block(width) for _ in range(3)), nn.Upsample(scale_factor=2)]
        layers += [nn.Conv2d(width, width, 3, padding=1, bias=False)]
    return nn.Sequential(*layers, Block(width), nn.Conv2d(width, 3, 3, padding=1)).eval()


def encoder(width: int, channels: int = 4) -> nn.Sequential:
    """Pictures [N, 3, 8h, 8w] in [0, 1] → latents [N, C, h, w]."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), Block(width)]
    for _ in range(3):
        layers += [nn.Conv2d(width, width, 3, padding=1, stride=2, bias=False), *(Block(width) for _ in range(3))]
    return nn.Sequential(*layers, nn.Conv2d(width, channels, 3, padding=1)).eval()


def save(network: nn.Module, file: Path) -> Path:
    return save_state(network.state_dict(), file)


def save_state(state: dict[str, torch.Tensor], file: Path) -> Path:
    save_file({name: weight.contiguous() for name, weight in state.items()}, file)
    return file
