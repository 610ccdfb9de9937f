"""How far each sampler's pictures are from real ones over the number of steps: the table and plot of docs/samplers.md.

    python benchmarks/sampler_steps.py models/emoji/base --data data/emoji --judge models/emoji/judge --guidance 4.5 \
        --out base-steps --store pictures

A system is a model folder or a bundle, and all else as `evaluate` has it; run again to go on after a stop. Below
twice as many captions as the judge has features there is no Fréchet distance, and KID takes its place. Points share
captions and noise, so their differences are surer than the points: the table has each one's to the first sampler at
the most steps, with a 95 % interval over captions, all sides resampled together.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

RESAMPLES = 200
COLOURS = ("#1f5fbf", "#c8501e", "#2a9d3f", "#7a4fb5", "#8c8c8c", "#b58a1e", "#1e9aa8")


def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """KID's, of each pair of rows."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def squared_mmd(within: np.ndarray, between: np.ndarray, times: np.ndarray) -> float:
    """Up to what the real pictures add: unbiased, picture i counted times[i], and no picture beside itself."""
    pairs = np.outer(times, times) * (1 - np.eye(len(times)))
    return float((within * pairs).sum() / pairs.sum() - 2 * times @ between @ times / times.sum() ** 2)


def differences(features: list[np.ndarray], real: np.ndarray, base: int) -> list[tuple[float, float, float]]:
    """KID of each minus that of number `base`: value and 95 % interval, captions drawn again for all alike."""
    tables = [(kernel(one, one), kernel(one, real)) for one in features]
    rng, count = np.random.default_rng(0), len(real)
    draws = [np.ones(count)] + [
        np.bincount(rng.integers(count, size=count), minlength=count) for _ in range(RESAMPLES)
    ]
    values = np.array([[squared_mmd(*table, times.astype(float)) for table in tables] for times in draws])
    moved = values - values[:, base : base + 1]
    low, high = np.percentile(moved[1:], (2.5, 97.5), axis=0)
    return list(zip(moved[0].tolist(), low.tolist(), high.tolist(), strict=True))


def plot(rows: list[dict[str, Any]], measure: str, title: str, path: Path) -> None:
    """A line a sampler over the steps (PNG)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axis = figure.subplots()
    for colour, sampler in zip(COLOURS, dict.fromkeys(row["sampler"] for row in rows), strict=False):
        points = [row for row in rows if row["sampler"] == sampler]
        x = [row["steps"] for row in points]
        axis.plot(x, [row[measure] for row in points], "o-", color=colour, label=sampler)
    steps = sorted({row["steps"] for row in rows})
    axis.set_xscale("log")
    axis.set_xticks(steps, [str(n) for n in steps], minor=False)
    axis.minorticks_off()
    axis.set_xlabel("steps")
    axis.set_ylabel(f"{'Fréchet distance' if measure == 'frechet' else 'KID ×1000'} (lower is better)")
    axis.set_ylim(bottom=0)
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120, metadata={"Software": None})


def main(
    system: str,
    data: Annotated[Path, typer.Option()],
    judge: Annotated[Path, typer.Option()],
    guidance: Annotated[float, typer.Option()],
    out: Annotated[Path, typer.Option()],
    store: Annotated[Path, typer.Option()],
    steps: str = "4,8,16,25",
    samplers: str = "ddim,dpmpp-2m,euler,lcm",
    sets: str = "val_combo,val_concept",
    samples: int = 500,
) -> None:
    """Draws what is missing and writes OUT: curve.json as `evaluate` does, steps.json, steps.md, steps.png."""
    from pocketfusion.artefact import write_json
    from pocketfusion.cli.shared import require_compress

    require_compress()
    from pocketfusion.evaluate.extractors import open_extractor
    from pocketfusion.evaluate.fid_clip.curves_run import Measuring, evaluate_systems
    from pocketfusion.evaluate.fid_clip.drawing import PictureStore, Plan, load
    from pocketfusion.evaluate.metrics import too_few_for_frechet
    from pocketfusion.evaluate.reference import ReferenceSource
    from pocketfusion.evaluate.systems import named_systems

    names = [(name, int(n)) for name in samplers.split(",") for n in steps.split(",")]
    specs = named_systems([f"{system}@{n}:{name}" for name, n in names])
    extractor = open_extractor(judge, None, None)
    size = specs[0].open(1).image_size
    reference = ReferenceSource(data, sets=sets, samples=samples).open(size)
    count = len(reference.captions)
    kid_only = too_few_for_frechet(count, extractor.feature_dimensions) is not None
    measuring = Measuring((guidance,), diversity_prompts=0, kid_only=kid_only)
    curves = evaluate_systems(
        specs,
        lambda _: reference,
        lambda: extractor,
        out,
        measuring,
        store=store,
        overwrite=True,
        progress=lambda what, done, total: print(f"\r{what}: {done} of {total}   ", end="", flush=True),
    )
    assert curves is not None
    plan, shelves = Plan.of(reference, 0, 0, 1), PictureStore(store)
    features = []
    for spec in specs:
        pictures = load(shelves.shelf(spec.name, spec.drawn_with(), guidance, size), plan.pictures, spec.name)
        features.append(extractor.image_features(pictures)[0])
    real = extractor.image_features(reference.real_images(np.arange(count)))[0]
    most = max(n for _, n in names)
    rows = []
    moved = differences(features, real, names.index((names[0][0], most)))
    for (name, n), curve, (value, low, high) in zip(names, curves.curves, moved, strict=True):
        point = curve.points[0]
        rows.append(
            {
                "sampler": name,
                "steps": n,
                "frechet": point.frechet and point.frechet.value,
                "frechet_interval": point.frechet and [point.frechet.low, point.frechet.high],
                "kid": 1000 * point.kid.value,
                "kid_change": [1000 * value, 1000 * low, 1000 * high],
                "clip_score": point.clip_score.value,
                "top5": point.top5.value,
            }
        )
    write_json(
        out / "steps.json", {"guidance_scale": guidance, "pictures": count, "protocol": curves.protocol, "rows": rows}
    )
    first = f"{names[0][0]} in {most}"
    lines = [f"| sampler | steps | Fréchet | KID ×1000 | against {first} | CLIP score | top-5 |", "|---" * 7 + "|"]
    for row in rows:
        change = "{:+.1f} ({:+.1f} to {:+.1f})".format(*row["kid_change"])
        distance = "–" if row["frechet"] is None else f"{row['frechet']:.1f}"
        lines.append(
            f"| `{row['sampler']}` | {row['steps']} | {distance} | {row['kid']:.1f} | {change} | "
            f"{row['clip_score']:.1f} | {100 * row['top5']:.0f} % |"
        )
    (out / "steps.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    measure = "kid" if kid_only else "frechet"
    plot(rows, measure, f"{specs[0].path.name}, guidance {guidance:g}, {count} captions", out / "steps.png")
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    typer.run(main)
