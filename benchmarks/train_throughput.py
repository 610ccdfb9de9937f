"""Training throughput of the teacher against the plainest diffusers loop, interleaved, at equal settings.

    python benchmarks/train_throughput.py recipes/emoji64.yaml --data data/emoji --autoencoder AE

The plain loop is what diffusers' text-to-image example does each step: encode pictures and captions, add noise, run
the UNet with its default attention, plain AdamW; EMA is left out on both sides. It runs in fp32, the example's
default, and in bf16. Ours runs the recipe's task through the same calls as `train`. Prints samples/s: median, min and
max of the rounds, and the ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler

from pocketfusion.data.sources import open_dataset
from pocketfusion.folder import folder_hash, machine
from pocketfusion.models.slim_autoencoder import to_tensor
from pocketfusion.models.text_encoder import load_text_encoder
from pocketfusion.recipe import Recipe, load_recipe
from pocketfusion.train.teacher import TeacherTask, fast_attention


def ours(recipe: Recipe, task: TeacherTask) -> Callable[[int], None]:
    """One step of the recipe's task in bf16 with cached latents and prompt states."""
    unet = task.model
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, fused=True)

    def step(number: int) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = task.loss(unet, task.plan.part(number, 0, 1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def plain(recipe: Recipe, task: TeacherTask, unet: UNet2DConditionModel, bf16: bool) -> Callable[[int], None]:
    """One step of the example script: pictures and captions through the frozen encoders every time."""
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4)
    schedule = get_scheduler("constant", optimizer)
    scheduler, data, vae, text = task.scheduler, task.data, task.vae, task.text

    def step(number: int) -> None:
        rows = task.indices[task.plan.indices(number)]
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            with torch.no_grad():
                latents = vae.encode(to_tensor(data.images[rows])).latent_dist.sample() * vae.config.scaling_factor
                states = text.encode([data.rows[i]["captions"][0] for i in rows])[0]
            noise = torch.randn_like(latents)
            t = torch.randint(0, scheduler.config.num_train_timesteps, (len(rows),))
            prediction = unet(scheduler.add_noise(latents, noise, t), t, states).sample
            loss = torch.nn.functional.mse_loss(prediction.float(), scheduler.get_velocity(latents, noise, t).float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--autoencoder", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("bench-cache"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="steps of each loop in a round")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    recipe = load_recipe(arguments.recipe)
    data, text = open_dataset(arguments.data, recipe.data.size), load_text_encoder(recipe.text)
    vae = AutoencoderKL.from_pretrained(arguments.autoencoder).requires_grad_(False)
    networks = [UNet2DConditionModel(**recipe.teacher.unet) for _ in range(3)]
    fast_attention(networks[0], torch.device("cpu"))
    task = TeacherTask(recipe, data, networks[0], vae, text)
    assert isinstance(task.scheduler, DDIMScheduler)
    task.prepare(arguments.cache, folder_hash(arguments.autoencoder), text.fingerprint, torch.device("cpu"))
    loops = {
        "ours": ours(recipe, task),
        "plain bf16": plain(recipe, task, networks[1], bf16=True),
        "plain fp32": plain(recipe, task, networks[2], bf16=False),
    }
    speeds: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(-1, arguments.rounds):  # round -1 warms up
        for name, step in loops.items():
            started = time.perf_counter()
            for i in range(arguments.steps):
                step((number + 1) * arguments.steps + i)
            if number >= 0:
                seconds = time.perf_counter() - started
                speeds[name].append(arguments.steps * recipe.teacher.train.batch_size / seconds)
    median = {name: statistics.median(values) for name, values in speeds.items()}
    print(f"{machine()}; batch {recipe.teacher.train.batch_size}; {arguments.rounds} interleaved rounds")
    for name, values in speeds.items():
        print(f"{name:>10}: {median[name]:6.1f} samples/s (min {min(values):.1f}, max {max(values):.1f})")
    ratios = {f"ours / {name}": median["ours"] / median[name] for name in loops if name != "ours"}
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f}x")
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"samples_per_s": speeds, "ratios": ratios, "machine": machine()}, indent=2)
        )


if __name__ == "__main__":
    main()
