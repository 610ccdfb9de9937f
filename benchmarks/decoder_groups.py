"""What a decoder's norm groups cost: levels that reach its picture, and how fast a pruned decoder learns colours.

Usage: python benchmarks/decoder_groups.py models/emoji/base --data DATA [--size 64] [--groups 8 2] [--updates 200]

For each number of groups: FOLDER's decoder at half width, trained a little on encoded training pictures (mean squared
error to FOLDER's own pictures of them), and PSNR and the colour share of the error on held-out ones before and after.
`moves`: root mean square of how the picture changes when every channel in front of the last norm gets a gain (0.5 to
4.5) and an offset (deviation 5) of its own; with one channel a group it cannot. DATA's pictures of --size pixels are
reduced to FOLDER's. Minutes on a core.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from pocketfusion.data.sources import open_dataset
from pocketfusion.distill.decoder import DecoderNetwork
from pocketfusion.distill.decoder_pruning import half_shape, prune_decoder
from pocketfusion.distill.decoder_scores import error_parts
from pocketfusion.models.slim_autoencoder import load_vae
from pocketfusion.train.autoencoder import psnr, to_tensor


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
    parser.add_argument("--groups", type=int, nargs="+", default=[8, 2])
    parser.add_argument("--updates", type=int, default=200)
    given = parser.parse_args()
    teacher, data = load_vae(given.folder / "vae"), open_dataset(given.data, given.size)
    rng = np.random.default_rng(0)
    parts = [
        rng.choice(data.indices([split]), count, replace=False)
        for split, count in (("train", 2048), ("val_combo", 128))
    ]
    pictures = to_tensor(data.images[np.concatenate(parts)])
    pictures = F.interpolate(pictures, size=teacher.config.sample_size, mode="area")
    latents = in_parts(lambda part: teacher.encode(part).latent_dist.mean, pictures)
    wanted = in_parts(lambda part: teacher.decode(part).sample, latents)
    (z, held_out), (x, goal) = latents.split([2048, 128]), wanted.split([2048, 128])
    print(f"{'':24s} moves  PSNR at 0  colour   PSNR at {given.updates}  colour")
    print(f"{'teacher':24s} {moves(teacher, held_out):5.3f}")
    for groups in given.groups:
        vae = prune_decoder(teacher, replace(half_shape(teacher), norm_num_groups=groups)).requires_grad_(False)
        network, figures = DecoderNetwork(vae), []
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
        generator = torch.Generator().manual_seed(0)
        for step in range(given.updates + 1):
            if step in (0, given.updates):
                drawn = in_parts(network, held_out)
                whole, constant = error_parts(drawn, goal).mean(0)
                figures.append((psnr(drawn, goal).mean().item(), (constant / whole).item()))
            if step == given.updates:
                break
            chosen = torch.randint(len(z), (16,), generator=generator)
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.mse_loss(network(z[chosen]).float(), x[chosen])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
        name = f"half, {groups} groups of {vae.decoder.conv_norm_out.num_channels // groups}"
        start, end = (f"{decibels:6.2f} dB  {share:.3f}" for decibels, share in figures)
        print(f"{name:24s} {moves(vae, held_out):5.3f}  {start}    {end}")


if __name__ == "__main__":
    main()
