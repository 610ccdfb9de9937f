"""Reports of one HTML file, which ask for nothing from outside: style, pictures, line drawings, folded details."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from html import escape
from typing import Any

WIDTH, HEIGHT, _POINTS = 400, 150, 400

STYLE = """
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


def document(title: str, body: Sequence[str], style: str = "") -> str:
    """The page, of light and dark schemes; `style` is what its own parts add."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}{style}</style></head>\n<body><main>\n" + "\n".join(body) + "\n</main></body></html>\n"
    )


def image(content: bytes, alt: str, kind: str = "png") -> str:
    """A picture file inside the page; `kind` is the last part of its media type."""
    data = base64.b64encode(content).decode()
    return f'<img alt="{escape(alt)}" src="data:image/{kind};base64,{data}">'


def details(title: str, values: Any) -> str:
    """JSON `values`, folded away under a title."""
    text = json.dumps(values, indent=2, ensure_ascii=False)
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"


def plot(
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
        x = margin[0] + (point[0] - left) / ((right - left) or 1) * (WIDTH - margin[0] - 8)
        share = (high - point[1]) / (high - low) if high > low else 0.5
        y = margin[1] + share * (HEIGHT - margin[1] - margin[2])
        return f"{x:.1f},{y:.1f}"

    def line(of: Sequence[tuple[float, float]], style: str) -> str:
        return f'<polyline fill="none" {style} points="{" ".join(map(at, of))}"/>'

    shown = [line(soft, 'stroke="var(--line)" stroke-width="1"')] if soft else []
    shown.append(line(points, 'stroke="var(--mark)" stroke-width="1.8"'))
    if dots:
        centres = (at(point).split(",") for point in points)
        shown += [f'<circle cx="{x}" cy="{y}" r="2.6" fill="var(--mark)"/>' for x, y in centres]
    base = HEIGHT - margin[2]
    ends = zip((margin[1] + 9, base) if high > low else ((margin[1] + base) // 2 + 4,), _ends(low, high), strict=True)
    axes = "".join(f'<text x="{margin[0] - 6}" y="{y}" text-anchor="end">{text}</text>' for y, text in ends) + (
        f'<text x="{margin[0]}" y="{HEIGHT - 6}">step {left:,.0f}</text>'
        f'<text x="{WIDTH - 8}" y="{HEIGHT - 6}" text-anchor="end">{right:,.0f}</text>'
        f'<line x1="{margin[0]}" y1="{base}" x2="{WIDTH - 8}" y2="{base}" stroke="var(--line)"/>'
    )
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{axes}{"".join(shown)}'
        f"</svg><figcaption>{escape(title)}</figcaption></figure>"
    )


def _ends(low: float, high: float) -> list[str]:
    """An axis's highest and lowest value in as many digits as tell them apart; one where they are the same."""
    digits = next((n for n in range(3, 17) if f"{high:.{n}g}" != f"{low:.{n}g}"), 3)
    return list(dict.fromkeys(f"{value:.{digits}g}" for value in (high, low)))
