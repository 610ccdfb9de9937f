"""Licences travel with the weights: the folder's `licences/` into the bundle, and an entry each in its manifest."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from pocketfusion.runtime.manifest import Licence

_SPDX = re.compile(r"SPDX-License-Identifier:\s*([\w.+-]+)")
_ATTRIBUTION = re.compile(r"^(?:Attribution:\s*(.+)|(Copyright .+))$", re.MULTILINE)


def copy_licences(folder: Path, bundle: Path) -> tuple[dict[str, Path], list[Licence]]:
    """Copies `folder/licences/*` and returns the copies by the manifest's file names (`licence:NAME`), and entries.

    An entry's SPDX identifier is the file's `SPDX-License-Identifier:` line, else `LicenseRef-NAME`, which in SPDX
    means "see that text"; its attribution is the file's `Attribution:` or `Copyright` lines.
    """
    sources = sorted(p for p in (folder / "licences").glob("*") if p.is_file())
    copies: dict[str, Path] = {}
    entries = []
    if sources:
        (bundle / "licences").mkdir()
    for source in sources:
        copy = bundle / "licences" / source.name
        shutil.copyfile(source, copy)
        copies[f"licence:{source.stem}"] = copy
        text = source.read_text(encoding="utf-8", errors="replace")
        spdx = _SPDX.search(text)
        reference = "LicenseRef-" + re.sub(r"[^\w.-]", "-", source.stem)
        attribution = "; ".join((a or b).strip() for a, b in _ATTRIBUTION.findall(text))
        entries.append(Licence.made(what=source.stem, spdx=spdx[1] if spdx else reference, attribution=attribution))
    return copies, entries
