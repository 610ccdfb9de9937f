"""Starting the same program in two CPU processes with `accelerate launch`."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file


def run_two(
    *arguments: object, port: int, fsdp: bool = False, count: int = 2, seconds: int = 240
) -> subprocess.CompletedProcess[str]:
    """Runs `accelerate launch --num_processes 2 ARGUMENTS`, `seconds` at most, with `fsdp` in its second version."""
    # `--cpu` starts one process whatever the number: `--multi_gpu` is the launcher that starts several, also on CPUs
    options = "--use_fsdp --fsdp_version 2" if fsdp else "--multi_gpu"
    options += f" --num_processes {count} --num_machines 1 --mixed_precision no --dynamo_backend no"
    options += f" --main_process_port {port}"
    command = [sys.executable, "-m", "accelerate.commands.launch", *options.split(), *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=seconds, check=False)


def launch_two(*arguments: object, port: int, fsdp: bool = False, count: int = 2, seconds: int = 240) -> None:
    """Runs it and asserts that it ends well."""
    done = run_two(*arguments, port=port, fsdp=fsdp, count=count, seconds=seconds)
    assert done.returncode == 0, done.stderr[-3000:]


def assert_same_training(one: Path, two: Path, before: Path | None = None) -> None:
    """Two safetensors files hold the same result of training from `before`, but for the order of sums.

    Adam's first steps are the sign of a gradient, so where one is all but zero a rounding moves a weight by a step:
    the updates are compared as a whole.
    """
    first, second = load_file(one), load_file(two)
    start = load_file(before) if before else {name: torch.zeros_like(value) for name, value in first.items()}
    assert first.keys() == second.keys()
    apart = sum((first[name].double() - second[name].double()).square().sum() for name in first)
    moved = sum((first[name].double() - start[name].double()).square().sum() for name in first if name in start)
    assert moved > 0 and (apart / moved).sqrt() < 0.02, f"{(apart / moved).sqrt():.4f} of the update"
