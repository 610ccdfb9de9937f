"""Throughput of step distillation against a plain diffusers loop that learns the same, interleaved.

    python benchmarks/distill_throughput.py recipes/emoji64.yaml --data data/emoji --teacher models/emoji/base \
        --student models/emoji/evolved [--cache DIR] [--rounds 5] [--steps 2] [--threads N] [--json FILE]

One step is an optimiser update of the recipe's `step_distillation`: two teacher steps for every student step (or as
many as the recipe says), L_vani or L_cfg with its p, L_ori on its share of the batch. Ours runs the stage's task
through the same calls as `train`. The plain loop is what one writes with diffusers' parts: pictures and captions
through the frozen encoders every time, DDIMScheduler.step, torch's default attention, plain AdamW, one draw of p for
a whole batch, in fp32 and in bf16 (the teacher too). Its guided and unguided batches are timed apart and weighed by p,
so that few rounds do. EMA is left out on both sides. Prints samples/s (median, min and max of the rounds), the ratios,
and the floating-point operations a second that ours achieves in the UNets.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from full_size_cost import distillation_multiply_adds
from pocketfusion.artefact import write_json
from pocketfusion.data.sources import open_dataset
from pocketfusion.distill.steps import StepTask, sampling_of
from pocketfusion.folder import machine
from pocketfusion.mobile.pipeline_specs import unet_cost
from pocketfusion.models.elastic_unet import load_elastic
from pocketfusion.models.slim_autoencoder import to_tensor
from pocketfusion.recipe import load_recipe
from pocketfusion.train.start import open_start

Step = Callable[[int], None]


def ours(task: StepTask) -> Step:
    """One step of the stage: cached latents and prompt states, null branches only where w is not 1."""
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=1e-5, fused=True)
    precise = task.distill.train.mixed_precision != "bf16"

    def step(number: int) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
            loss, _ = task.loss(task.model, task.plan.part(number, 0, 1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(task.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


class Plain:
    """The plain loop on stock networks of its own."""

    def __init__(self, task: StepTask, teacher: Path, student: Path, bf16: bool):
        self.task, self.bf16, self.settings = task, bf16, task.distill
        pipeline = StableDiffusionPipeline.from_pretrained(teacher, torch_dtype=torch.float32)
        self.teacher, self.vae = pipeline.unet.eval(), pipeline.vae.eval()
        self.text, self.student = task.text, load_elastic(student)
        self.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
        self.scheduler.set_timesteps(self.settings.teacher_steps)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-5)

    def predict(self, unet: torch.nn.Module, z: torch.Tensor, t: torch.Tensor, states: torch.Tensor, w: torch.Tensor):
        """v, guided where `states` holds the null states too."""
        if len(states) == len(z):
            return unet(z, t, states).sample.float()
        uncond, cond = unet(torch.cat([z, z]), t, states).sample.float().chunk(2)
        return uncond + w * (cond - uncond)

    def step(self, number: int, guided: bool) -> None:
        """One update on a batch that is guided as a whole, or not."""
        task, scheduler = self.task, self.scheduler
        rows = task.indices[task.plan.indices(number)]
        ratio = self.settings.teacher_steps // self.settings.steps
        first = ratio * (number % self.settings.steps)
        times = scheduler.timesteps[first : first + ratio]
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            with torch.no_grad():
                x = self.vae.encode(to_tensor(task.data.images[rows])).latent_dist.sample()
                x = x.float() * self.vae.config.scaling_factor
                states = self.text.encode([task.data.rows[i]["captions"][0] for i in rows])[0]
                null = self.text.encode([""])[0].expand_as(states)
                both = torch.cat([null, states]) if guided else states
                w = torch.empty(len(x), 1, 1, 1).uniform_(*self.settings.guidance_range)
                noise = torch.randn_like(x)
                z_t = scheduler.add_noise(x, noise, times[:1].expand(len(x)))
                z = z_t
                for t in times:
                    z = scheduler.step(self.predict(self.teacher, z, t, both, w), t, z).prev_sample
                end = first + ratio
                to = scheduler.timesteps[end] if end < len(scheduler.timesteps) else -1
                product = scheduler.alphas_cumprod[to] if to >= 0 else scheduler.final_alpha_cumprod
                a, s = scheduler.alphas_cumprod[times[0]] ** 0.5, (1 - scheduler.alphas_cumprod[times[0]]) ** 0.5
                a_end, s_end = product**0.5, (1 - product) ** 0.5
                x_target = (z - s_end / s * z_t) / (a_end - s_end / s * a)
            x_hat = a * z_t - s * self.predict(self.student, z_t, times[0], both, w)
            distilled = max((a / s) ** 2, torch.tensor(1.0)) * (x_hat - x_target).square().mean()
            part = slice(0, max(1, round(self.settings.original_share * len(x))))
            t = torch.randint(0, scheduler.config.num_train_timesteps, (len(x[part]),))
            v = self.student(scheduler.add_noise(x[part], noise[part], t), t, states[part]).sample.float()
            original = (v - scheduler.get_velocity(x[part], noise[part], t)).square().mean()
            scale = distilled.detach() / original.detach()
            loss = distilled + self.settings.original_weight * scale * original
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--student", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("bench-cache"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="steps of each loop in a round")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)

    from pocketfusion.cli.shared import quiet_libraries

    quiet_libraries()
    recipe = load_recipe(given.recipe)
    settings = recipe.step_distillation
    assert settings is not None, f"{given.recipe} has no section step_distillation"
    data = open_dataset(given.data, recipe.data.size)
    student, teacher = open_start(given.student, recipe), open_start(given.teacher, recipe)
    scale = settings.guidance_scale or recipe.teacher.guidance_scale
    sampling = sampling_of(teacher, settings.teacher_steps, scale), sampling_of(student, settings.steps, scale)
    task = StepTask(recipe, settings, data, student, teacher.unet, sampling)
    task.prepare(given.cache, student.vae_hash, student.text.fingerprint, torch.device("cpu"))
    task.to(torch.device("cpu"))

    plain = {
        name: Plain(task, given.teacher, given.student, name == "plain bf16") for name in ("plain bf16", "plain fp32")
    }
    loops: dict[tuple[str, str], Step] = {("ours", ""): ours(task)}
    for name, loop in plain.items():
        loops[name, "guided"] = lambda number, loop=loop: loop.step(number, guided=True)
        loops[name, "unguided"] = lambda number, loop=loop: loop.step(number, guided=False)
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in loops}
    for number in range(-1, given.rounds):  # round -1 warms up
        for key, step in loops.items():
            started = time.perf_counter()
            for i in range(given.steps):
                step((number + 1) * given.steps + i)
            if number >= 0:
                seconds[key].append((time.perf_counter() - started) / given.steps)

    p, batch = settings.guidance_probability, settings.train.batch_size
    speeds = {"ours": [batch / taken for taken in seconds["ours", ""]]}
    for name in plain:
        pairs = zip(seconds[name, "guided"], seconds[name, "unguided"], strict=True)
        speeds[name] = [batch / (p * guided + (1 - p) * unguided) for guided, unguided in pairs]
    median = {name: statistics.median(values) for name, values in speeds.items()}
    print(f"{machine()}, {torch.get_num_threads()} threads; batch {batch}, p {p:g}; {given.rounds} interleaved rounds")
    for name, values in speeds.items():
        print(f"{name:>10}: {median[name]:6.1f} samples/s (min {min(values):.1f}, max {max(values):.1f})")
    ratios = {f"ours / {name}": median["ours"] / median[name] for name in plain}
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f}x")
    tokens = recipe.text.max_length
    calls = [unet_cost(one.unet.config, one.unet.architecture, tokens).multiply_adds for one in (teacher, student)]
    cost = distillation_multiply_adds(*calls, settings)
    achieved = 2 * cost * median["ours"]
    print(f"ours: {cost / 1e9:.2f} GMAC a sample, {achieved / 1e9:.1f} GFLOP/s")
    if given.json:
        about = {"machine": machine(), "threads": torch.get_num_threads(), "batch": batch, "p": p}
        figures = {"samples_per_s": speeds, "ratios": ratios, "multiply_adds_a_sample": cost, "flops": achieved}
        write_json(given.json, {**about, **figures})


if __name__ == "__main__":
    main()
