"""Starting the same program in two CPU processes, as `accelerate launch` does."""

import os
import subprocess
import sys


def launch_two(*arguments: object, port: int) -> None:
    """Runs `accelerate launch --num_processes 2 ARGUMENTS` and asserts that it ends well."""
    options = "--cpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    options += f" --main_process_port {port}"
    command = [sys.executable, "-m", "accelerate.commands.launch", *options.split(), *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
