"""The chain's report: one HTML page with its pictures, curves, tables, gates and provenance inside."""

from __future__ import annotations

import base64
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
from pocketfusion.evaluate.curves import Curves
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
_WIDTH, _HEIGHT, _POINTS = 400, 150, 400

_STYLE = """
:root { --ink: #1d2430; --soft: #5b6675; --line: #dde3ea; --paper: #fff; --card: #f7f9fb; --mark: #2563a8;
        --good: #1f7a4d; --bad: #b3372f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #9aa6b5; --line: #303947; --paper: #12161c;
        --card: #1a2028; --mark: #6fb1f2; --good: #5cc592; --bad: #f0837b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.55 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; margin: 0 0 .2rem; } h2 { font-size: 1.2rem; margin: 0; }
p.lead { color: var(--soft); margin: 0 0 1.6rem; } main > .scroll { margin-top: 1.6rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .38rem .7rem .38rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 500; } td.number, th.number { text-align: right; white-space: nowrap; }
.scroll { overflow-x: auto; margin-top: .9rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1.1rem 1.25rem;
          margin-top: 1.3rem; }
section header { display: flex; gap: .8rem; align-items: baseline; flex-wrap: wrap; margin-bottom: .6rem; }
.state { font-size: .82rem; color: var(--soft); } .met { color: var(--good); } .missed { color: var(--bad); }
a { color: var(--mark); text-decoration: none; white-space: nowrap; } a:hover { text-decoration: underline; }
figure { margin: .9rem 0 0; } figcaption { color: var(--soft); font-size: .86rem; margin-top: .3rem; }
img { max-width: 100%; border-radius: 6px; border: 1px solid var(--line); background: #fff; image-rendering: auto; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 0 1.4rem; }
svg { width: 100%; height: auto; } svg text { fill: var(--soft); font: 15px system-ui, sans-serif; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: .5rem 1rem; margin: .4rem 0 0; }
dt { color: var(--soft); font-size: .84rem; } dd { margin: 0; font-weight: 600; font-variant-numeric: tabular-nums; }
details { margin-top: .8rem; } summary { cursor: pointer; color: var(--soft); }
pre { overflow-x: auto; font-size: .8rem; background: var(--paper); border: 1px solid var(--line); border-radius: 6px;
      padding: .8rem; }
"""


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
        _details("The recipe", chain.recipe.model_dump(mode="json", exclude_none=True)),
    ]
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(name)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head>\n<body><main>\n" + "\n".join(body) + "\n</main></body></html>\n"
    )
    target = out / "report.html"
    with atomic_file(target) as partial:
        partial.write_text(page, encoding="utf-8")
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
        parts.append(_details("Provenance", said))
    return "".join(parts) + "</section>"


def _picture(file: Path, caption: str) -> str:
    text, data = escape(caption), base64.b64encode(file.read_bytes()).decode()
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'


def _details(title: str, values: Any) -> str:
    text = json.dumps(values, indent=2, ensure_ascii=False)
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"


def _curves(lines: Sequence[dict[str, Any]]) -> str:
    """The loss over steps, and each held-out figure, as small drawings."""
    losses = [(line["step"], line["loss"]) for line in lines if line.get("loss", 0) > 0]
    drawn = [_plot(f"training loss{_averaged(len(losses))}", _thinned(losses), soft=losses)]
    held_out = [line for line in lines if "held_out" in line]
    for name in held_out[-1]["held_out"] if held_out else ():
        points = [(line["step"], line["held_out"][name]) for line in held_out if name in line["held_out"]]
        drawn.append(_plot(name, points, dots=True))
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


def _plot(
    title: str,
    points: Sequence[tuple[float, float]],
    soft: Sequence[tuple[float, float]] = (),
    dots: bool = False,
) -> str:
    """A line drawing of (step, value) points over `soft` ones, as SVG; empty without two points."""
    if len(points) < 2:
        return ""
    soft = soft[:: max(1, len(soft) // _POINTS)]
    every = [*points, *soft]
    left, right = min(x for x, _ in every), max(x for x, _ in every)
    low, high = min(y for _, y in every), max(y for _, y in every)
    margin = (60, 12, 22)  # left, top and bottom

    def at(point: tuple[float, float]) -> str:
        x = margin[0] + (point[0] - left) / ((right - left) or 1) * (_WIDTH - margin[0] - 8)
        share = (high - point[1]) / (high - low) if high > low else 0.5
        y = margin[1] + share * (_HEIGHT - margin[1] - margin[2])
        return f"{x:.1f},{y:.1f}"

    def line(of: Sequence[tuple[float, float]], style: str) -> str:
        return f'<polyline fill="none" {style} points="{" ".join(map(at, of))}"/>'

    shown = [line(soft, 'stroke="var(--line)" stroke-width="1"')] if soft else []
    shown.append(line(points, 'stroke="var(--mark)" stroke-width="1.8"'))
    if dots:
        centres = (at(point).split(",") for point in points)
        shown += [f'<circle cx="{x}" cy="{y}" r="2.6" fill="var(--mark)"/>' for x, y in centres]
    base = _HEIGHT - margin[2]
    ends = zip((margin[1] + 9, base) if high > low else ((margin[1] + base) // 2 + 4,), _ends(low, high), strict=True)
    axes = "".join(f'<text x="{margin[0] - 6}" y="{y}" text-anchor="end">{text}</text>' for y, text in ends) + (
        f'<text x="{margin[0]}" y="{_HEIGHT - 6}">step {left:,.0f}</text>'
        f'<text x="{_WIDTH - 8}" y="{_HEIGHT - 6}" text-anchor="end">{right:,.0f}</text>'
        f'<line x1="{margin[0]}" y1="{base}" x2="{_WIDTH - 8}" y2="{base}" stroke="var(--line)"/>'
    )
    return (
        f'<figure><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">{axes}{"".join(shown)}'
        f"</svg><figcaption>{escape(title)}</figcaption></figure>"
    )


def _ends(low: float, high: float) -> list[str]:
    """An axis's highest and lowest value in as many digits as tell them apart; one where they are the same."""
    digits = next((n for n in range(3, 17) if f"{high:.{n}g}" != f"{low:.{n}g}"), 3)
    return list(dict.fromkeys(f"{value:.{digits}g}" for value in (high, low)))


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
