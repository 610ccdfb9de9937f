"""What of the pictures' colours an autoencoder's latents carry, axis by axis.

Usage: python benchmarks/latent_colours.py AUTOENCODER [AUTOENCODER …] --data DATA [--size 128] [--pictures 160]

For each axis of colour: the share of the variance of the mean colours of 8x8 (the factor's) pixels that a linear map
reads in the latents' means, and that the decoded picture has, R² both; held-out pictures (val_combo, val_concept).
A picture may look right by what the decoder guesses; a diffusion learns only what the latents carry.
"""

from __future__ import annotations

import argparse
from pathlib import Path

AXES = {"brightness": (0.3, 0.59, 0.11), "yellow-blue": (0.5, 0.5, -1.0), "green-magenta": (-0.5, 1.0, -0.5)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("autoencoders", nargs="+", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--pictures", type=int, default=160)
    given = parser.parse_args()

    import torch
    from diffusers import AutoencoderKL
    from torch.nn import functional as F

    from pocketfusion.data.sources import open_dataset
    from pocketfusion.models.loading import load_part
    from pocketfusion.models.slim_autoencoder import to_tensor
    from pocketfusion.train.autoencoder import VALIDATION, psnr
    from pocketfusion.train.batch import spread

    data = open_dataset(given.data, given.size)
    pixels = to_tensor(data.images[spread(data.indices(VALIDATION), given.pictures)])
    for folder in given.autoencoders:
        vae = load_part(AutoencoderKL, folder).float().eval()
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        with torch.no_grad():
            latents = torch.cat([vae.encode(part).latent_dist.mean for part in pixels.split(16)])
            decoded = torch.cat([vae.decode(part).sample for part in latents.split(16)])
        rows = latents.permute(0, 2, 3, 1).flatten(0, 2)
        rows = torch.cat([rows, torch.ones(len(rows), 1)], 1)
        colours, drawn = (F.avg_pool2d(x, factor).permute(0, 2, 3, 1).flatten(0, 2) for x in (pixels, decoded))
        read = rows @ torch.linalg.lstsq(rows, colours).solution
        print(f"{folder}: {psnr(pixels, decoded).mean().item():.2f} dB")
        for name, axis in AXES.items():
            along, *others = (x @ torch.tensor(axis) for x in (colours, read, drawn))
            shares = [1 - ((along - other).var() / along.var()).item() for other in others]
            print(f"  {name:14} read in the latents {shares[0]:.3f}, in the picture {shares[1]:.3f}")


if __name__ == "__main__":
    main()
