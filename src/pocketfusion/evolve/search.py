"""`pocketfusion evolve`: what a search reads, the first ranking, or the whole search and the folder it ends with."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pocketfusion.artefact import atomic_folder, sha256_file, write_json
from pocketfusion.data.packed import CaptionedImages
from pocketfusion.data.sources import open_training_data
from pocketfusion.errors import PocketfusionError
from pocketfusion.evaluate.clip import OpenClip
from pocketfusion.evaluate.extractors import open_judge
from pocketfusion.evaluate.generate import ModelFolder
from pocketfusion.evolve.actions import ActionKind, reductions
from pocketfusion.evolve.algorithm import Ledger, Outcome, Progress, Search, Settings, Tools, evolve
from pocketfusion.evolve.figures import frontier_points, plot_frontier
from pocketfusion.evolve.score import Judge, JudgeScorer, ScoreSettings, validation_set
from pocketfusion.evolve.values import Latency, budget_in_ms, check_reachable, mean_and_error, ranking
from pocketfusion.folder import Provenance, check_folder, folder_hash, machine, read_provenance, write_provenance
from pocketfusion.latency.table import LatencyTable
from pocketfusion.latency.timing_backends import settings_here
from pocketfusion.locks import release
from pocketfusion.models.elastic.architecture import Architecture
from pocketfusion.models.elastic.transfer import with_architecture
from pocketfusion.models.elastic_unet import ElasticUNet, load_elastic
from pocketfusion.models.writing import copy_with_unet
from pocketfusion.recipe import Recipe
from pocketfusion.train.place import StageRun
from pocketfusion.train.stage import finished_result

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


def rank_folder(
    inputs: Inputs,
    kinds: Sequence[ActionKind],
    run: Path | None = None,
    progress: Progress = lambda number, done, total: None,
    deadline: float = float("inf"),
) -> dict[str, Any]:
    """The first ranking (`evolve --dry-run`): every reduction of `kinds` with its value, nothing changed.

    `values` are in network order; `ranking` are the positions in it of the actions, best to take first.
    """
    opened = Opened(inputs)
    ledger = Ledger(run, opened.identity({"dry_run": True}))
    config = opened.unet.config
    tools = Tools(opened.scorer, opened.latency, config, with_architecture, _no_training, _save, load_elastic)
    search = Search(tools, ledger, deadline, progress)
    actions = reductions(opened.unet.architecture, kinds, config)
    values = search.values(0, opened.unet, actions)
    score, error = mean_and_error(search.scores(0, opened.unet))
    if run is not None:
        release(run)
    return {
        **opened.identity({}),
        "machine": machine(),
        "latency_ms": opened.latency(opened.unet.architecture),
        "score": score,
        "error": error,
        "seconds_per_evaluation": sum(ledger.seconds) / len(ledger.seconds),
        "values": [value.model_dump(mode="json") for value in values],
        "ranking": [values.index(value) for value in ranking(values)],
    }


def _no_training(network: Any, number: int) -> Any:
    return network


def _save(network: ElasticUNet, folder: Path) -> None:
    with atomic_folder(folder, overwrite=True) as partial_folder:
        network.save_pretrained(partial_folder / "unet", safe_serialization=True)


def evolve_folder(
    inputs: Inputs,
    stage: StageRun,
    *,
    budget_ms: float | None = None,
    budget_ratio: float | None = None,
    rounds: int = 10,
    group: int = 4,
    kinds: Sequence[ActionKind],
    train_steps: int = 200,
    cache: Path | None = None,
    progress: Progress = lambda number, done, total: None,
) -> Provenance:
    """Evolves a model folder's UNet to the latency budget and writes the result folder atomically.

    Raises PocketfusionError before any long work if an input is missing or does not fit, and OutOfTime when the
    stage's minutes are over; the same call then goes on.
    """
    for name, number, least in (("--rounds", rounds, 1), ("--group", group, 1), ("--train-steps", train_steps, 0)):
        if number < least:
            raise PocketfusionError(f"{name} {number} is below {least}: give a whole number from {least} up")
    deadline = time.monotonic() + 60 * stage.max_minutes if stage.max_minutes else float("inf")
    opened = Opened(inputs)
    stock = opened.latency(Architecture.stock(opened.unet.config))
    budget = budget_in_ms(budget_ms, budget_ratio, opened.unet.config, opened.latency)
    settings = Settings(budget_ms=budget, rounds=rounds, group=group, kinds=tuple(kinds))
    asked = settings.model_dump(mode="json", exclude={"rounds"}) | {"train_steps": train_steps}
    begun = opened.identity(asked)
    identity = opened.identity({**asked, "rounds": rounds})
    if (finished := finished_result(stage, identity)) is not None:
        return finished
    config = opened.unet.config
    check_reachable(budget, opened.unet.architecture, kinds, config, opened.latency)
    ledger = Ledger(stage.run, begun)
    train = _no_training if train_steps == 0 else _robust_training(opened, stage.run, train_steps, cache)
    tools = Tools(opened.scorer, opened.latency, config, with_architecture, train, _save, load_elastic)
    outcome = evolve(Search(tools, ledger, deadline, progress), opened.unet, settings)
    before = read_provenance(inputs.folder)
    trained = sum(bool(entry.taken) for entry in outcome.rounds) * train_steps * _batch_size(inputs.recipe)
    made = opened.latency(outcome.network.architecture)
    provenance = Provenance(
        **identity,
        samples_seen=(before.samples_seen if before else 0) + trained,
        hours=round(sum(ledger.seconds) / 3600, 3),
        machine=machine(),
        results={
            "stopped": outcome.stopped,
            "latency_ms": made,
            "base_latency_ms": stock,
            "latency_ratio": made / stock,
            "rounds": len(outcome.rounds) - 1,
            "evaluations": len(ledger.seconds),
            "seconds_per_evaluation": sum(ledger.seconds) / len(ledger.seconds),
        },
    )
    with atomic_folder(stage.out, overwrite=True) as folder:
        copy_with_unet(inputs.folder, folder, outcome.network)
        write_log(outcome, budget, folder)
        write_provenance(folder, provenance)
    release(stage.run)
    return provenance


def _batch_size(recipe: Recipe) -> int:
    return recipe.elastic.train.batch_size if recipe.elastic else 0


def _robust_training(opened: Opened, run: Path, steps: int, cache: Path | None) -> Any:
    from pocketfusion.train.elastic import RobustTrainer

    inputs = opened.inputs
    trainer = RobustTrainer(inputs.recipe, opened.data, inputs.folder, cache or run / "cache")

    def train(network: ElasticUNet, number: int) -> ElasticUNet:
        return trainer.train(network, run / f"train-{number + 1:02}", steps, inputs.seed + number)

    return train


def write_log(outcome: Outcome, budget_ms: float, folder: Path) -> None:
    """Writes actions.json (every action with its value), frontier.json and frontier.png into an existing folder."""
    rounds = [entry.model_dump(mode="json") for entry in outcome.rounds]
    points = frontier_points(rounds)
    write_json(folder / "actions.json", {"budget_ms": budget_ms, "stopped": outcome.stopped, "rounds": rounds})
    write_json(folder / "frontier.json", {"budget_ms": budget_ms, "points": points})
    plot_frontier(points, budget_ms, folder / "frontier.png")
