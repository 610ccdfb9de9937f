"""Licence notes that travel with a model folder, one small file each, readable by people and by `export`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class LicenceNote:
    """What is under which licence (SPDX identifier), and whom to name."""

    what: str
    spdx: str
    attribution: str

    def text(self) -> str:
        """The note as `licences/NAME.txt` holds it."""
        return f"{self.what}\nSPDX-License-Identifier: {self.spdx}\nAttribution: {self.attribution}\n"


def write_licences(folder: Path, notes: Iterable[LicenceNote]) -> None:
    """Writes `folder/licences/NAME.txt` for each note."""
    target = folder / "licences"
    target.mkdir(parents=True, exist_ok=True)
    for note in notes:
        name = re.sub(r"[^a-z0-9]+", "-", note.what.lower()).strip("-")
        (target / f"{name}.txt").write_text(note.text(), encoding="utf-8")
