"""SnapFusion's Algorithm 1 (arXiv 2306.00980): rank the blocks, change a group of them, train, and again.

The paper gives neither group size, number of rounds nor stopping rule; those here are ours, and so are the actions
beside removing and copying blocks (docs/efficient-unet.md).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict

from pocketfusion.artefact import write_json
from pocketfusion.errors import PocketfusionError
from pocketfusion.evolve.actions import Action, ActionKind, apply_all, copies, reductions
from pocketfusion.evolve.values import (
    ActionValue,
    Latency,
    action_value,
    choose_copies,
    choose_reductions,
    mean_and_error,
    ranking,
)
from pocketfusion.locks import hold
from pocketfusion.models.elastic.architecture import Architecture

Progress = Callable[[int, int, int], None]  #: round, evaluations done, evaluations in it


class Scorer(Protocol):
    """Scores a network's pictures of a fixed validation set from fixed noise."""

    def score(self, network: Any) -> np.ndarray:
        """CLIP score (100 x cosine) of each picture, [N], always in the same order."""


@dataclass(frozen=True)
class Tools:
    """What the search works with. A network is anything with an `architecture`: an ElasticUNet outside of tests."""

    scorer: Scorer
    latency: Latency
    config: Mapping[str, Any]  #: of the base: which actions its shapes allow
    rebuild: Callable[[Any, Architecture], Any]  #: the network with another architecture; the given one is untouched
    train: Callable[[Any, int], Any]  #: robust training after round n; goes on from its own checkpoints if killed
    save: Callable[[Any, Path], None]  #: writes the folder atomically
    load: Callable[[Path], Any]


class Settings(BaseModel):
    """Budget in ms of one guided step; most rounds; most actions a round; kinds of action."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    budget_ms: float
    rounds: int
    group: int
    kinds: tuple[ActionKind, ...]


class Round(BaseModel):
    """A round's network (latency, mean score and its standard error), all measured values, and those taken."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    number: int
    latency_ms: float
    score: float
    error: float
    values: tuple[ActionValue, ...] = ()
    taken: tuple[ActionValue, ...] = ()
    undone: bool = False  #: the copies that led here did not improve the score


@dataclass(frozen=True)
class Outcome:
    """The evolved network, the rounds that led to it, and why the search stopped."""

    network: Any
    rounds: list[Round]
    stopped: str


class OutOfTime(Exception):
    """`--max-minutes` are over; what is done is on disk."""


class Search:
    """Evaluates and ranks, each evaluation at most once; `deadline` in `time.monotonic()` seconds."""

    def __init__(
        self,
        tools: Tools,
        ledger: Ledger,
        deadline: float = float("inf"),
        progress: Progress = lambda number, done, total: None,
    ):
        self.tools, self.ledger, self.deadline, self.progress = tools, ledger, deadline, progress

    def scores(self, number: int, network: Any, action: Action | None = None) -> np.ndarray:
        """Per-picture scores [N] of the round's network, or of it after `action`."""
        key = action.key if action else ""
        known = self.ledger.get(number, key)
        if known is not None:
            return known
        if time.monotonic() > self.deadline:
            raise OutOfTime
        start = time.perf_counter()
        if action is not None:
            network = self.tools.rebuild(network, action.apply(network.architecture))
        return self.ledger.add(number, key, self.tools.scorer.score(network), time.perf_counter() - start)

    def values(self, number: int, network: Any, actions: Sequence[Action]) -> list[ActionValue]:
        """What each action is worth on the round's network, in the given order."""
        before = self.scores(number, network)
        now, found = self.tools.latency(network.architecture), []
        for done, action in enumerate(actions):
            self.progress(number, done, len(actions))
            saved = now - self.tools.latency(action.apply(network.architecture))
            found.append(action_value(action, before, self.scores(number, network, action), saved))
        self.progress(number, len(actions), len(actions))
        return found

    def train(self, number: int, network: Any) -> Any:
        """The network after the round's robust training, from disk if that is done.

        Raises PocketfusionError if what is there is of other actions: an older version's search chose otherwise.
        """
        assert self.ledger.run is not None
        folder = self.ledger.run / f"round-{number + 1:02}"
        if not folder.is_dir():
            if time.monotonic() > self.deadline:
                raise OutOfTime
            self.tools.save(self.tools.train(network, number), folder)
        trained = self.tools.load(folder)
        if trained.architecture != network.architecture:
            raise PocketfusionError(
                f"{folder} is of other actions than round {number + 1} takes: delete {self.ledger.run} or give "
                "another --run"
            )
        return trained


def evolve(search: Search, start: Any, settings: Settings) -> Outcome:
    """Evolves `start` until its latency meets the budget and no action pays, or for `settings.rounds` rounds.

    Over the budget, a round takes a group of the reductions of lowest value; under it, copies of the blocks of highest
    value as far as they fit. Copies that do not improve the score after training are undone, and the search ends.
    The result depends on the tools' answers alone: a search killed and begun again on its ledger gives the same.
    """
    latency, budget, kinds = search.tools.latency, settings.budget_ms, settings.kinds
    network = start
    rounds: list[Round] = []
    before_copies: tuple[Any, float] | None = None  # the network and score to go back to

    while True:
        number, now = len(rounds), latency(network.architecture)
        score, error = mean_and_error(search.scores(number, network))
        here = Round(number=number, latency_ms=now, score=score, error=error)
        if before_copies is not None and score <= before_copies[1]:
            rounds.append(here.model_copy(update={"undone": True}))
            return Outcome(before_copies[0], rounds, "budget met; more copies did not improve the score")
        over, fitting = now > budget, []
        if not over and "duplicate" in kinds:
            every = copies(network.architecture)
            fitting = [copy.block for copy in every if latency(copy.apply(network.architecture)) <= budget]
        reason = _reason_to_stop(over, bool(fitting), number, settings)
        if reason:
            return Outcome(network, [*rounds, here], reason)
        if over:
            config, architecture = search.tools.config, network.architecture
            values = search.values(number, network, reductions(architecture, kinds, config))
            taken = choose_reductions(ranking(values), architecture, config, latency, budget, settings.group)
        else:
            removals = [Action(kind="remove", block=block) for block in fitting]
            values = search.values(number, network, removals)
            taken = choose_copies(values, network.architecture, latency, budget, settings.group)
        here = here.model_copy(update={"values": tuple(values), "taken": tuple(taken)})
        rounds.append(here)
        if not taken:
            what = "no action saves time" if over else "budget met; no block is worth a copy"
            return Outcome(network, rounds, what)
        before_copies = None if over else (network, score)
        larger_or_smaller = apply_all((value.action for value in taken), network.architecture)
        network = search.train(number, search.tools.rebuild(network, larger_or_smaller))


def _reason_to_stop(over: bool, copy_fits: bool, number: int, settings: Settings) -> str:
    """Empty if the round should go on to evaluate actions."""
    if number == settings.rounds:
        return f"{number} rounds done" + (", still over the budget" if over else "; budget met")
    if over:
        return ""
    if "duplicate" not in settings.kinds:
        return "budget met"
    return "" if copy_fits else "budget met; no copy fits"


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
