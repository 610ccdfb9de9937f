"""Samples/s and peak memory of distill-steps with and without each memory setting, on random weights, interleaved.

    python benchmarks/train_memory.py [--width 0.2] [--size 128] [--batch 8] [--steps 4] [--rounds 2] [--json FILE]
    python benchmarks/train_memory.py --settings "2 processes, DDP" "2 processes, FSDP2"
    python benchmarks/train_memory.py --width 1 --size 512 --batch 32 --steps 50 --rounds 1     (a GPU, SD-1.5's size)

SD-1.5's UNet at that share of its channels teaches itself by the settings of recipes/sd15.yaml, through the training
loop itself. Each measurement is a process of its own, so that peaks are its own, from when the latents are cached on:
on CUDA what torch allocated at most (torch.cuda.max_memory_allocated) with the share of the device's peak FLOP/s; on a
CPU the resident set, less what was there before the networks, and, in a run of its own, what torch's allocator had
handed out at most: all tensors at the end of a step and what its profiler sees in the next. Beside them what `plan`
computes, of one process where there are several. Offloading moves nothing on a CPU. `compile` (minutes) and several
processes (as many GPUs) are only measured when they are named in --settings. Samples/s are of the median step after
the first two.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import multiprocessing
import os
import socket
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch.profiler import ProfilerActivity, profile
from transformers import CLIPTextConfig, CLIPTextModel

from pocketfusion.artefact import write_json
from pocketfusion.cli.shared import quiet_libraries
from pocketfusion.data.shapes import make_shapes
from pocketfusion.data.sources import open_dataset
from pocketfusion.distill.steps import StepTask, sampling_of
from pocketfusion.folder import machine
from pocketfusion.models.bring.clip_words import clip_tokenizer
from pocketfusion.recipe import Recipe
from pocketfusion.runtime.memory import forget_peak, memory, peak_rss, release
from pocketfusion.train.log import read_log
from pocketfusion.train.loop import train
from pocketfusion.train.memory.room import Planner, works_of
from pocketfusion.train.start import open_start

RECIPE = Path(__file__).parents[1] / "recipes" / "sd15.yaml"
SETTINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "micro_batch 2": {"micro_batch": 2},
    "offload ema, teacher": {"offload": ["ema", "teacher"]},
    "teacher_weights bf16": {"teacher_weights": "bf16"},
    "adamw-8bit": {"optimizer": "adamw-8bit"},
    "all of them": {
        "gradient_checkpointing": True,
        "micro_batch": 2,
        "offload": ["ema", "teacher"],
        "teacher_weights": "bf16",
        "optimizer": "adamw-8bit",
    },
    "compile": {"compile": True},
    "2 processes, DDP": {},
    "2 processes, FSDP2": {},
}
ONLY_NAMED = 3


def narrowed(config: dict[str, Any], share: float) -> dict[str, Any]:
    """With that share of the channels, in groups of 32 still."""
    return config | {"block_out_channels": [max(32, round(share * n / 32) * 32) for n in config["block_out_channels"]]}


def adapted(given: argparse.Namespace, work: Path) -> Recipe:
    """The recipe at this width and size, with the text encoder of the folder in `work`."""
    values = yaml.safe_load(RECIPE.read_text())
    values["data"]["size"] = given.size
    values["text"] |= {"source": str(work / "model"), "cache_states": True}
    for section, name, side in (("teacher", "unet", given.size // 8), ("autoencoder", "config", given.size)):
        values[section][name] = narrowed(values[section][name], given.width) | {"sample_size": side}
    return Recipe.model_validate(values)


def make_inputs(recipe: Recipe, work: Path) -> None:
    """A model folder of random weights and pictures."""
    torch.manual_seed(0)
    text = CLIPTextConfig(hidden_size=768, intermediate_size=768, num_hidden_layers=1, num_attention_heads=12)
    text.vocab_size = 49408
    made = StableDiffusionPipeline(
        unet=UNet2DConditionModel(**recipe.teacher.unet),
        vae=AutoencoderKL(**recipe.autoencoder.config),
        text_encoder=CLIPTextModel(text),
        tokenizer=clip_tokenizer(77, "<|endoftext|>"),
        scheduler=DDIMScheduler(**recipe.teacher.scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.save_pretrained(work / "model")
    make_shapes(work / "data", recipe.data.size)


def measure(recipe: Recipe, name: str, given: argparse.Namespace, work: Path, out: Path, profiled: bool) -> None:
    """One training of a few steps; writes what was measured to `out`."""
    torch.set_num_threads(given.threads)
    now = memory()
    before = now.total if now else 0
    settings = recipe.step_distillation
    assert settings is not None
    values = {"batch_size": given.batch, "steps": 3 if profiled else given.steps, "gradient_accumulation": 1}
    values |= {"warmup_steps": 0, "checkpoint_every": 10**6, "preview_every": 10**6, **SETTINGS[name]}
    trained = type(settings.train).model_validate(settings.train.model_dump() | values)
    settings = settings.model_copy(update={"train": trained})
    student, teacher = open_start(work / "model", recipe), open_start(work / "model", recipe)
    scale = recipe.teacher.guidance_scale
    sampling = sampling_of(teacher, settings.teacher_steps, scale), sampling_of(student, settings.steps, scale)
    task = StepTask(recipe, settings, open_dataset(work / "data", given.size), student, teacher.unet, sampling)
    on_gpu, rank = student.device.type == "cuda", int(os.environ.get("RANK", "0"))
    task.prepare(work / f"cache-{out.stem}", student.vae_hash, student.text.fingerprint, student.device)
    del teacher  # its UNet is kept
    task.preview = lambda model: Image.new("RGB", (8, 8))  # type: ignore[method-assign]
    task.validate = lambda model: {}  # type: ignore[method-assign]
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        release()
        forget_peak()
    peaks, allocator, run = list[float](), Allocator(), out.with_suffix(".run")

    def on_step(step: int, figures: dict[str, float]) -> None:
        peaks.append(float(peak_rss() or 0))
        if profiled and step in (2, 3):  # after the step in which DDP lays its buckets anew
            (allocator.begin if step == 2 else allocator.end)()

    train(task, settings.train, run, fingerprint={}, on_step=on_step)
    if rank:
        return
    lines = [line for line in read_log(run) if "loss" in line]
    found = {"samples_per_second": statistics.median(line["samples_per_second"] for line in lines[2:])}
    found["tflops"] = statistics.median(line["model_tflops"] for line in lines[2:])
    if on_gpu:
        found["peak_gb"] = found["allocated_gb"] = lines[-1]["memory_gb"]
        if "peak_share" in lines[-1]:
            found["peak_share"] = statistics.median(line["peak_share"] for line in lines[2:])
        found["device"] = torch.cuda.get_device_name()
    else:
        found["peak_gb"] = (peaks[-1] - before) / 1e9
    if profiled:
        found = {"allocated_gb": allocator.peak / 1e9}
    changed = recipe.model_copy(update={"step_distillation": settings})
    (planned,) = [one for one in works_of(changed) if one.name == "step_distillation"]
    others = sum(p.numel() for network in (student.vae, student.text.encoder) for p in network.parameters())
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    planner = Planner("cuda" if on_gpu else "cpu", processes, "FSDP2" in name)
    found["planned_gb"] = planner.room(replace(planned, others=others)).peak / 1e9
    out.write_text(json.dumps(found))


class Allocator:
    """What torch's CPU allocator has handed out at most, from `begin` to `end`."""

    def __init__(self) -> None:
        self.peak = 0.0

    def begin(self) -> None:
        """Counts all tensors that there are."""
        gc.collect()
        plain = [one for one in gc.get_objects() if type(one) in (torch.Tensor, torch.nn.Parameter)]
        plain = [one for one in plain if one.device.type == "cpu" and one.layout == torch.strided]
        self._held = sum({one.untyped_storage()._cdata: one.untyped_storage().nbytes() for one in plain}.values())
        del plain
        self._recorded: Any = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._recorded.start()

    def end(self) -> None:
        """Adds what was handed out and taken back since, in its order."""
        self._recorded.stop()
        events = [e for e in self._recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
        changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
        self.peak = self._held + max(itertools.accumulate(changes), default=0)


def start(context: Any, name: str, given: argparse.Namespace, *others: Any) -> None:
    """`measure` in a process of its own, or in as many as the setting's name says."""
    count = int(name.split()[0]) if "processes" in name else 1
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(count):
        told: dict[str, Any] = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_FSDP": "FSDP2" in name}
        told |= {"FSDP_VERSION": 2}
        environment = {key: str(value).lower() for key, value in told.items()} if count > 1 else {}
        processes.append(context.Process(target=_in, args=(environment, name, given, *others)))
        processes[-1].start()
    for process in processes:
        process.join()


def _in(environment: dict[str, str], name: str, given: argparse.Namespace, recipe: Recipe, *others: Any) -> None:
    os.environ.update(environment)
    measure(recipe, name, given, *others)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=float, default=0.2, help="share of SD-1.5's channels")
    parser.add_argument("--size", type=int, default=128, help="pixels; latents are an eighth")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4, help="3 or more")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=[*SETTINGS][:-ONLY_NAMED])
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    quiet_libraries()
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in given.settings}
    context = multiprocessing.get_context("fork")  # the libraries are there, and neither CUDA nor autograd has begun
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        recipe = adapted(given, work)
        maker = context.Process(target=make_inputs, args=(recipe, work))
        maker.start()
        maker.join()
        rounds = [(number, False) for number in range(given.rounds)]
        for number, profiled in [*rounds, *([] if torch.cuda.is_available() else [(given.rounds, True)])]:
            for name in given.settings:
                out = work / f"{number}-{name.replace(' ', '-').replace(',', '')}.json"
                start(context, name, given, recipe, work, out, profiled)
                if out.is_file():
                    found[name].append(json.loads(out.read_text()))
                    print(f"round {number + 1}, {name}: {found[name][-1]}", flush=True)
    _print(found, given)
    if given.json:
        about = {name: value for name, value in vars(given).items() if name != "json"}
        write_json(given.json, {"machine": machine(), **about, "rounds_measured": found})


def _print(found: dict[str, list[dict[str, Any]]], given: argparse.Namespace) -> None:
    width = f"{given.width:g} of SD-1.5's channels, {given.size} px, batch {given.batch}"
    print(f"\n{machine()}, {given.threads} threads of {os.cpu_count()}; {width}; {given.rounds} interleaved rounds")
    print("| settings | samples/s | resident, GB | allocated, GB | planned, GB | TFLOP/s | of the device's peak |")
    print("|---|---|---|---|---|---|---|")
    for name, rounds in found.items():

        def middle(key: str, rounds: list[dict[str, Any]] = rounds) -> str:
            values = [one[key] for one in rounds if key in one]
            return f"{statistics.median(values):.3f}" if values else "-"

        rates = [one["samples_per_second"] for one in rounds if "samples_per_second" in one]
        if not rates:
            print(f"| {name} | did not run | | | | | |")
            continue
        share = [one["peak_share"] for one in rounds if "peak_share" in one]
        shown = f"{100 * statistics.median(share):.1f} %" if share else "not known"
        spread = f"{statistics.median(rates):.2f} ({min(rates):.2f} to {max(rates):.2f})"
        memories = " | ".join(middle(key) for key in ("peak_gb", "allocated_gb", "planned_gb", "tflops"))
        print(f"| {name} | {spread} | {memories} | {shown} |")


if __name__ == "__main__":
    main()
