"""The options `--target`, which several commands have, and `--for`."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer


class TargetOption(str, Enum):
    """Where a bundle is to run (`mobile.targets`)."""

    litert_cpu = "litert-cpu"
    litert_gpu = "litert-gpu"


class DeviceOption(str, Enum):
    """Whom a bundle is made for (`mobile.devices`)."""

    android = "android"
    iphone = "iphone"
    browser = "browser"
    desktop = "desktop"


TargetOpt = Annotated[TargetOption, typer.Option("--target", help="Where the bundle is to run.")]
