"""The decoder of TAESD's class (diffusers' `AutoencoderTiny`) with a bundle's input and output.

Nothing is left for the runtime to know: the division by the scaling factor and by the clamp's 3 is one product, the
clamp's other 3 is in the first convolution's weights and the way from [0, 1] to [-1, 1] in the last one's.
`latent_shift` and `latent_magnitude` are of latents kept as bytes, which no sampler's are: stock pipelines leave them
alone, too.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderTiny
from diffusers.models.upsampling import Upsample2D
from torch import nn

from pocketfusion.errors import PocketfusionError
from pocketfusion.mobile.rewrites.passes import view

CLAMP = 3.0  #: of the latents: 3 tanh(z / 3)


class TinyDecoder(nn.Module):
    """`latents` [B, H, W, C], the sampler's -> `image` [B, 8H, 8W, 3] in [-1, 1], as `mobile.wrappers.Decoder`.

    Its parameters are the autoencoder's but for the first and last convolution's. Doubling and the convolution behind
    it become diffusers' `Upsample2D`, so that the rewrites for that one hold here.
    """

    def __init__(self, vae: AutoencoderTiny):
        """Raises PocketfusionError for another doubling than TAESD's."""
        super().__init__()
        config = vae.config
        if config.upsampling_scaling_factor != 2 or config.upsample_fn != "nearest":
            raise PocketfusionError(
                f"the AutoencoderTiny scales by {config.upsampling_scaling_factor} ({config.upsample_fn!a}): only "
                "doubling to the nearest can be exported"
            )
        first, *middle, last = vae.decoder.layers
        self.scale = 1 / (CLAMP * float(config.scaling_factor))
        self.conv_in = _scaled(first, CLAMP, 1.0, 0.0)
        layers: list[nn.Module] = []
        for layer in middle:
            if layers and isinstance(layers[-1], nn.Upsample):
                layers[-1] = _upsample(layer)
            else:
                layers.append(layer)
        self.layers = nn.Sequential(*layers)
        self.conv_out = _scaled(last, 2.0, 2.0, -1.0)

    def forward(self, latents: torch.Tensor) -> dict[str, torch.Tensor]:
        z = torch.tanh(latents * self.scale).permute(0, 3, 1, 2)
        return {"image": self.conv_out(self.layers(self.conv_in(z))).permute(0, 2, 3, 1)}


def _scaled(conv: nn.Conv2d, by: float, bias_by: float, plus: float) -> nn.Conv2d:
    """A convolution of `by` times the weights and `bias_by` times the bias `plus` a number."""
    with torch.device("meta"):
        new = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1)
    new.weight = view(conv.weight.detach() * by)
    new.bias = view(conv.bias.detach() * bias_by + plus)  # type: ignore[union-attr]  # TAESD's ends have one
    return new


def _upsample(conv: nn.Module) -> Upsample2D:
    """Nearest-neighbour doubling with the convolution behind it."""
    assert isinstance(conv, nn.Conv2d)
    with torch.device("meta"):
        new = Upsample2D(conv.in_channels, use_conv=True, out_channels=conv.out_channels, bias=False)
    new.conv = conv
    return new
