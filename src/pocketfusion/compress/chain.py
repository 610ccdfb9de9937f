"""A recipe's `stages` read and checked before anything runs: their order, inputs, settings and gates."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from pocketfusion.artefact import sha256_folder
from pocketfusion.compress.kinds import KINDS, Kind, Options, Takes
from pocketfusion.errors import PocketfusionError
from pocketfusion.recipe import SECTIONS, Recipe, TrainSettings, described, field_values, nearest
from pocketfusion.train.place import Goal

_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*")
_OWN = ("stage", "from", "gate")  #: settings that every stage has


@dataclass(frozen=True)
class Gate:
    """Scores that a stage must reach for the chain to go on. `up_to`: steps that it may train to for that."""

    least: Mapping[str, float]
    most: Mapping[str, float]
    up_to: int | None

    def goal(self, steps: int) -> Goal:
        """For a stage that trains `steps`."""
        return Goal(self.least, self.most, self.up_to or steps)

    @property
    def text(self) -> str:
        """As a reader says it."""
        parts = [f"{name} ≥ {value:g}" for name, value in self.least.items()]
        return ", ".join(parts + [f"{name} ≤ {value:g}" for name, value in self.most.items()])


@dataclass(frozen=True)
class Stage:
    """One stage of a chain. `settings`: its section of the recipe with its own changes; `given`: its result, where it
    is there already; `inputs`: role → stages, each perhaps as NAME@STEPS."""

    name: str
    kind: str
    options: Options
    settings: BaseModel | None
    inputs: Mapping[str, tuple[str, ...]]
    gate: Gate | None
    given: Path | None

    @property
    def is_a(self) -> Kind:
        """What is known of all of its kind."""
        return KINDS[self.kind]

    @property
    def train(self) -> TrainSettings | None:
        """Its training, if it trains."""
        return getattr(self.settings, "train", None)

    @property
    def parents(self) -> tuple[str, ...]:
        """The stages that it reads, each once."""
        return tuple(dict.fromkeys(plain(one) for names in self.inputs.values() for one in names))


def plain(system: str) -> str:
    """The stage of NAME@STEPS."""
    return system.partition("@")[0]


@dataclass(frozen=True)
class Chain:
    """A recipe's stages in their order."""

    recipe: Recipe
    stages: tuple[Stage, ...]

    def __getitem__(self, name: str) -> Stage:
        """The stage of a name; raises PocketfusionError if there is none."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise PocketfusionError(f"there is no stage {name!r}: {nearest(name, [stage.name for stage in self.stages])}")

    def opened(self, model_folder: Callable[[Path], Path]) -> Chain:
        """The chain with a folder wherever a model is given; `model_folder` gives that of a checkpoint's file."""
        stages = tuple(
            replace(stage, given=model_folder(stage.given)) if stage.given and stage.is_a.makes == "model" else stage
            for stage in self.stages
        )
        return replace(self, stages=stages)

    def recipe_of(self, stage: Stage) -> Recipe:
        """The recipe with the stage's own settings in their section."""
        section = stage.is_a.section
        return self.recipe.model_copy(update={section: stage.settings}) if section else self.recipe

    def depends_on(self, stage: Stage) -> dict[str, Any]:
        """Everything of the recipe that the stage's result depends on, as JSON values; its inputs' contents apart."""
        if stage.given is not None:
            return {"kind": stage.kind, "given": True}
        read = {name: _at(self.recipe, name) for name in stage.is_a.reads}
        source = Path(self.recipe.text.source)
        if "text" in read and source.is_dir():  # known by what it holds, wherever it lies
            read["text"] = {"max_length": self.recipe.text.max_length, "sha256": _text_hash(source)}
        settings = stage.settings.model_dump(mode="json") if stage.settings else {}
        inputs = {role: list(names) for role, names in stage.inputs.items()}
        return {
            "kind": stage.kind,
            "settings": settings,
            "options": stage.options.model_dump(mode="json"),
            "recipe": read,
            "inputs": inputs,
        }


@lru_cache(maxsize=1)  # the stages of a chain share it
def _text_hash(folder: Path) -> str:
    parts = [folder / name for name in ("text_encoder", "tokenizer") if (folder / name).is_dir()]
    return "".join(sha256_folder(part) for part in parts or [folder])


def _at(settings: BaseModel | None, dotted: str) -> Any:
    """The value of a dotted name; None if there is none."""
    value: Any = settings
    for name in dotted.split("."):
        value = getattr(value, name, None)
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def chain_of(recipe: Recipe) -> Chain:
    """Reads the stages; raises PocketfusionError naming the stage and what is wrong with it."""
    if not recipe.stages:
        raise PocketfusionError(f"the recipe {recipe.name} has no section 'stages': see recipes/tiny.yaml")
    found: list[Stage] = []
    for name, entry in recipe.stages.items():
        found.append(_stage(recipe, name, dict(entry or {}), found))
    return Chain(recipe, tuple(found))


def _stage(recipe: Recipe, name: str, entry: dict[str, Any], before: list[Stage]) -> Stage:
    called = entry.pop("stage", name)
    if called not in KINDS:
        raise PocketfusionError(f"there is no stage {called!r}: {nearest(str(called), list(KINDS))}")
    if not _NAME.fullmatch(name):
        raise PocketfusionError(f"a stage is called {name!r}: use small letters, digits, dots and hyphens")
    kind: Kind = KINDS[called]
    source, asked = entry.pop("from", None), entry.pop("gate", None)
    if source is not None:
        more = [key for key in entry if called != "data" or key != "skip_bad"] + (["gate"] if asked else [])
        if more:
            raise PocketfusionError(
                f"the stage {name} is taken from {source}, so it has no {more[0]!r}: leave one out"
            )
        options = _settings(recipe, name, replace(kind, section=None), entry)[0]
        return Stage(name, called, options, None, {}, None, Path(str(source)))
    for section in SECTIONS:
        if getattr(recipe, section) is None and section in (
            kind.section,
            *(one.partition(".")[0] for one in kind.reads),
        ):
            raise PocketfusionError(f"the stage {name} needs the recipe's section {section!r}: add it")
    named = {role: entry.pop(role, None) for role in kind.takes}
    own = set(entry)
    options, settings = _settings(recipe, name, kind, entry)
    inputs = {}
    for role, takes in kind.takes.items():
        if named[role] is None and own.intersection(takes.unless):
            continue
        if not takes.only_with or _at(settings, takes.only_with):
            inputs[role] = _input(name, role, takes, named[role], before)
    stage = Stage(name, called, options, settings, {r: found for r, found in inputs.items() if found}, None, None)
    _check_target(stage, before)
    return stage if asked is None else _gated(stage, asked)


def _check_target(stage: Stage, before: list[Stage]) -> None:
    """Raises PocketfusionError if the weights of an export were chosen for another target."""
    target = getattr(stage.options, "target", None) or "litert-cpu"
    for one in before:
        other = getattr(one.options, "target", target)
        if one.name in stage.inputs.get("recipe", ()) and other != target:
            raise PocketfusionError(
                f"the stage {stage.name} is for {target} and its recipe {one.name} for {other}: give both one target"
            )


def _input(name: str, role: str, takes: Takes, asked: Any, before: list[Stage]) -> tuple[str, ...]:
    fitting = [stage for stage in before if stage.is_a.makes in takes.makes]
    what = " or ".join(map(_a, takes.makes))
    if asked is None:
        return _default_input(name, role, takes, fitting, what)
    names = [asked] if isinstance(asked, str) else asked
    if not isinstance(names, list) or not names or not all(isinstance(one, str) for one in names):
        raise PocketfusionError(f"the stage {name} has {role} {asked!r}: give the name of an earlier stage")
    if len(names) > 1 and not takes.several:
        raise PocketfusionError(f"the stage {name} takes one {role}, not {', '.join(names)}: name one stage")
    known = {stage.name: stage for stage in before}
    for one in names:
        _, at, steps = one.partition("@")
        if at and not (takes.several and steps.isdecimal() and int(steps)):
            raise PocketfusionError(f"the stage {name} has {role} {one!r}: name a stage, and steps only for a curve")
        if plain(one) not in known:
            raise PocketfusionError(
                f"the stage {name} takes its {role} from {plain(one)!r}, which is no stage before it: "
                f"{nearest(plain(one), list(known)) if known else 'put it behind that one'}"
            )
        makes = known[plain(one)].is_a.makes
        if makes not in takes.makes:
            raise PocketfusionError(
                f"the stage {name} takes its {role} from {plain(one)!r}, {_a(makes)}: it needs {what}"
            )
    return tuple(names)


def _a(thing: str) -> str:
    """With its article."""
    return thing if thing in ("data", "weights") else f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}"


def _default_input(name: str, role: str, takes: Takes, fitting: list[Stage], what: str) -> tuple[str, ...]:
    if takes.several:
        wanted = [[s for s in fitting if s.kind == kind][-1:] for kind in takes.default]
        chosen = [stage for found in wanted for stage in found] or fitting
        if takes.default and fitting and fitting[-1] not in chosen:
            chosen.append(fitting[-1])
        found = [stage.name for stage in chosen]
    elif takes.named:
        return ()
    else:
        preferred = [stage for stage in fitting if stage.kind in takes.default]
        found = [stage.name for stage in (preferred or fitting)[-1:]]
    if not found and not takes.optional:
        makers = [kind for kind, one in KINDS.items() if one.makes in takes.makes]
        purpose = "" if role.replace("-", " ") in takes.makes else f" as its {role}"
        raise PocketfusionError(
            f"the stage {name} needs {what}{purpose}, and no stage before it makes one: put "
            f"{' or '.join(makers[:3])} before it"
        )
    return tuple(found)


def _settings(recipe: Recipe, name: str, kind: Kind, entry: dict[str, Any]) -> tuple[Options, BaseModel | None]:
    """The stage's options and its section of the recipe, with what the entry changes of both."""
    own = {key: entry.pop(key) for key in list(entry) if key in kind.options.names()}
    section: BaseModel | None = None
    if kind.section is not None:
        section = getattr(recipe, kind.section, None)
        if section is None:
            raise PocketfusionError(f"the stage {name} trains by the recipe's section {kind.section!r}: add it")
    known = [*(type(section).model_fields if section else ()), *kind.options.names(), *kind.takes, *_OWN]
    for key in entry:
        if section is None or key not in type(section).model_fields:
            raise PocketfusionError(f"the stage {name} has no setting {key!r}: {nearest(str(key), known)}")
    model: type[BaseModel] = kind.options
    try:
        options = kind.options.model_validate(own)
        if section is not None and entry:
            model = type(section)
            section = model.model_validate(_merged(field_values(section), entry))
    except ValidationError as error:
        raise PocketfusionError(f"the stage {name}: {described(error, model)}") from None
    return options, section


def _merged(settings: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    both = {k: _merged(settings[k], v) for k, v in changes.items() if isinstance(v, Mapping) and settings.get(k)}
    return {**settings, **changes, **both}


def _gated(stage: Stage, asked: Any) -> Stage:
    """The stage with its gate; raises PocketfusionError unless it names scores of the stage."""
    name, scores = stage.name, stage.is_a.scores
    if not isinstance(asked, Mapping):
        raise PocketfusionError(f"the gate of {name} is {asked!r}: give a score and its bound, as val_psnr_db: 28.5")
    up_to = asked.get("up_to")
    bounds = {key: value for key, value in asked.items() if key != "up_to"}
    if not bounds:
        raise PocketfusionError(f"the gate of {name} names no score: there are {', '.join(scores)}")
    for key, value in bounds.items():
        if key not in scores:
            raise PocketfusionError(f"the gate of {name} names {key!r}, no score of it: {nearest(key, list(scores))}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
            raise PocketfusionError(f"the gate of {name} asks {key} for {value!r}: give a number")
    if up_to is not None:
        if stage.train is None:
            raise PocketfusionError(f"the gate of {name} has up_to, but {stage.kind} trains no steps: leave it out")
        steps = stage.train.steps
        if not isinstance(up_to, int) or up_to < steps or up_to % steps:
            raise PocketfusionError(
                f"the gate of {name} has up_to {up_to!r}: give a multiple of its {steps} steps, such as {2 * steps}, "
                "since its learning rate goes through a whole schedule each time"
            )
    sides = {side: {k: float(v) for k, v in bounds.items() if scores[k] == side} for side in ("higher", "lower")}
    return replace(stage, gate=Gate(sides["higher"], sides["lower"], up_to))
