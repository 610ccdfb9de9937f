"""What a search reads, opened and checked before anything long begins."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pocketfusion.artefact import sha256_file
from pocketfusion.data.packed import CaptionedImages
from pocketfusion.data.sources import open_training_data
from pocketfusion.errors import PocketfusionError
from pocketfusion.evaluate.clip import OpenClip
from pocketfusion.evaluate.extractors import open_judge
from pocketfusion.evaluate.generate import ModelFolder
from pocketfusion.evolve.score import Judge, JudgeScorer, ScoreSettings, validation_set
from pocketfusion.evolve.values import Latency
from pocketfusion.folder import check_folder, folder_hash
from pocketfusion.latency.table import LatencyTable
from pocketfusion.latency.timing_backends import settings_here
from pocketfusion.models.elastic_unet import ElasticUNet, load_elastic
from pocketfusion.recipe import Recipe

_OPEN_CLIP = "open_clip:"


@dataclass(frozen=True)
class Inputs:
    """What a search reads, and how it draws its validation pictures; names as the command's options.

    `judge`: a judge folder, or `open_clip:NAME:FILE`. `force`: use the latency table though its device differs.
    `skip_bad`: leave unusable samples of `data` out.
    """

    folder: Path
    recipe: Recipe
    data: Path
    judge: str
    latency: Path
    samples: int = 256
    steps: int = 10
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    force: bool = False
    skip_bad: bool = False


def search_judge(name: str) -> tuple[Judge, str]:
    """The judge and its SHA-256; raises PocketfusionError if it is missing or damaged."""
    if not name.startswith(_OPEN_CLIP):
        return open_judge(Path(name)), folder_hash(Path(name))
    model, _, file = name.removeprefix(_OPEN_CLIP).partition(":")
    return OpenClip(model, Path(file)), sha256_file(Path(file))


def open_latency(path: Path, unet: ElasticUNet, force: bool) -> Latency:
    """Predicted milliseconds of one guided step.

    Raises PocketfusionError if the table is of another base, device or runtime; `force` accepts the latter two, as a
    search for a phone on a workstation needs.
    """
    table = LatencyTable.load(path)
    settings = table.settings
    table.check(unet.config, settings_here(settings.backend, settings.weights, settings.threads), force=force)
    return partial(table.predict, unet.config)


class Opened:
    """All inputs of a search, checked, before anything long begins."""

    def __init__(self, inputs: Inputs):
        check_folder(inputs.folder)
        self.inputs = inputs
        self.unet = load_elastic(inputs.folder)
        self.latency = open_latency(inputs.latency, self.unet, inputs.force)
        self.data: CaptionedImages = open_training_data(inputs.data, inputs.recipe.data.size, skip_bad=inputs.skip_bad)
        validation = validation_set(self.data, inputs.samples, inputs.seed)
        judge, judge_hash = search_judge(inputs.judge)
        system = ModelFolder(inputs.folder)
        if system.image_size != self.data.size:
            raise PocketfusionError(
                f"the recipe's pictures have {self.data.size} px but the model draws {system.image_size} px: "
                "use the recipe of that model"
            )
        settings = ScoreSettings(
            num_inference_steps=inputs.steps,
            guidance_scale=inputs.recipe.teacher.guidance_scale,
            precision=inputs.precision,
        )
        self.samples = len(validation.captions)
        self.scorer = JudgeScorer(system, judge, validation, settings)
        self.parents = {
            "base": system.sha256,
            "judge": judge_hash,
            "latency": sha256_file(inputs.latency),
        }

    def identity(self, settings: dict[str, Any]) -> dict[str, Any]:
        """What a search's evaluations depend on."""
        drawing = {
            "samples": self.samples,
            "steps": self.inputs.steps,
            "guidance_scale": self.inputs.recipe.teacher.guidance_scale,
            "precision": self.inputs.precision,
        }
        return {
            "stage": "evolve",
            "settings": settings | drawing,
            "parents": self.parents,
            "data": {"name": self.data.name, "fingerprint": self.data.fingerprint},
            "seed": self.inputs.seed,
        }
