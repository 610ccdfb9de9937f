"""What the recipe sd15 costs at full size: multiply-adds a sample, samples, and GPU-hours at a stated utilisation.

    python benchmarks/full_size_cost.py [recipes/sd15.yaml] [--tflops 312] [--utilisation 0.28] [--json FILE]

GPU-hours = samples × multiply-adds a sample × 2 / (peak × utilisation) / 3600. Multiply-adds are counted on shapes;
a backward pass counts as two forward passes. The student is the `snapfusion` preset. `--tflops` is the peak of the
hardware in the training precision (A100, bf16 without sparsity: 312). The utilisation is others' measurement of the
like: mosaicml/diffusion's README trains SD-2-base's UNet at 512 px on cached latents at 290 pictures/s on 8 A100s
(1,195 on 32, 4,590 on 128), 36.25 a GPU; of 3 × 401.6 GMAC each that is 28 % of the peak (29 and 28). Ours on a GPU
is not measured: benchmarks/train_memory.py prints what a machine achieves.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL

from pocketfusion.artefact import write_json
from pocketfusion.distill.ddim import step_ratio
from pocketfusion.distill.decoder import DecoderNetwork
from pocketfusion.distill.decoder_pruning import half_shape
from pocketfusion.mobile.pipeline_specs import multiply_adds, unet_cost
from pocketfusion.models.elastic.architecture import Architecture
from pocketfusion.models.elastic.presets import snapfusion
from pocketfusion.models.slim_autoencoder import SlimAutoencoderKL
from pocketfusion.recipe import Recipe, StepDistillSettings, TrainSettings, load_recipe

#: 290 pictures/s on 8 A100s; see above.
UTILISATION = 0.28


class Stage(NamedTuple):
    """A row: samples and multiply-adds a sample."""

    name: str
    samples: int
    multiply_adds: float
    formula: str

    def gpu_hours(self, flops: float) -> float:
        """At `flops` achieved floating-point operations a second."""
        return self.samples * self.multiply_adds * 2 / flops / 3600


def distillation_multiply_adds(teacher: float, student: float, settings: StepDistillSettings) -> float:
    """A sample of `distill-steps`, given multiply-adds of one call of each UNet.

    Teacher: K forward passes; student: one forward and backward pass; both twice for the share p of guided samples;
    L_ori: one more forward and backward pass on its share of the batch.
    """
    branches = 1 + settings.guidance_probability
    ratio = step_ratio(settings.teacher_steps, settings.steps)
    original = settings.original_share if settings.original_weight else 0.0
    return branches * ratio * teacher + 3 * (branches + original) * student


class _Encoder(torch.nn.Module):
    """An autoencoder's encoder with its 1x1 convolution, as one network to count."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.vae.encode(x).latent_dist.mean


def networks(recipe: Recipe) -> dict[str, float]:
    """Multiply-adds of one call, batch 1: F base UNet, S `snapfusion` preset, E encoder, D decoder, H half decoder."""
    config = recipe.teacher.unet | {"mid_block_type": "UNetMidBlock2DCrossAttn"}
    tokens, side = recipe.text.max_length, recipe.teacher.unet["sample_size"]
    with torch.device("meta"):
        vae = AutoencoderKL(**recipe.autoencoder.config)
        narrow = {f"decoder_{name}": value for name, value in asdict(half_shape(vae)).items()}
        slim = SlimAutoencoderKL(**recipe.autoencoder.config, **narrow)
        x = torch.zeros(1, 3, recipe.data.size, recipe.data.size)
        z = torch.zeros(1, vae.config.latent_channels, side, side)
        return {
            "F": unet_cost(config, Architecture.stock(config), tokens).multiply_adds,
            "S": unet_cost(config, snapfusion(config), tokens).multiply_adds,
            "E": multiply_adds(_Encoder(vae), {"x": x}),
            "D": multiply_adds(DecoderNetwork(vae), {"z": z}),
            "H": multiply_adds(DecoderNetwork(slim), {"z": z}),
        }


def stages(recipe: Recipe, pictures: int) -> list[Stage]:
    """What the recipe runs, in order; raises AssertionError if it lacks a section."""
    assert recipe.to_v and recipe.elastic and recipe.recovery and recipe.step_distillation and recipe.decoder
    base, small, encode, decode, half = (networks(recipe)[key] for key in "FSEDH")
    steps, decoder = recipe.step_distillation, recipe.decoder
    first = steps.model_copy(update={"steps": 16, "teacher_steps": 32})
    p = steps.guidance_probability

    def samples(train: TrainSettings) -> int:
        return train.steps * train.batch_size

    def distilled(name: str, student: float, settings: StepDistillSettings) -> Stage:
        letter = "F" if student == base else "S"
        formula = f"{2 * (1 + p):g}F + {3 * (1 + p + settings.original_share):g}{letter}"
        return Stage(name, samples(settings.train), distillation_multiply_adds(base, student, settings), formula)

    drawn = 2 * (decoder.num_inference_steps or 50)
    return [
        Stage("latents and mirror images, once", pictures, 2 * encode, "2E"),
        Stage("to-v", samples(recipe.to_v.train), 3 * base, "3F"),
        Stage("train-elastic (all blocks counted)", samples(recipe.elastic.train), 3 * base, "3F"),
        # Algorithm 1 as the paper evaluates: 38 blocks left out in turn, 2,000 pictures each, 50 guided steps
        Stage("evolve: one ranking", 38 * 2000, 100 * base + decode, "100F + D"),
        Stage("recover", samples(recipe.recovery.train), base + 3 * small, "F + 3S"),
        distilled("distill-steps 32 to 16, base", base, first),
        distilled("distill-steps 32 to 16, student", small, first),
        distilled("distill-steps 16 to 8, student", small, steps),
        Stage("distill-decoder: drawing", decoder.samples, drawn * base, f"{drawn}F"),
        Stage("distill-decoder: training", samples(decoder.train), decode + 3 * half, "D + 3H"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, nargs="?", default=Path("recipes/sd15.yaml"))
    parser.add_argument("--tflops", type=float, default=312.0)
    parser.add_argument("--utilisation", type=float, default=UTILISATION)
    parser.add_argument("--pictures", type=int, default=1_000_000, help="size of your data set")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    recipe = load_recipe(given.recipe)
    flops = given.tflops * 1e12 * given.utilisation
    counted, rows = networks(recipe), stages(recipe, given.pictures)
    print("GMAC of one call, batch 1: " + ", ".join(f"{name} {value / 1e9:.1f}" for name, value in counted.items()))
    print(f"at {given.tflops:g} TFLOP/s peak and {given.utilisation:.0%} utilisation:")
    print(f"{'stage':<36}{'samples':>14}{'formula':>14}{'GMAC/sample':>13}{'GPU-hours':>11}")
    for row in rows:
        cost = f"{row.multiply_adds / 1e9:,.0f}"
        print(f"{row.name:<36}{row.samples:>14,}{row.formula:>14}{cost:>13}{row.gpu_hours(flops):>11,.1f}")
    total = sum(row.gpu_hours(flops) for row in rows)
    print(f"{'together':<36}{'':>41}{total:>11,.1f}")
    if given.json:
        table = [{**row._asdict(), "gpu_hours": row.gpu_hours(flops)} for row in rows]
        about = {"recipe": given.recipe.name, "tflops": given.tflops, "utilisation": given.utilisation}
        write_json(given.json, {**about, "multiply_adds": counted, "stages": table, "gpu_hours": total})


if __name__ == "__main__":
    main()
