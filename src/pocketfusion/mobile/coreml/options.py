"""What `export --target coreml` may be asked for, checked before anything is loaded."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from pocketfusion.errors import INSTALL_COREML, PocketfusionError
from pocketfusion.mobile.outside_loops import check_outside_loop

if TYPE_CHECKING:
    from pocketfusion.mobile.export_settings import ExportSettings

#: Versions of iOS that programs can be made for; what runs on the oldest runs on all later ones.
IOS = (17, 18)
OLDEST = IOS[0]
#: Forms of weights that need a later iOS.
_SINCE = {"int4-block": 18}


def check_options(settings: ExportSettings, folder: Path) -> None:
    """Raises PocketfusionError for what a Core ML bundle cannot be, and for its options on another target."""
    if settings.target != "coreml":
        if settings.ios is not None:
            raise PocketfusionError(f"--ios is {settings.ios} and the target {settings.target}: it is of coreml")
        return
    if find_spec("coremltools") is None:
        raise PocketfusionError(f"--target coreml needs coremltools: {INSTALL_COREML}")
    ios = OLDEST if settings.ios is None else settings.ios
    if ios < OLDEST:
        raise PocketfusionError(
            f"--ios is {ios}, too old: ML Programs with these operations and weights need iOS {OLDEST}, so choose "
            f"{' or '.join(str(each) for each in IOS)}"
        )
    if ios not in IOS:
        raise PocketfusionError(
            f"--ios is {ios}: choose {' or '.join(str(each) for each in IOS)}; later ones run both"
        )
    for network, kind in settings.weights.items():
        if ios < _SINCE.get(kind, ios):
            raise PocketfusionError(
                f"{kind} weights for {network} need iOS {_SINCE[kind]} and --ios is {ios}: give --ios {_SINCE[kind]}, "
                "or choose int8, palette6 or palette4"
            )
    if settings.recipe is not None:
        raise PocketfusionError("--recipe is of LiteRT's targets: choose Core ML's weights by --weights and its kin")
    if settings.layout == "apple":
        check_outside_loop(settings, folder)
