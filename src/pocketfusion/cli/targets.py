"""The option `--target`, which several commands have."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer


class TargetOption(str, Enum):
    """Where a bundle is to run (`mobile.targets`)."""

    litert_cpu = "litert-cpu"
    litert_gpu = "litert-gpu"


TargetOpt = Annotated[TargetOption, typer.Option("--target", help="Where the bundle is to run.")]
