"""Arguments and options that several commands have: each is declared here once, with its words in `--help`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

# Models and where results go
ModelArg = Annotated[Path, typer.Argument(help="Model folder.", show_default=False)]
DiffusersArg = Annotated[Path, typer.Argument(help="Model folder (diffusers layout).", show_default=False)]
BundleArg = Annotated[Path, typer.Argument(help="Bundle.", show_default=False)]
OutArg = Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)]
ResultOpt = Annotated[Path, typer.Option("--out", "-o", help="Result folder to write.", show_default=False)]
ReplaceOpt = Annotated[bool, typer.Option("--overwrite", help="Replace an OUT that exists.")]
ReplaceOutOpt = Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]

# Training
FolderArg = Annotated[Path, typer.Argument(help="Model folder to train on from.", show_default=False)]
TeacherOpt = Annotated[Path, typer.Option("--teacher", help="Model folder to learn from.", show_default=False)]
RecipeOpt = Annotated[Path, typer.Option("--recipe", help="Recipe of that model.", show_default=False)]
TrainStepsOpt = Annotated[int | None, typer.Option("--train-steps", help="Updates. Default: the recipe's.")]
RecipeArg = Annotated[Path, typer.Argument(help="Recipe, such as recipes/emoji64.yaml.", show_default=False)]
DataOpt = Annotated[
    Path, typer.Option("--data", help="Folder of captioned pictures, or a cache of latents.", show_default=False)
]
PicturesOpt = Annotated[Path, typer.Option("--data", help="Folder of captioned pictures.", show_default=False)]
OutOpt = Annotated[Path, typer.Option("--out", "-o", help="Folder to write.", show_default=False)]
RunOpt = Annotated[Path | None, typer.Option("--run", help="Checkpoints, log, previews. Default: OUT.run")]
MinutesOpt = Annotated[float | None, typer.Option("--max-minutes", help="Stop after MIN; run again to go on.")]
InitOpt = Annotated[Path | None, typer.Option("--init", help="Begin with the weights of this folder.")]
LossJudgeOpt = Annotated[
    Path | None, typer.Option("--loss-judge", help="Judge trained --for-losses, if a loss wants its features.")
]
CacheOpt = Annotated[Path | None, typer.Option("--cache", help="Latents and prompt states. Default: RUN/cache")]
OverwriteOpt = Annotated[bool, typer.Option("--overwrite", help="Replace an OUT that came from other inputs.")]
SkipBadOpt = Annotated[bool, typer.Option("--skip-bad", help="Leave samples out that cannot be used; counts them.")]
LogWithOpt = Annotated[
    list[str] | None,
    typer.Option("--log-with", metavar="TRACKER", help="Show it there too: tensorboard, wandb, … May be repeated."),
]

# Drawing and scoring
ThreadsOpt = Annotated[int | None, typer.Option("--threads", help="CPU threads. Default: all cores.")]
SeedOpt = Annotated[int, typer.Option("--seed", help="Seed of every picture's noise.")]
ClipModelOpt = Annotated[str, typer.Option("--clip-model", help="open_clip's name of it.")]


class TargetOption(str, Enum):
    """Where a bundle is to run (`mobile.devices`)."""

    litert_cpu = "litert-cpu"
    litert_gpu = "litert-gpu"
    coreml = "coreml"
    onnx = "onnx"


class LiteRTTarget(str, Enum):
    """Those of them whose weights this project packs, layer by layer."""

    litert_cpu = "litert-cpu"
    litert_gpu = "litert-gpu"


class DeviceOption(str, Enum):
    """Whom a bundle is made for (`mobile.devices`)."""

    android = "android"
    iphone = "iphone"
    browser = "browser"
    desktop = "desktop"
