"""The run folder of a search: every evaluation is on disk before the next begins, so a killed search goes on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from pocketfusion.artefact import write_json
from pocketfusion.errors import PocketfusionError
from pocketfusion.locks import hold


class Ledger:
    """`state.json` (what the search was begun with) and `evaluations.jsonl` (one line an evaluation) in a folder.

    Without a folder it keeps evaluations in memory. Raises PocketfusionError if the folder holds another search,
    or another process has it.
    """

    def __init__(self, run: Path | None, identity: dict[str, Any]):
        self.run = run
        self._scores: dict[tuple[int, str], np.ndarray] = {}
        self.seconds: list[float] = []  #: of each evaluation
        if run is None:
            return
        hold(run)
        state = run / "state.json"
        now = json.loads(json.dumps(identity))
        if state.is_file():
            before = json.loads(state.read_text(encoding="utf-8"))
            differing = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
            if differing:
                raise PocketfusionError(
                    f"the run in {run} was begun with another {', '.join(differing)}: delete it or give another --run"
                )
        else:
            write_json(state, now)
        self._path = run / "evaluations.jsonl"
        self._read()

    def _read(self) -> None:
        text = self._path.read_bytes() if self._path.is_file() else b""
        whole = text[: text.rfind(b"\n") + 1]  # a kill may have cut the last line short
        for number, line in enumerate(whole.decode("utf-8").split("\n")[:-1], 1):
            try:
                entry = json.loads(line)
                self._scores[entry["round"], entry["action"]] = np.array(entry["scores"])
                self.seconds.append(entry["seconds"])
            except (ValueError, KeyError, TypeError):
                raise PocketfusionError(
                    f"line {number} of {self._path} is damaged: delete from there on to go on from before it"
                ) from None
        if whole != text:
            with self._path.open("r+b") as file:
                file.truncate(len(whole))

    def get(self, number: int, action: str) -> np.ndarray | None:
        """Per-picture scores [N] of an evaluation of round `number` (`action` "" is the round's network), if known."""
        return self._scores.get((number, action))

    def add(self, number: int, action: str, scores: np.ndarray, seconds: float) -> np.ndarray:
        """Keeps an evaluation, flushed to disk; returns the scores as they were kept, to four decimals."""
        kept = np.round(scores.astype(np.float64), 4)
        self._scores[number, action] = kept
        self.seconds.append(round(seconds, 3))
        if self.run is not None:
            line = {"round": number, "action": action, "mean": round(float(kept.mean()), 4)}
            line |= {"seconds": self.seconds[-1], "scores": kept.tolist()}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
        return kept
