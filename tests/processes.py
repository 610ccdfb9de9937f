"""Starting the same program in two CPU processes with `accelerate launch`."""

import os
import subprocess
import sys


def run_two(*arguments: object, port: int) -> subprocess.CompletedProcess[str]:
    """Runs `accelerate launch --num_processes 2 ARGUMENTS`."""
    # `--cpu` starts one process whatever the number: `--multi_gpu` is the launcher that starts several, also on CPUs
    options = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    options += f" --main_process_port {port}"
    command = [sys.executable, "-m", "accelerate.commands.launch", *options.split(), *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)


def launch_two(*arguments: object, port: int) -> None:
    """Runs it and asserts that it ends well."""
    done = run_two(*arguments, port=port)
    assert done.returncode == 0, done.stderr[-3000:]
