"""The styles that a model was taught go into its bundle, for pages and apps that offer them with the prompt."""

from __future__ import annotations

import json
from pathlib import Path

from pocketfusion.bounded import MB, read_json
from pocketfusion.data.emoji.drawings import STYLES
from pocketfusion.errors import PocketfusionError
from pocketfusion.runtime.manifest import check_styles

FILE = "styles.json"


def styles_of(folder: Path) -> list[str]:
    """What prompts end with: the folder's own `styles.json`, a list of texts, where it has one; else the styles of the
    emoji drawings that its licences name; else none. PocketfusionError for a file that is no such list."""
    file = folder / FILE
    if file.is_file():
        try:
            return check_styles(read_json(file, MB)[0])
        except (OSError, ValueError) as error:
            raise PocketfusionError(
                f"{file} cannot be used ({error}): make it a list of texts, or delete it"
            ) from None
    notes = {path.stem for path in (folder / "licences").glob("drawings-*.txt")}
    return [f"{style.words} style" for name, style in STYLES.items() if f"drawings-{name}" in notes]


def write_styles(folder: Path, bundle: Path) -> dict[str, Path]:
    """Writes the styles of `folder` into the bundle, and returns the file by its name in the manifest, if any."""
    if not (styles := styles_of(folder)):
        return {}
    (bundle / FILE).write_text(json.dumps(styles, ensure_ascii=False) + "\n", encoding="utf-8")
    return {"styles": bundle / FILE}
