"""How far a chain is, read from its records and logs while it runs elsewhere or not at all."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from pocketfusion.compress.chain import Chain, Stage
from pocketfusion.compress.records import FINISHED, Record, Records, at_work
from pocketfusion.train.log import read_log

_SPAN = 50  #: newest steps that the speed is taken from


@dataclass(frozen=True)
class Standing:
    """One stage: `state` is given, done, running, stopped, short or waiting; `left` in seconds, where it is known;
    `doing`: what it is at, where it does not train."""

    stage: Stage
    state: str
    done: int = 0
    total: int = 0
    seconds: float = 0.0
    left: float | None = None
    scores: dict[str, float] | None = None
    doing: str = ""


def standings(chain: Chain, out: Path) -> list[Standing]:
    """Where every stage stands; what an unfinished one reaches is read from its log."""
    records, running, found = Records(out), at_work(out), []
    for stage in chain.stages:
        record = records.get(stage.name)
        if stage.given is not None:
            found.append(Standing(stage, "given"))
        elif record is None or (record.state != FINISHED and record.key.get("kind") != stage.kind):
            found.append(Standing(stage, "waiting"))
        elif record.state == FINISHED:
            state = "short" if record.gate_met is False else "done"
            steps = int(record.scores.get("steps", stage.train.steps if stage.train else 0))
            scores = {name: record.scores[name] for name in stage.is_a.scores if name in record.scores}
            found.append(Standing(stage, state, steps, steps, record.seconds, scores=scores))
        else:
            doing = records.told(stage.name) if running else {}
            found.append(_begun(stage, record, out / f"{stage.name}.run", running, doing))
    return found


def _begun(stage: Stage, record: Record, run: Path, running: bool, doing: dict[str, Any]) -> Standing:
    state = "running" if running else "stopped"
    if stage.train is None or not (run / "log.jsonl").is_file():
        seconds = record.seconds + (time.time() - doing["since"] if doing else 0)
        parts = [doing.get("what"), f"{doing['done']:,} of {doing['total']:,}" if doing.get("total") else ""]
        total = stage.train.steps if stage.train else 0
        return Standing(stage, state, total=total, seconds=seconds, doing=": ".join(filter(None, parts)))
    lines = read_log(run)
    steps = [line for line in lines if "loss" in line]
    done = int(steps[-1]["step"]) if steps else 0
    total = max(stage.train.steps, -(-done // stage.train.steps) * stage.train.steps)
    held_out = next((line["held_out"] for line in reversed(lines) if "held_out" in line), None)
    left = None
    if len(steps) > 1:
        recent = steps[-_SPAN:]
        speed = (recent[-1]["seconds"] - recent[0]["seconds"]) / max(1, recent[-1]["step"] - recent[0]["step"])
        left = speed * (total - done)
    return Standing(stage, state, done, total, steps[-1]["seconds"] if steps else 0.0, left, held_out)


def overview(chain: Chain, out: Path) -> Table:
    """The standings as a table."""
    title = f"{chain.recipe.name} in {out}: {'at work' if at_work(out) else 'nobody at work'}"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for name in ("stage", "state", "steps"):
        table.add_column(name, no_wrap=True)
    for name in ("time", "left"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("scores")
    for one in standings(chain, out):
        steps = f"{one.done:,} of {one.total:,}" if one.total else ""
        scores = ", ".join(f"{name} {value:.4g}" for name, value in (one.scores or {}).items())
        left = duration(one.left) if one.left is not None else ""
        gate = f" (gate: {one.stage.gate.text})" if one.stage.gate else ""
        table.add_row(
            one.stage.name,
            one.state,
            steps,
            duration(one.seconds) if one.seconds else "",
            left,
            (scores or one.doing) + gate,
        )
    return table


def duration(seconds: float) -> str:
    """In the unit that a reader would use."""
    for unit, span in (("years", 365 * 86400), ("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= (2 * span if span >= 86400 else span):
            return f"{seconds / span:,.1f} {unit}"
    return "under 1 s" if 0 < seconds < 1 else f"{seconds:.0f} s"


def size(count: float) -> str:
    """Bytes in the unit that a reader would use."""
    if count >= 1e11:
        return f"{count / 1e9:,.0f} GB"
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB" if count >= 1e6 else "under 1 MB"


def provenance_of(place: Path) -> dict[str, Any]:
    """What a result says of itself, as JSON values; empty if it says nothing."""
    for name in ("provenance.json", "bundle.json"):
        try:
            values = json.loads((place / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        said = values.get("provenance") if name == "bundle.json" and isinstance(values, dict) else values
        return said if isinstance(said, dict) else {}
    return {}
