"""`web-build`: the page and its bundles as files for any host, which need send no headers of their own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pocketfusion.artefact import atomic_folder
from pocketfusion.serve.site import Entry


@dataclass(frozen=True)
class SiteReport:
    """A site that was written: number of files, bytes of all, and of the page alone as a first visit fetches it."""

    out: str
    files: int
    size: int


def write_site(entries: Iterable[Entry], out: Path, *, overwrite: bool = False) -> SiteReport:
    """Writes every entry at its path below `out`, and `NAME.gz` beside those that gzip makes smaller, for hosts that
    send such files by themselves; PocketfusionError if `out` exists and `overwrite` is false, or cannot be written."""
    files = size = 0
    with atomic_folder(out, overwrite=overwrite) as partial:
        for entry in entries:
            target = partial / entry.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content := entry.read())
            files, size = files + 1, size + len(content)
            if entry.gzipped is not None:
                target.with_name(target.name + ".gz").write_bytes(entry.gzipped)
    return SiteReport(str(out), files, size)
