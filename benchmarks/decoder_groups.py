"""What a decoder's norm groups cost: levels that reach its picture, and how fast a pruned decoder learns colours.

Usage: python benchmarks/decoder_groups.py models/emoji/base --data DATA [--size 64] [--students models/emoji/final]
       [--groups 8 2] [--updates 200]

`moves`: root mean square of how the picture changes, of a range of 2, when every channel in front of the last norm
gets a gain (0.5 to 4.5) and an offset (deviation 5) of its own; with one channel a group it cannot. PSNR and the
colour share of the squared error are to FOLDER's own pictures of encoded held-out pictures; FOLDER's own row is to the
real ones. --students: other folders of the same latents. --groups: FOLDER's decoder at half width with so many groups,
before and after a little training on encoded training pictures (mean squared error; minutes on a core). DATA's
pictures of --size pixels are reduced to FOLDER's.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from pocketfusion.data.sources import open_dataset
from pocketfusion.distill.decoder import DecoderNetwork, error_parts
from pocketfusion.distill.decoder_pruning import half_shape, prune_decoder
from pocketfusion.models.slim_autoencoder import load_vae, to_tensor
from pocketfusion.train.autoencoder import psnr


@torch.no_grad()
def in_parts(network, values: torch.Tensor) -> torch.Tensor:
    """`network` of `values` [N, …], 32 at a time."""
    return torch.cat([network(part).float() for part in values.split(32)])


def moves(vae, z: torch.Tensor) -> float:
    """See the module."""
    generator = torch.Generator().manual_seed(0)
    channels = vae.decoder.conv_norm_out.num_channels
    gain = 0.5 + 4 * torch.rand(channels, 1, 1, generator=generator)
    offset = 5 * torch.randn(channels, 1, 1, generator=generator)
    before = in_parts(lambda part: vae.decode(part).sample, z)
    hook = vae.decoder.conv_norm_out.register_forward_pre_hook(lambda norm, inputs: (inputs[0] * gain + offset,))
    after = in_parts(lambda part: vae.decode(part).sample, z)
    hook.remove()
    return (after - before).square().mean().sqrt().item()


def main() -> None:
    """Parses the command line, trains, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--students", type=Path, nargs="*", default=[])
    parser.add_argument("--groups", type=int, nargs="*", default=[8, 2])
    parser.add_argument("--updates", type=int, default=200)
    given = parser.parse_args()
    teacher, data = load_vae(given.folder / "vae"), open_dataset(given.data, given.size)
    rng = np.random.default_rng(0)

    def encoded(split: str, most: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pictures, their latents, and FOLDER's pictures of these."""
        indices = data.indices([split])
        chosen = rng.choice(indices, min(most, len(indices)), replace=False)
        pictures = F.interpolate(to_tensor(data.images[chosen]), size=teacher.config.sample_size, mode="area")
        latents = in_parts(lambda part: teacher.encode(part).latent_dist.mean, pictures)
        return pictures, latents, in_parts(lambda part: teacher.decode(part).sample, latents)

    real, held_out, goal = encoded("val_combo", 128)

    def row(name: str, vae, wanted: torch.Tensor) -> None:
        drawn = in_parts(lambda part: vae.decode(part).sample, held_out)
        whole, constant = error_parts(drawn, wanted).mean(0)
        figures = f"{psnr(drawn, wanted).mean().item():9.2f}  {(constant / whole).item():12.3f}"
        print(f"{name:40s} {moves(vae, held_out):8.5f} {figures}", flush=True)

    print(f"{'':40s} {'moves':>8s} {'PSNR, dB':>9s}  colour share")
    row(str(given.folder), teacher, real)
    for folder in given.students:
        row(str(folder), load_vae(folder / "vae"), goal)
    if given.groups:
        _, z, x = encoded("train", 2048)
    for groups in given.groups:
        vae = prune_decoder(teacher, replace(half_shape(teacher), norm_num_groups=groups)).requires_grad_(False)
        name = f"half, {groups} groups of {vae.decoder.conv_norm_out.num_channels // groups}"
        row(name, vae, goal)
        network = DecoderNetwork(vae)
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
        generator = torch.Generator().manual_seed(0)
        for _ in range(given.updates):
            chosen = torch.randint(len(z), (16,), generator=generator)
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.mse_loss(network(z[chosen]).float(), x[chosen])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
        row(f"{name}, {given.updates} updates", vae.requires_grad_(False), goal)


if __name__ == "__main__":
    main()
