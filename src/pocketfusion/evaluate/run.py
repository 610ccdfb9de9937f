"""`pocketfusion score`: opens everything, scores, writes one result folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocketfusion import __version__
from pocketfusion.artefact import atomic_folder, check_new, write_json
from pocketfusion.data.sources import open_dataset
from pocketfusion.errors import PocketfusionError
from pocketfusion.evaluate.generate import ModelFolder, SamplerSettings
from pocketfusion.evaluate.harness import Outcome, Progress, score_system
from pocketfusion.evaluate.prompts import fixed_prompts
from pocketfusion.evaluate.report import Report, markdown
from pocketfusion.evaluate.sets import choose_sets
from pocketfusion.folder import folder_hash, machine, read_provenance

if TYPE_CHECKING:
    from pocketfusion.models.judge import Judge


def open_judge(path: Path) -> Judge:
    """Loads the judge, on the GPU if there is one.

    Raises PocketfusionError if it is missing or damaged, or was trained with a text encoder of another width.
    """
    import torch

    from pocketfusion.models.judge import load_judge

    judge = load_judge(path)
    wanted, given = judge.model.config.text_width, judge.text.width
    if wanted != given:
        raise PocketfusionError(
            f"the judge {path} was trained with a text encoder of width {wanted}, not {given}: "
            "train it again with 'pocketfusion train-judge'"
        )
    judge.model.to("cuda" if torch.cuda.is_available() else "cpu")
    return judge


def judge_notes(path: Path, fingerprint: str) -> list[str]:
    """What a reader must know of a judge that does not fit, or may not fit, the data it scores."""
    provenance = read_provenance(path)
    if provenance is None:
        return ["The judge carries no provenance: whether it has seen these held-out pictures is not known."]
    if provenance.data.get("fingerprint") != fingerprint:
        return ["The judge was trained on other data (or another build or size of it) than it scores here."]
    return []


def write_outcome(outcome: Outcome, folder: Path) -> None:
    """Writes scores.json, scores.md, scores.png, prompts.png and nearest.png into an existing folder."""
    from pocketfusion.evaluate.figures import nearest_pairs, plot_scores, prompt_sheet

    write_json(folder / "scores.json", outcome.report.model_dump())
    (folder / "scores.md").write_text(markdown(outcome.report), encoding="utf-8")
    plot_scores(outcome.report, folder / "scores.png")
    prompt_sheet(outcome.prompt_images, fixed_prompts(), folder / "prompts.png")
    nearest_pairs(outcome.pairs, folder / "nearest.png")


def score_folder(
    folder: Path,
    data: Path,
    judge: Path,
    out: Path,
    *,
    sampler: SamplerSettings,
    samples: int = 256,
    sets: Sequence[str] | None = None,
    seed: int = 0,
    overwrite: bool = False,
    skip_bad: bool = False,
    progress: Progress = lambda stage, done, total: None,
) -> Report:
    """Scores a model folder and writes the result folder `out` atomically; arguments as the command's.

    Raises PocketfusionError before any long work if an input is missing or does not fit, or `out` exists.
    """
    check_new(out, overwrite)
    system = ModelFolder(folder)
    scorer = open_judge(judge)
    images = open_dataset(data, system.image_size, skip_bad=skip_bad)
    chosen = choose_sets(images, sets, samples)
    identity: dict[str, Any] = {"name": judge.resolve().name, "sha256": folder_hash(judge)}
    outcome = score_system(
        system, images, scorer, chosen, sampler=sampler, judge_identity=identity, seed=seed, progress=progress
    )
    outcome.report.protocol |= {"pocketfusion": __version__, "machine": machine(), "samples": samples}
    outcome.report.notes += images.notes + judge_notes(judge, images.fingerprint)
    with atomic_folder(out, overwrite=overwrite) as partial:
        write_outcome(outcome, partial)
    return outcome.report
