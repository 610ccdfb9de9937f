"""The one door for what is given as a model: a folder passes, a checkpoint file is imported once and kept."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pocketfusion import __version__
from pocketfusion.artefact import check_writable_parent, sha256_file
from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import read_provenance
from pocketfusion.locks import fcntl
from pocketfusion.recognise import recognise

SUFFIX = ".pocketfusion"  #: of the folder beside a checkpoint that its import is kept in


def open_model(
    path: Path,
    say: Callable[[str], None] = lambda sentence: None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Path:
    """The model folder to be used for `path`: itself, unless it is a file.

    A file's folder lies beside it (`NAME.pocketfusion`), or in the user's cache where that cannot be written. It is
    used again as long as the file's hash and this library's version are the same, and else made anew; `say` is told
    which. Raises PocketfusionError if the file is no checkpoint that can be imported without being asked anything.
    """
    if not path.is_file():
        return path
    recognise(path)  # refused before anything is hashed or imported
    with path.open("rb") as opened:
        if fcntl is not None:  # of several processes, one imports and the others find it done
            on_stage("waiting for another process's import")
            with suppress(OSError):  # a file system without locks
                fcntl.flock(opened, fcntl.LOCK_EX)
        return _opened(path, say, on_stage)


def _opened(path: Path, say: Callable[[str], None], on_stage: Callable[[str], None]) -> Path:
    on_stage("hashing the file")
    digest = sha256_file(path)
    places = (path.with_name(path.stem + SUFFIX), _cache() / f"{path.stem}-{digest[:12]}")
    for place in places:
        if _made_of(place) == (digest, __version__):
            say(f"{path} is imported at {place}")
            return place
    place = next((one for one in places if _usable(one)), places[0])
    from pocketfusion.models.bring.importer import import_file

    import_file(path, place, overwrite=_made_of(place) is not None, on_stage=on_stage)
    say(f"{path} was imported to {place}")
    return place


def _made_of(place: Path) -> tuple[str, str] | None:
    """The hash of the file that a folder was imported of and by which version; None if it is no such folder."""
    try:
        provenance = read_provenance(place)
    except PocketfusionError:
        return None
    if provenance is None or provenance.stage != "import":
        return None
    return provenance.parents.get("file", ""), provenance.pocketfusion


def _usable(place: Path) -> bool:
    """Whether an import can be written there: the place is free or an earlier import's."""
    if place.parent == _cache():
        place.parent.mkdir(parents=True, exist_ok=True)
    try:
        check_writable_parent(place)
    except PocketfusionError:
        return False
    return not os.path.lexists(place) or _made_of(place) is not None


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pocketfusion" / "imports"
