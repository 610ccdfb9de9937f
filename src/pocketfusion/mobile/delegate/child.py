"""Talks to the oracle's child process: one job at a time, surviving its crashes and hangs."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Answer:
    """What became of a job: `error` is empty if it went well, `ended` says whether the process outlived it.

    `outputs` are the arrays by name, None for a job without inputs or that failed; `log` is what native code wrote.
    """

    error: str
    outputs: dict[str, np.ndarray] | None
    log: str
    seconds: float
    ended: bool = False


class Child:
    """A worker process, started when first asked and again after a crash. Use it as a context manager."""

    def __init__(self, environment: Mapping[str, str], folder: Path, threads: int = 1) -> None:
        """`environment` selects the Vulkan driver, on top of this process's; scratch files go into `folder`."""
        self.environment, self.folder, self.threads = dict(environment), folder, threads
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str] = queue.Queue()

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.stop()

    def ask(
        self,
        file: Path,
        inputs: Mapping[str, np.ndarray] | None = None,
        *,
        device: str = "gpu",
        precision: str = "fp32",
        signature: str = "serving_default",
        timeout: float = 600,
    ) -> Answer:
        """Compiles `file` and, with `inputs`, runs it. A crash or more than `timeout` seconds is an answer too."""
        log, results = self.folder / "log", self.folder / "outputs.npz"
        log.write_bytes(b"")
        job: dict[str, Any] = {
            "file": str(file),
            "device": device,
            "precision": precision,
            "signature": signature,
            "threads": self.threads,
            "log": str(log),
        }
        if inputs is not None:
            np.savez(self.folder / "inputs.npz", **inputs)  # type: ignore[arg-type]
            job |= {"inputs": str(self.folder / "inputs.npz"), "outputs": str(results)}
        try:
            line = self._exchange(json.dumps(job), timeout)
        except queue.Empty:
            self.stop()
            return Answer(f"no answer within {timeout:g} s", None, _text(log), timeout, ended=True)
        if not line:
            code = self._process.wait() if self._process else 0
            self.stop()
            what = f"signal {-code}" if code < 0 else f"exit code {code}"
            return Answer(f"the process crashed ({what})", None, _text(log), 0.0, ended=True)
        answer = json.loads(line)
        outputs = None
        if "error" not in answer and inputs is not None:
            with np.load(results) as arrays:
                outputs = dict(arrays)
            results.unlink()
        return Answer(answer.get("error", ""), outputs, _text(log), answer["seconds"])

    def _exchange(self, line: str, timeout: float) -> str:
        if self._process is None:
            self._start()
        assert self._process and self._process.stdin
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return ""
        return self._answers.get(timeout=timeout)

    def _start(self) -> None:
        environment = {**os.environ, **self.environment}
        if "LD_LIBRARY_PATH" in self.environment and "LD_LIBRARY_PATH" in os.environ:
            environment["LD_LIBRARY_PATH"] = f"{self.environment['LD_LIBRARY_PATH']}:{os.environ['LD_LIBRARY_PATH']}"
        environment.setdefault("XDG_RUNTIME_DIR", str(self.folder))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pocketfusion.mobile.delegate.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            text=True,
        )
        self._answers = queue.Queue()
        threading.Thread(target=_read, args=(self._process.stdout, self._answers), daemon=True).start()

    def stop(self) -> None:
        """Ends the process, if there is one; the next job starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def _read(stream: Any, answers: queue.Queue[str]) -> None:
    """Hands on the stream's lines, and an empty one at its end."""
    try:
        for line in stream:
            answers.put(line)
    except ValueError:  # closed while reading
        pass
    answers.put("")


def _text(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")
