"""Model cards: written from the provenance and the result files, so that no figure is typed by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pocketfusion.artefact import atomic_file, copy_file
from pocketfusion.data.files import read_text
from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import Provenance, read_provenance

_NUMBERS = (int, float)
_TITLES = {
    "train-teacher": "text-to-image model",
    "train-judge": "image-text judge",
    "train-autoencoder": "autoencoder",
    "train-elastic": "text-to-image model, robust to missing blocks",
    "evolve": "text-to-image model with an evolved UNet",
    "recover": "text-to-image model with an evolved UNet",
}


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        elif isinstance(value, _NUMBERS):
            rows.append((f"{prefix}{key}", round(value, 4)))
    return rows


def _training(provenance: Provenance) -> list[str]:
    state = "the recipe's last step is reached" if provenance.finished else "stopped before the recipe's last step"
    seen = f"- Samples seen: {provenance.samples_seen:,}"
    if "train" in provenance.settings:
        target = provenance.settings["train"]["steps"] * provenance.settings["train"]["batch_size"]
        if {"base", "student", "init"} & provenance.parents.keys():  # its parents have seen samples too
            seen += f" with its parents' own; this stage's recipe has {target:,}"
        else:
            seen += f" of {target:,} in the recipe ({provenance.samples_seen / target:.0%})"
    lines = [
        f"{seen}; {state}",
        f"- Time: {provenance.hours:.2f} h on {provenance.machine}",
        f"- Data: {provenance.data.get('name')} (fingerprint `{provenance.data.get('fingerprint')}`), "
        "split `train` and `train_scene` alone",
        f"- Stage: `{provenance.stage}`, pocketfusion {provenance.pocketfusion}, seed {provenance.seed}",
    ]
    return lines + [f"- Parent {role}: `{digest[:16]}…`" for role, digest in provenance.parents.items()]


def write_card(folder: Path, scores: Path | None = None, notes: Path | None = None) -> Path:
    """Writes `README.md` into a model, judge or autoencoder folder and returns its path.

    `scores` is a folder that `pocketfusion score` wrote: its tables and pictures become part of the card. `notes`
    is Markdown that goes in unchanged. Raises PocketfusionError if something named is missing.
    """
    provenance = read_provenance(folder) if folder.is_dir() else None
    if provenance is None:
        raise PocketfusionError(f"{folder} has no provenance.json: give a folder that a training stage wrote")
    for path, wanted in ((scores, "scores.md"), (notes, None)):
        if path is not None and not (path / wanted if wanted else path).is_file():
            raise PocketfusionError(f"there is no {path / wanted if wanted else path}: check the path")
    title = _TITLES.get(provenance.stage, provenance.stage)
    lines = ["---", "license: apache-2.0", "library_name: pocketfusion", "---", "", f"# {folder.name}: {title}", ""]
    lines += ["## Training", "", *_training(provenance), ""]
    results = _flat(provenance.results)
    if results:
        lines += ["## Results of training", "", "| figure | value |", "|---|---|"]
        lines += [f"| {name} | {value:g} |" for name, value in results] + [""]
    if notes is not None:
        lines += [read_text(notes).rstrip(), ""]
    if scores is not None:
        text = read_text(scores / "scores.md")
        lines += ["## Scores", "", text.strip().removeprefix("# ").strip(), ""]
        for picture, what in (("prompts.png", "48 fixed prompts"), ("nearest.png", "Nearest training pictures")):
            if (scores / picture).is_file():
                copy_file(scores / picture, folder / picture)
                lines += [f"## {what}", "", f"![{what}]({picture})", ""]
        copy_file(scores / "scores.json", folder.parent / f"{folder.name}-scores.json")
    lines += [
        "## Licence",
        "",
        "The weights are Apache-2.0. They were trained on drawings under Apache-2.0, MIT and CC-BY-4.0: "
        "see `NOTICE` at the top of the repository for whom to attribute, and `licences/` here for the text encoder.",
        "",
    ]
    with atomic_file(folder / "README.md") as partial:
        partial.write_text("\n".join(lines), encoding="utf-8")
    return folder / "README.md"
