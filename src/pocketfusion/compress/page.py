"""The chain's report: one HTML page with its pictures, curves, tables, gates and provenance inside."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from pocketfusion import __version__
from pocketfusion.artefact import atomic_file
from pocketfusion.compress.chain import Chain, Stage
from pocketfusion.compress.overview import Standing, duration, provenance_of, standings
from pocketfusion.evaluate.fid_clip.curves import Curves
from pocketfusion.html_page import details, document, image, plot
from pocketfusion.train.log import read_log

#: A stage's pictures, by the names that stages give them, with what they show.
PICTURES = {
    "reconstructions.png": "Held-out pictures above their reconstructions",
    "preview.png": "Drawn from fixed prompts",
    "contact_sheet.png": "Some of the pictures",
    "latency.png": "Where the time of a step goes",
    "frontier.png": "The search: score against latency",
    "sensitivity.png": "What rounding each layer's weights costs",
    "curve.png": "Distance against CLIP score over guidance",
    "pictures.png": "The same captions and noise for every system",
}
_PREVIEWS = {"distill-decoder": "Held-out latents decoded by the teacher, and below by the small decoder"}


def write_page(chain: Chain, out: Path) -> Path:
    """Writes OUT/report.html from what the stages left, and returns its path."""
    all_of_them = standings(chain, out)
    name, total = chain.recipe.name, sum(one.seconds for one in all_of_them)
    done = sum(one.state in ("done", "given") for one in all_of_them)
    machine = next((m for one in all_of_them if (m := provenance_of(out / one.stage.name).get("machine"))), "")
    facts = [
        f"{done} of {len(all_of_them)} stages",
        f"{duration(total)} of work",
        f"pocketfusion {__version__}",
        machine,
    ]
    body = [
        f"<h1>{escape(name)}</h1>",
        f'<p class="lead">{escape(" · ".join(fact for fact in facts if fact))}</p>',
        _came_out(all_of_them, out),
        _overview(all_of_them),
        *(_section(one, out) for one in all_of_them),
        details("The recipe", chain.recipe.model_dump(mode="json", exclude_none=True)),
    ]
    target = out / "report.html"
    with atomic_file(target) as partial:
        partial.write_text(document(name, body), encoding="utf-8")
    return target


def _place(stage: Stage, out: Path) -> Path:
    return stage.given or out / stage.name


def _came_out(rows: Sequence[Standing], out: Path) -> str:
    """The pictures that are the chain's end so far: those of the last comparison, else of the last network."""
    for name in ("pictures.png", "preview.png"):
        for one in reversed(rows):
            if (_place(one.stage, out) / name).is_file():
                return _picture(_place(one.stage, out) / name, f"{one.stage.name}: {_caption(one.stage, name)}")
    return ""


def _caption(stage: Stage, picture: str) -> str:
    return _PREVIEWS.get(stage.kind, PICTURES[picture]) if picture == "preview.png" else PICTURES[picture]


def _overview(rows: Sequence[Standing]) -> str:
    cells = []
    for number, one in enumerate(rows, 1):
        steps = f"{one.done:,}" if one.done else ""
        scores = ", ".join(f"{escape(k)} {v:.4g}" for k, v in (one.scores or {}).items())
        link = f'<a href="#{one.stage.name}">{escape(one.stage.name)}</a>'
        time = duration(one.seconds) if one.seconds else ""
        cells.append(
            f'<tr><td class="number">{number}</td><td>{link}</td><td>{one.state}</td><td class="number">{steps}</td>'
            f'<td class="number">{time}</td><td>{scores}</td><td>{_gate(one)}</td></tr>'
        )
    head = (
        "<tr><th class=number></th><th>stage</th><th>state</th><th class=number>steps</th><th class=number>time</th>"
    )
    return f'<div class="scroll"><table>{head}<th>scores</th><th>gate</th></tr>{"".join(cells)}</table></div>'


def _gate(one: Standing) -> str:
    if one.stage.gate is None:
        return ""
    met = {"done": "met", "short": "missed"}.get(one.state, "")
    return f'<span class="{met}">{escape(one.stage.gate.text)} {met}</span>'


def _section(one: Standing, out: Path) -> str:
    stage, place = one.stage, _place(one.stage, out)
    called = "" if stage.name == stage.kind else f"{stage.kind}, "
    parts = [f'<section id="{stage.name}"><header><h2>{escape(stage.name)}</h2>']
    sources = ", ".join(f'<a href="#{name}">{escape(name)}</a>' for name in stage.parents)
    came = f"from {sources}" if sources else (f"from {escape(str(stage.given))}" if stage.given else "")
    parts.append(f'<span class="state">{called}{one.state} {came}</span>{_gate(one)}</header>')
    if one.scores:
        items = "".join(f"<div><dt>{escape(k)}</dt><dd>{v:.4g}</dd></div>" for k, v in one.scores.items())
        parts.append(f"<dl>{items}</dl>")
    log = out / f"{stage.name}.run" / "log.jsonl"
    if log.is_file():
        parts.append(_curves(read_log(log.parent)))
    parts += [_picture(place / name, _caption(stage, name)) for name in PICTURES if (place / name).is_file()]
    parts += [_table(place / name) for name in ("networks.json", "curve.json", "bench.json", "check.json")]
    said = provenance_of(place)
    if said:
        parts.append(details("Provenance", said))
    return "".join(parts) + "</section>"


def _picture(file: Path, caption: str) -> str:
    return f"<figure>{image(file.read_bytes(), caption)}<figcaption>{escape(caption)}</figcaption></figure>"


def _curves(lines: Sequence[dict[str, Any]]) -> str:
    """The loss over steps, and each held-out figure, as small drawings."""
    losses = [(line["step"], line["loss"]) for line in lines if line.get("loss", 0) > 0]
    drawn = [plot(f"training loss{_averaged(len(losses))}", _thinned(losses), soft=losses)]
    held_out = [line for line in lines if "held_out" in line]
    for name in held_out[-1]["held_out"] if held_out else ():
        points = [(line["step"], line["held_out"][name]) for line in held_out if name in line["held_out"]]
        drawn.append(plot(name, points, dots=True))
    return f'<div class="plots">{"".join(drawn)}</div>'


def _averaged(count: int) -> str:
    size = _bin(count)
    return f", averaged over {size} logged steps" if size > 1 else ""


def _bin(count: int) -> int:
    """How many points are averaged into one: a hundredth of the run."""
    return max(1, count // 100)


def _thinned(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    size = _bin(len(points))
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(p[0] for p in part) / len(part), sum(p[1] for p in part) / len(part)) for part in parts]


def _table(file: Path) -> str:
    """The figures of a stage's JSON file as a table; empty if it is not there."""
    if not file.is_file():
        return ""
    values = json.loads(file.read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = []
    if file.name == "networks.json":
        for row in values:
            levels = {f"{k} dB": row[f"{k}_db"] for k in ("predicted", "measured")}
            rows.append({"network": row["name"], "MB": row["size"] / 1e6, **levels, "guidance": row["guidance_delta"]})
    elif file.name == "check.json":
        rows = [
            {
                "network": g["network"],
                "operations": g["operations"],
                "refused by the GPU delegate": len(g["refused"]),
                "passed": "yes" if g["passed"] else "no",
                "most of all": g["failure"] or _most(g["refused"]),
            }
            for g in values["graphs"]
        ]
    elif file.name == "bench.json":
        for one in values["bundles"]:
            times = {f"{k} ms": 1000 * one["seconds"][k]["median"] for k in ("text", "step", "decode", "total")}
            rows.append({"bundle": Path(one["path"]).name, **times, "peak MB": (one["peak_rss"] or 0) / 1e6})
    else:
        for curve in Curves.model_validate(values).curves:
            for point in curve.points:
                distances = {"Fréchet": point.frechet.value if point.frechet else None, "KID": point.kid.value}
                scores = {"CLIP score": point.clip_score.value, "top-5": point.top5.value}
                rows.append({"system": curve.label, "guidance": point.guidance_scale, **distances, **scores})
    if not rows:
        return ""
    names = list(dict.fromkeys(key for row in rows for key in row))
    words = {name for name in names if any(isinstance(row.get(name), str) for row in rows)}
    head = "".join(f'<th class="{"" if name in words else "number"}">{escape(name)}</th>' for name in names)
    body = "".join(
        "<tr>" + "".join(_cell(row.get(name), word=name in words) for name in names) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _most(refused: Sequence[dict[str, Any]]) -> str:
    """The commonest reason of refusals, with its cure."""
    reasons = Counter((one["reason"], one["cure"]) for one in refused)
    return ": ".join(filter(None, reasons.most_common(1)[0][0])) if reasons else ""


def _cell(value: Any, *, word: bool) -> str:
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return f'<td class="{"" if word else "number"}">{escape(text)}</td>'
