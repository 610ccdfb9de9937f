"""runs/: from a checkpoint file and shards to a checked bundle in two processes, one lost, and what stops it."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from command import _child
from pocketfusion.folder import read_provenance
from pocketfusion.train.log import read_log

RUNS = Path(__file__).parents[1] / "runs"
pytestmark = pytest.mark.timeout(1500)


class Launcher:
    """What tiny.sh runs pocketfusion by: processes forked from one that has the libraries, of one group as torchrun's.

    The script's own launcher is tested by itself: importing torch in 14 processes takes minutes.
    """

    def __init__(self, folder: Path):
        self.ask, self.answer, self.client = (folder / name for name in ("ask", "answer", "client"))
        self.calls: list[list[str]] = []
        self.said, self.die = "", dict[str, tuple[str, int]]()
        for pipe in (self.ask, self.answer):
            os.mkfifo(pipe)
        line = f'printf \'%s\\0\' "$PWD" "$@" >{self.ask}; read -r code <{self.answer}; exit $code\n'
        self.client.write_text(f"#!/usr/bin/env bash\n{line}")
        self.client.chmod(0o755)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while (asked := self.ask.read_text()) != "end":
            where, count, *arguments = asked.split("\0")[:-1]
            self.calls.append(arguments)
            self.answer.write_text(f"{self._run(Path(where), int(count), arguments)}\n")

    def _run(self, where: Path, count: int, arguments: list[str]) -> int:
        """The exit code of the process that failed first, or 0."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context, processes, outputs = multiprocessing.get_context("forkserver"), [], []
        for rank in range(count):
            told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "500"}
            environment |= {name: str(value) for name, value in told.items()} if count > 1 else {}
            files = [self.client.with_name(f"{end}{rank}") for end in ("out", "err")]
            die = self.die.pop(arguments[-1], None) if rank == 1 else None
            state = (str(where), environment, *map(str, files), die)
            processes.append(context.Process(target=_child, args=(arguments, *state)))
            outputs += files
            processes[-1].start()
        code, late = 0, time.monotonic() + 600
        while any(process.exitcode is None for process in processes) and time.monotonic() < late:
            time.sleep(0.05)
            for process in processes:
                if process.exitcode and not code:
                    code = process.exitcode if process.exitcode > 0 else 128 - process.exitcode
                    late = time.monotonic() + 60
        for process in processes:
            process.kill()
            process.join()
        self.said += "".join(file.read_text() for file in outputs)
        return code

    def run(self, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """runs/tiny.sh OUT; in `calls` and `said` is what it ran and what was said to it."""
        self.calls, self.said = [], ""
        env = {**os.environ, "POCKETFUSION": f"{self.client} 1", "LAUNCH": f"{self.client} 2", **environment}
        return subprocess.run(
            [RUNS / "tiny.sh", out], env=env, capture_output=True, text=True, timeout=1400, check=False
        )

    def close(self) -> None:
        self.ask.write_text("end")


@pytest.fixture(scope="module")
def launcher(tmp_path_factory):
    made = Launcher(tmp_path_factory.mktemp("launcher"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def finished(launcher, tmp_path_factory):
    """The whole of tiny.sh, whose second process is lost in the second training, and then again to its end."""
    out = tmp_path_factory.mktemp("run") / "out"
    launcher.die["base-16"] = ("pocketfusion.train.loop:learning_rate_at", 5)  # two a step: in the third
    first = launcher.run(out)
    said, calls, lines = launcher.said, launcher.calls, read_log(out / "base-16.run")
    second = launcher.run(out)
    assert second.returncode == 0, second.stderr + launcher.said
    return out, first, said, calls, lines, second, launcher.calls


@pytest.fixture(autouse=True, scope="module")
def inputs_by_hand():
    """tiny_inputs.py runs in a process of its own, and finds this tree's package."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"], os.environ["PYTHON"] = str(RUNS.parent / "src"), sys.executable
    yield
    os.environ.pop("PYTHON")
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


def test_a_lost_process_stops_the_script_where_it_was(finished):
    _, first, said, calls, *_ = finished
    assert first.returncode == 128 + signal.SIGKILL, first.stderr + said
    assert "the stage base-16 stopped with exit code 137" in first.stderr and "run the same line again" in first.stderr
    assert "a process of the 2 has died" in said
    assert [call[0] for call in calls] == ["import", "plan", "data", "to-v", "distill-steps"]


def test_the_same_line_again_ends_with_a_checked_bundle(finished):
    out, *_, lines, second, calls = finished
    assert [call[0] for call in calls][:4] == ["plan", "data", "to-v", "distill-steps"]  # nothing is imported again
    assert (out / "bundle" / "bundle.json").is_file() and second.stdout.endswith(f"{out / 'bundle'}\n")
    cache = json.loads((out / "data" / "cache.json").read_text())
    assert cache["count"] == 32 and len(list((out / "data" / "parts").iterdir())) == 2
    for name, stage in {"v": "to-v", "base-16": "distill-steps", "student": "distill-steps", "final": ""}.items():
        made = read_provenance(out / name)
        assert made is not None and made.finished and stage in made.stage
        steps = [line["step"] for line in read_log(out / f"{name}.run") if "loss" in line]
        assert steps == [1, 2, 3, 4], name
    assert read_log(out / "base-16.run")[:2] == lines[:2]  # it went on from the checkpoint of step 2
    assert json.loads((out / "final" / "provenance.json").read_text())["parents"]


@pytest.fixture
def other(finished, tmp_path):
    """An OUT of another run that begins from the imported folder, with a recipe of its own."""
    out = tmp_path / "other"
    shutil.copytree(finished[0] / "inputs", out / "inputs")
    return out


def stopped(done: subprocess.CompletedProcess[str], stage: str) -> bool:
    return done.returncode == 2 and f"the stage {stage} stopped with exit code 2" in done.stderr


def test_what_cannot_work_is_told_before_hours_are_spent(launcher, finished, other):
    base = {"CHECKPOINT": str(finished[0] / "stable-diffusion-v1-5")}
    done = launcher.run(other, **base, PROCESSES="3")
    assert stopped(done, "plan") and "batch_size 4 does not divide by 3 processes" in launcher.said
    recipe = yaml.safe_load((other / "inputs" / "recipe.yaml").read_text())
    recipe["to_v"]["train"]["log_with"] = ["dvclive"]
    (other / "inputs" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = launcher.run(other, **base)
    assert stopped(done, "plan") and "the tracker dvclive is not installed: pip install dvclive" in launcher.said


def test_a_cache_of_another_autoencoder_and_a_lost_server_stop_it(launcher, finished, other):
    base = {"CHECKPOINT": str(finished[0] / "stable-diffusion-v1-5")}
    shutil.copytree(finished[0] / "data", other / "data")
    plan = json.loads((other / "data" / "plan.json").read_text())
    plan["encoding"]["autoencoder"] = "0" * 64
    (other / "data" / "plan.json").write_text(json.dumps(plan))
    done = launcher.run(other, **base)
    assert stopped(done, "cache") and "autoencoder" in launcher.said and "Trace" not in launcher.said
    shutil.rmtree(other / "data")
    done = launcher.run(other, **base, DATA="http://127.0.0.1:9/shard.tar")
    assert stopped(done, "cache") and "http://127.0.0.1:9/shard.tar" in launcher.said


def test_the_scripts_own_launcher_ends_with_the_commands_sentence_and_code(tmp_path):
    command = "--standalone --nproc-per-node=2 -m pocketfusion to-v base --recipe missing.yaml --data data --out v"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    line = [sys.executable, RUNS / "launch.py", *command.split()]
    done = subprocess.run(line, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 2, done.stderr
    assert "missing.yaml" in done.stderr and "Traceback" not in done.stderr and "FAILED" not in done.stderr


@pytest.mark.slow
def test_tiny_sh_with_its_own_launcher(tmp_path):
    done = subprocess.run([RUNS / "tiny.sh", tmp_path / "out"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out" / "bundle" / "bundle.json").is_file()


@pytest.mark.parametrize("script", sorted(RUNS.glob("*.s*")), ids=lambda path: path.name)
def test_the_scripts_are_bash(script):
    subprocess.run(["bash", "-n", script], check=True)
