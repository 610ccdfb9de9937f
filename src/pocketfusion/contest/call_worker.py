"""A contender's process: prepares its file, or loads it and answers calls.

A process of its own, as peak memory belongs to one, and as the choice of a Vulkan driver is read when it starts.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
from typing import IO, Any

import numpy as np

from pocketfusion.contest.contenders import CONTENDERS, Call, Prepared, Subject
from pocketfusion.errors import told
from pocketfusion.runtime.memory import peak_rss


def send(stream: IO[bytes], said: dict[str, Any], arrays: Call) -> None:
    """A message: JSON values and arrays by name."""
    raw = io.BytesIO()
    np.savez(raw, _said=np.array(json.dumps(said)), **arrays)  # type: ignore[arg-type]  # arrays by name
    stream.write(raw.tell().to_bytes(8, "little") + raw.getvalue())
    stream.flush()


def receive(stream: IO[bytes]) -> tuple[dict[str, Any], Call] | None:
    """The next message; None at the end."""
    size = stream.read(8)
    if len(size) < 8:
        return None
    with np.load(io.BytesIO(stream.read(int.from_bytes(size, "little")))) as found:
        arrays = {name: found[name] for name in found.files if name != "_said"}
        return json.loads(str(found["_said"])), arrays


def main() -> None:
    """Reads what to do, then a call's inputs for every prediction that it answers with."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever native code prints is no answer
    try:
        task, _ = receive(sys.stdin.buffer) or ({}, {})
        runtime, _, weights = task["name"].partition(":")
        contender, subject = CONTENDERS[runtime], Subject(**task["subject"])
        if task["prepared"] is None:
            prepared = contender.prepare(subject, weights)
            send(answers, {"files": prepared.files, "about": prepared.about}, {})
            return
        before, began = peak_rss(), time.perf_counter()
        call = contender.load(subject, Prepared(**task["prepared"]), weights)
        while (message := receive(sys.stdin.buffer)) is not None:
            start = time.perf_counter()
            prediction = call(message[1])
            ended = time.perf_counter()
            since = {"seconds": ended - start, "since_load": ended - began, "before": before, "peak_rss": peak_rss()}
            send(answers, since, {"prediction": prediction})
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        send(answers, {"error": told(error) or lines[0][:200]}, {})


if __name__ == "__main__":
    main()
