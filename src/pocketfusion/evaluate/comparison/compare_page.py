"""The comparison as one HTML file: what came out in a sentence, the figures, and every pair with its difference."""

from __future__ import annotations

import io
from collections.abc import Sequence
from html import escape

import numpy as np
from PIL import Image

from pocketfusion.evaluate.comparison.compare import Compared, Comparison, Outcome, Pair
from pocketfusion.html_page import details, document, image, plot
from pocketfusion.likeness import EQUAL

SHOWN = 48  #: pairs with pictures, of each bundle; the others are in the JSON file
_LOSSLESS = 256  #: pixels up to which pictures are PNG; larger ones are JPEG in the page, and were compared before
_AMPLIFY = (64, 32, 16, 8, 4, 2, 1)
#: dB from which a pair reads so: rules of thumb for pictures seen side by side, not a standard.
_WORDS = ((EQUAL, "equal"), (40.0, "alike to the eye"), (30.0, "hardly to be told apart"), (22.0, "details differ"))
_STYLE = """
.verdict { font-size: 1.15rem; line-height: 1.45; margin: 0 0 .6rem; max-width: 46rem; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 1rem;
         margin-top: 1rem; }
article { background: var(--paper); border: 1px solid var(--line); border-radius: 8px; padding: .8rem; min-width: 0; }
h3 { font-size: 1rem; font-weight: 600; margin: 0; overflow-wrap: anywhere; }
.trio { display: grid; grid-template-columns: repeat(3, 1fr); gap: .5rem; margin-top: .55rem; }
.trio figure { margin: 0; min-width: 0; } .trio figcaption { font-size: .78rem; line-height: 1.3; }
.trio img { width: 100%; height: auto; display: block; border-radius: 4px; }
h3.first { margin-top: 1.1rem; }
.small img { image-rendering: pixelated; }
p.figures { color: var(--soft); font-size: .86rem; margin: .15rem 0 0; font-variant-numeric: tabular-nums; }
p.figures b { color: var(--ink); } ul { padding-left: 1.1rem; margin: .6rem 0 0; } li { margin: .25rem 0; }
table.summary { width: auto; } table.summary td.number, table.summary th.number { padding-left: 1rem;
        white-space: normal; overflow-wrap: anywhere; }
table.summary .state { display: block; } p.lead.below { margin: .4rem 0 0; font-size: .86rem; }
h2 { overflow-wrap: anywhere; }
"""


def page(outcome: Outcome, command: str) -> str:
    """The page's HTML; `command` is what it was made with."""
    result = outcome.comparison
    names = ", ".join(one.name for one in result.bundles)
    count = len(result.bundles[0].pairs)
    facts = [
        f"{count} prompt{'s' * (count != 1)}, one seed each",
        f"diffusers {result.diffusers} in fp32 against LiteRT",
        f"pocketfusion {result.pocketfusion}",
        result.machine,
    ]
    title = f"{names} beside {result.folder['name']}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{escape(" · ".join(facts))}</p>',
        *(f'<p class="verdict">{_verdict(one, result)}</p>' for one in result.bundles),
        _summary(result),
        *(_section(one, result, images) for one, images in zip(result.bundles, outcome.pictures, strict=True)),
        _reading(result),
        details("How it was made", {"command": command, **result.model_dump(exclude={"bundles"})}),
    ]
    return document(title, body, _STYLE)


def word(level: float) -> str:
    """How a PSNR in dB reads."""
    return next((said for least, said in _WORDS if level >= least), "another picture")


def _db(level: float) -> str:
    return "equal" if level >= EQUAL else f"{level:.1f} dB"


def _verdict(one: Compared, result: Comparison) -> str:
    """What came out, worst prompt included, in words that need no table."""
    middle, worst = one.psnr_db["median"], one.pairs[0]
    name, prompt = escape(one.name), escape(worst.prompt) or "(the empty prompt)"
    apart = sum(pair.psnr_db < _WORDS[-1][0] for pair in one.pairs)
    text = (
        f"<b>{name}</b> draws what the original draws: the middle pair is {word(middle)} ({_db(middle)})"
        if middle >= _WORDS[-1][0]
        else f"<b>{name}</b> does not draw what the original draws: the middle pair has {_db(middle)}"
    )
    text += f", the worst of {len(one.pairs)} is “{prompt}” ({_db(worst.psnr_db)})."
    if apart:
        text += f" {apart} of {len(one.pairs)} came out as another picture."
    text += f" It takes {one.size / 1e6:,.0f} MB, the original {result.folder['size'] / 1e6:,.0f} MB."
    if one.passed is not None:
        state, sense = ("met", "every pair reaches") if one.passed else ("missed", "not every pair reaches")
        text += f' <span class="{state}">{sense} the threshold of {result.min_psnr_db:g} dB.</span>'
    return text


def _summary(result: Comparison) -> str:
    """A column a bundle."""
    rows: dict[str, list[str]] = {"": [escape(one.name) for one in result.bundles]}

    def add(name: str, value: str) -> None:
        rows.setdefault(name, []).append(value)

    for one in result.bundles:
        add("size, MB", f"{result.folder['size'] / 1e6:,.1f} → {one.size / 1e6:,.1f}")
        add("median pair, dB", f"{one.psnr_db['median']:.1f}")
        add("5 % are below, dB", f"{one.psnr_db['p5']:.1f}")
        add("worst pair, dB", f"{one.psnr_db['worst']:.1f}")
        add("SSIM (median)", f"{one.ssim:.3f}")
        add("guidance delta (median)", "–" if one.guidance_delta is None else f"{one.guidance_delta:.3f}")
        for name, score in one.scores.items():
            low, high = score.difference.low, score.difference.high
            change = f"{score.stock.value:.1f} → {score.bundle.value:.1f}"
            add(escape(name), f"{change} <span class=state>({low:+.1f} to {high:+.1f})</span>")
        add("seconds a picture", f"{one.seconds['stock']:.2f} → {one.seconds['bundle']:.2f}")
    lines = []
    for name, cells in rows.items():
        kind = "td" if name else "th"
        values = "".join(f'<{kind} class="number">{cell}</{kind}>' for cell in cells)
        lines.append(f"<tr><{kind}>{name}</{kind}>{values}</tr>")
    table = f'<div class="scroll"><table class="summary">{"".join(lines)}</table></div>'
    return table + '<p class="lead below">Arrows lead from the original to the bundle.</p>'


def _section(one: Compared, result: Comparison, images: Sequence[tuple[np.ndarray, np.ndarray]]) -> str:
    differences = [np.abs(a.astype(np.int16) - b) for a, b in images[:SHOWN]]
    most = float(np.percentile(np.stack(differences), 99.5))
    factor = next(k for k in _AMPLIFY if k * most <= 255 or k == 1)
    kinds = "/".join(dict.fromkeys(one.weights.values()))
    origin = {
        "this folder": "exported from this very folder",
        "another folder": f"not exported from {result.folder['name']} as it is here",
        "not said": "does not say which folder it was exported from",
    }[one.exported_from]
    about = (
        f"{one.sampler}, {one.num_inference_steps} steps, guidance {one.guidance_scale:g}, {kinds} weights; {origin}"
    )
    curve = plot(
        "signal to noise of the latents after each step, dB (median): where the two part",
        [(step, level) for step, level in enumerate(one.latents_sqnr_db, 1)],
        dots=True,
    )
    small = "small" if images[0][0].shape[0] < _LOSSLESS else ""
    cards = "".join(
        _card(one, pair, *sides, difference, factor)
        for pair, sides, difference in zip(one.pairs, images, differences, strict=False)
    )
    rest = len(one.pairs) - SHOWN
    more = f"<p>{rest} more pairs, all of them nearer, are in the JSON file.</p>" if rest > 0 else ""
    return (
        f'<section><header><h2>{escape(one.name)}</h2><span class="state">{escape(about)}</span></header>'
        f'<div class="plots">{curve}</div><h3 class="first">The pairs, worst first</h3>'
        f'<div class="pairs {small}">{cards}</div>{more}</section>'
    )


def _card(one: Compared, pair: Pair, stock: np.ndarray, own: np.ndarray, difference: np.ndarray, factor: int) -> str:
    """One pair, what it has come to in its pictures' texts."""
    prompt = pair.prompt or "(the empty prompt)"
    seen = word(pair.psnr_db)
    figures = [f"<b>{_db(pair.psnr_db)}</b> {seen}", f"SSIM {pair.ssim:.3f}"]
    if pair.guidance_delta is not None:
        figures.append(f"guidance {pair.guidance_delta:.3f}")
    figures += [f"{escape(name)} {before:.1f} → {after:.1f}" for name, (before, after) in pair.scores.items()]
    figures.append(f"seed {pair.seed}")
    mean, largest = float(difference.mean()), int(difference.max())
    shown = np.clip(difference * factor, 0, 255).astype(np.uint8)
    trio = (
        (stock, "original", f"The original's picture of: {prompt}"),
        (own, "bundle", f"The bundle {one.name}'s picture of the same prompt and noise: {seen}, {_db(pair.psnr_db)}"),
        (
            shown,
            f"difference ×{factor}",
            f"Their difference, {factor} times enlarged: {mean:.1f} of 255 in the mean, {largest} at most",
        ),
    )
    figures_of = "".join(
        f"<figure>{_embedded(pixels, alt)}<figcaption>{caption}</figcaption></figure>" for pixels, caption, alt in trio
    )
    notes = "".join(f'<p class="figures missed">{escape(note)}</p>' for note in pair.warnings)
    return (
        f'<article><h3>{escape(prompt)}</h3><p class="figures">{" · ".join(figures)}</p>{notes}'
        f'<div class="trio">{figures_of}</div></article>'
    )


def _embedded(pixels: np.ndarray, alt: str) -> str:
    file, kind = io.BytesIO(), "png" if max(pixels.shape) <= _LOSSLESS else "jpeg"
    Image.fromarray(pixels).save(file, kind, **({"optimize": True} if kind == "png" else {"quality": 90}))
    return image(file.getvalue(), alt, kind)


def _reading(result: Comparison) -> str:
    """How to read it, below the pairs."""
    folder = escape(result.folder["name"])
    points = [
        f"<b>Original</b>: {folder} in PyTorch with diffusers' own pipeline and scheduler. Both sides start from the "
        "same noise and follow the same settings, so without rounding they would draw equal pictures.",
        "<b>dB</b>: peak signal to noise ratio of the two pictures, higher is nearer; 6 more halve the difference. "
        "“Alike to the eye” from 40, “hardly to be told apart” from 30, “details differ” from 22: rules of thumb. "
        "A picture can be another and as good: what a model draws from noise may tip over at one early step.",
        "<b>SSIM</b>: structural similarity, 1 for equal pictures.",
        "<b>Guidance delta</b>: how strongly the bundle's network follows the prompt, as a share of the original's, "
        "on the same latents; 1 is right.",
    ]
    if result.scorers:
        points.append(
            "<b>CLIP scores</b> say how well a picture fits its prompt, each by the network that is named; in "
            "brackets the change's 95 % interval over prompts: one that holds 0 is no change that could be told."
        )
    points.append(
        "<b>Seconds</b> are medians on this machine, "
        f"{result.threads} thread{'s' * (result.threads != 1)} each; a phone has its own."
    )
    items = "".join(f"<li>{point}</li>" for point in points)
    return f"<section><h2>How to read this</h2><ul>{items}</ul></section>"
