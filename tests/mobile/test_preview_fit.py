"""The linear preview's fit: exact where the decoder is linear, measured on the drawn pictures alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pocketfusion.mobile.bundle_extras import discs, fit_preview
from pocketfusion.mobile.measure import GateInputs

MATRIX = np.float32([[0.5, 0.1, 0.0], [0.0, 0.4, -0.1], [0.2, 0.0, 0.3], [-0.1, 0.2, 0.1]])
BIAS = np.float32([0.05, -0.1, 0.0])
FACTOR, SCALING = 2, 0.5


class LinearDecoder(nn.Module):
    def forward(self, latents: torch.Tensor) -> dict[str, torch.Tensor]:
        colours = latents @ torch.from_numpy(MATRIX) + torch.from_numpy(BIAS)
        return {"image": colours.repeat_interleave(FACTOR, 1).repeat_interleave(FACTOR, 2)}


def autoencoder() -> Any:
    """Its latents are four mixtures of the picture's averaged colours."""

    def encode(x: torch.Tensor) -> Any:
        mixed = nn.functional.avg_pool2d(x, FACTOR)[:, [0, 1, 2, 0]]
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=torch.cat([mixed[:, :3], mixed[:, 3:] ** 2], 1)))

    return SimpleNamespace(encode=encode, config=SimpleNamespace(scaling_factor=SCALING))


def drawn(decoder: nn.Module, seed: int = 0, noise: float = 0.0) -> GateInputs:
    latents = torch.randn(2, 1, 4, 6, 4, generator=torch.Generator().manual_seed(seed)) / 3
    images = torch.stack([decoder(latents=z)["image"] for z in latents])
    images += noise * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    return GateInputs({"decoder": [{"latents": z.numpy()} for z in latents]}, {"decoder": images.numpy()}, [], 2)


def test_a_linear_decoder_is_found() -> None:
    decoder = LinearDecoder()
    preview = fit_preview(autoencoder(), decoder, FACTOR, drawn(decoder))
    assert preview is not None
    np.testing.assert_allclose(preview.matrix, MATRIX, atol=0.01)  # the ridge takes a little
    np.testing.assert_allclose(preview.bias, BIAS, atol=0.01)
    assert preview.psnr_db > 40 and preview.r2 > 0.999


def test_figures_are_of_the_drawn_pictures() -> None:
    decoder = LinearDecoder()
    preview = fit_preview(autoencoder(), decoder, FACTOR, drawn(decoder, noise=0.4))
    assert preview is not None
    # an average of four pixels' noise: 0.4 / 2, of a range of 2
    assert preview.psnr_db == pytest.approx(20 * np.log10(2 / 0.2), abs=0.7) and preview.r2 < 0.7
    np.testing.assert_allclose(preview.matrix, MATRIX, atol=0.01)  # which the fit has not seen


def test_numbers_that_allow_no_map() -> None:
    class Unsound(LinearDecoder):
        def forward(self, latents: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"image": super().forward(latents)["image"] * float("nan")}

    decoder = LinearDecoder()
    assert fit_preview(autoencoder(), Unsound(), FACTOR, drawn(decoder)) is None


def test_discs_have_many_colours() -> None:
    pictures = discs(8, 16)
    assert pictures.shape == (8, 3, 16, 16) and pictures.abs().max() <= 1
    assert len(torch.unique(pictures.permute(0, 2, 3, 1).reshape(-1, 3), dim=0)) >= 8 * 3
    torch.testing.assert_close(pictures, discs(8, 16))
