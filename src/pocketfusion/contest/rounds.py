"""`bench --all`: one UNet on every runtime, each in a process of its own, drawing the same pictures in turns.

All start a picture from the same latents and go on from their own predictions, so that its difference to PyTorch's is
what a user would see. Text encoder, sampler and decoder are the same for all: PyTorch's, in this process.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from pocketfusion.contest.call_worker import receive, send
from pocketfusion.contest.contenders import CONTENDERS, REFERENCE, Call, Prepared, Subject, missing
from pocketfusion.contest.unet_subject import PROMPT, Drawing, Scene
from pocketfusion.errors import PocketfusionError
from pocketfusion.likeness import psnr
from pocketfusion.runtime.output import cpu_name, spread

#: Called with what is being done.
Progress = Callable[[str], None]
#: What drivers that compute on the CPU have in their names.
_SOFTWARE = ("swiftshader", "llvmpipe", "lavapipe")
_VERSIONS = ("torch", "ai-edge-litert", "onnxruntime", "openvino")


@dataclass(frozen=True)
class Table:
    """`rows` by contender, `left_out` the others with the reason, and what all of it depends on."""

    rows: list[dict[str, Any]]
    left_out: dict[str, str]
    about: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def contest(
    subject: Subject,
    names: Sequence[str],
    *,
    runs: int = 2,
    steps: int | None = None,
    progress: Progress = lambda stage: None,
) -> Table:
    """Draws `runs` pictures (seeds 0, 1, ...) of `steps` steps (None: the folder's) with each contender of `names`.

    A row has the files' size in bytes; the GPU's name, else nothing, and if it computes on the CPU; seconds to load,
    from opening the file to the end of the first call, which is counted here alone; the spread of all steps;
    `peak_rss` in bytes, of which `rss_before_loading` was there before; `psnr_db` of its pictures to the reference's,
    all together; `ratio`, the reference's median step to its own.
    Raises PocketfusionError for a folder that is none, and where the reference itself cannot run.
    """
    if runs < 1:
        raise PocketfusionError(f"the number of runs is {runs}: choose 1 or more")
    progress("the prompt by PyTorch")
    scene = Scene(subject, steps)
    left_out: dict[str, str] = {}
    with ExitStack() as stack:
        workers: dict[str, _Worker] = {}
        for name in names:
            progress(name)
            try:
                workers[name] = stack.enter_context(_started(name, subject))
                workers[name].ask(Drawing(scene, 0).call(0))  # the first call, which many runtimes compile in
            except _CannotRun as error:
                workers.pop(name, None)
                left_out[name] = str(error)
        if REFERENCE not in workers:
            raise PocketfusionError(f"PyTorch cannot run {subject.folder} here ({left_out[REFERENCE]})")
        loads = {name: worker.answer["since_load"] for name, worker in workers.items()}
        seconds: dict[str, list[float]] = {name: [] for name in workers}
        pictures: dict[str, list[np.ndarray]] = {name: [] for name in workers}
        for seed in range(runs):
            drawings = {name: Drawing(scene, seed) for name in workers}
            for step in range(scene.steps):
                progress(f"picture {seed + 1} of {runs}, step {step + 1} of {scene.steps}")
                for name, worker in workers.items():
                    drawings[name].take(step, worker.ask(drawings[name].call(step)))
                    seconds[name].append(worker.answer["seconds"])
            for name, drawing in drawings.items():
                pictures[name].append(scene.picture(drawing.latents))
        rows = [
            {
                "name": name,
                "runtime": CONTENDERS[name.partition(":")[0]].label,
                "device": worker.device,
                "software": any(one in worker.device.lower() for one in _SOFTWARE),
                "weights": name.partition(":")[2],
                "size": worker.size,
                "load_seconds": loads[name],
                "step_seconds": spread(seconds[name]),
                "peak_rss": worker.answer["peak_rss"],
                "rss_before_loading": worker.answer["before"],
                "psnr_db": round(psnr(np.stack(pictures[REFERENCE]), np.stack(pictures[name])), 2),
            }
            for name, worker in workers.items()
        ]
    median = rows[0]["step_seconds"]["median"]
    for row in rows:
        row["ratio"] = median / row["step_seconds"]["median"]
    return Table(rows, left_out, _about(subject, scene, runs))


def _about(subject: Subject, scene: Scene, runs: int) -> dict[str, Any]:
    versions = {}
    for package in _VERSIONS:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "folder": subject.folder,
        "image_size": list(scene.image_size),
        "prompt": PROMPT,
        "steps": scene.steps,
        "runs": runs,
        "guidance": scene.guidance,
        "guidance_scale": scene.scale,
        "unet_batch": len(scene.states),
        "threads": subject.threads,
        "cpu": cpu_name(),
        "python": platform.python_version(),
        "versions": versions,
    }


class _CannotRun(Exception):
    """Why a contender is left out."""


def _started(name: str, subject: Subject) -> _Worker:
    """The contender's process, its file made; raises _CannotRun."""
    if reason := missing(name):
        raise _CannotRun(reason)
    device, environment = "", {}
    if name.startswith("litert-gpu"):
        from pocketfusion.mobile.delegate.stack import advice, choose, find_stacks

        stack = choose(find_stacks(), "fp32")
        if stack is None:
            raise _CannotRun(f"no GPU driver works here: {advice()}")
        environment, device = dict(stack.environment), stack.adapter
    with _Worker(name, subject, None, {}) as worker:
        said, _ = worker.read()
    prepared = Prepared(tuple(said["files"]), said["about"])
    return _Worker(name, subject, prepared, environment, device)


class _Worker:
    """A process that prepares a contender (`prepared` None), or has it loaded and answers calls."""

    def __init__(
        self,
        name: str,
        subject: Subject,
        prepared: Prepared | None,
        environment: dict[str, str],
        device: str = "",
    ) -> None:
        self.name, self.device, self.size = name, device, prepared.size if prepared else 0
        self.answer: dict[str, Any] = {}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pocketfusion.contest.call_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": str(subject.threads), **environment},
        )
        task = {"name": name, "subject": asdict(subject), "prepared": asdict(prepared) if prepared else None}
        self._send(task, {})

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.communicate()

    def ask(self, call: Call) -> np.ndarray:
        """The prediction for a call's inputs; what else was said of it is the `answer`."""
        self._send({}, call)
        self.answer, arrays = self.read()
        return arrays["prediction"]

    def _send(self, said: dict[str, Any], arrays: Call) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended: read() tells how
            send(self._process.stdin, said, arrays)

    def read(self) -> tuple[dict[str, Any], Call]:
        """The next answer; raises _CannotRun for an error, and PocketfusionError for one of a sound contender."""
        assert self._process.stdout is not None
        message = receive(self._process.stdout)
        if message is None:
            raise self._failed(f"its process ended with code {self._process.wait()}: see if memory is short")
        if "error" in message[0]:
            raise self._failed(message[0]["error"])
        return message

    def _failed(self, reason: str) -> Exception:
        if self.answer:  # it was loaded and had answered
            return PocketfusionError(f"{self.name} gave up while drawing ({reason}): leave it out by --only")
        return _CannotRun(reason)
