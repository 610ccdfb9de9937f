"""MS-COCO's captions file, and the fixed list of captions that is drawn from it."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from pocketfusion.artefact import sha256_file
from pocketfusion.data.files import parse_json, read_text
from pocketfusion.data.rows import captions
from pocketfusion.errors import PocketfusionError


class Caption(NamedTuple):
    """One entry of the list."""

    image_id: int
    caption_id: int
    file_name: str
    text: str


class Annotations:
    """A captions file of MS-COCO: `images` (id → file name) and `captions` (image id → [(caption id, text)])."""

    def __init__(self, file: Path):
        """Raises PocketfusionError if the file is missing, no JSON, or lacks what a captions file has."""
        if not file.is_file():
            raise PocketfusionError(f"there is no annotation file at {file}: give the path of captions_val2014.json")
        values = parse_json(read_text(file), str(file))
        self.file, self.sha256 = file, sha256_file(file)
        self.images: dict[int, str] = {}
        self.captions: dict[int, list[tuple[int, str]]] = defaultdict(list)
        for entry in self._section(values, "images"):
            id_, name = self._fields(entry, "images", id=int, file_name=str)
            if id_ in self.images:
                raise PocketfusionError(f"{file} lists the image id {id_} twice: fetch it again")
            if not is_plain(name):
                raise PocketfusionError(f"{file} names the picture {name!r}: a plain file name is needed")
            self.images[id_] = name
        for entry in self._section(values, "annotations"):
            id_, image, text = self._fields(entry, "annotations", id=int, image_id=int, caption=str)
            if text.strip():
                (text,) = captions(text, f"{file}: the annotation {id_}")
                self.captions[image].append((id_, text))

    def _section(self, values: Any, name: str) -> list[Any]:
        section = values.get(name) if isinstance(values, dict) else None
        if not isinstance(section, list) or not section:
            raise PocketfusionError(f"{self.file} has no list '{name}': it is no captions file of MS-COCO")
        return section

    def _fields(self, entry: Any, section: str, **kinds: type) -> list[Any]:
        for name, kind in kinds.items():
            if not isinstance(entry, dict) or type(entry.get(name)) is not kind:  # isinstance takes true for 1
                raise PocketfusionError(
                    f"{self.file}: an entry of '{section}' has no {name} ({json.dumps(entry)[:80]}): "
                    "it is no captions file of MS-COCO"
                )
        return [entry[name] for name in kinds]

    def choose(self, samples: int, seed: int) -> list[Caption]:
        """The caption list: `samples` images, one caption each, by the hash of seed and ids alone.

        So it is a function of this file and the seed, on any machine, and a smaller list begins a larger one. Raises
        PocketfusionError if there are not that many captioned images.
        """
        captioned = [id_ for id_ in self.images if id_ in self.captions]
        if not 2 <= samples <= len(captioned):
            raise PocketfusionError(
                f"{samples} captions were asked for, but {self.file.name} has {len(captioned)} captioned images: "
                f"give a number of samples from 2 to {len(captioned)}"
            )
        chosen = []
        for image in sorted(captioned, key=lambda id_: _rank(seed, "image", id_))[:samples]:
            caption, text = min(self.captions[image], key=lambda entry: _rank(seed, "caption", entry[0]))
            chosen.append(Caption(image, caption, self.images[image], text))
        return chosen


def is_plain(name: str) -> bool:
    """Whether a file's name leads nowhere else and can be written as UTF-8."""
    return Path(name).name == name != "" and "\0" not in name and not any("\ud800" <= c <= "\udfff" for c in name)


def _rank(seed: int, kind: str, id_: int) -> str:
    return sha256(f"coco-v1|{seed}|{kind}|{id_}".encode()).hexdigest()


def list_sha256(captions: Iterable[Caption]) -> str:
    """What the result file records of a caption list: SHA-256 of its lines `image_id TAB caption_id TAB text LF`."""
    lines = "".join(f"{entry.image_id}\t{entry.caption_id}\t{entry.text}\n" for entry in captions)
    return sha256(lines.encode()).hexdigest()


def find_annotations(folder: Path) -> Path:
    """The one `captions_*.json` in `folder/annotations` or `folder`, without those of training splits if others are.

    Raises PocketfusionError if there is none or a choice.
    """
    found = [*folder.glob("annotations/captions_*.json"), *folder.glob("captions_*.json")]
    found = [file for file in found if "train" not in file.name] or found
    if len(found) != 1:
        listed = ", ".join(sorted(file.name for file in found)) or "none"
        raise PocketfusionError(f"{folder} should hold one captions_*.json (it has {listed}): give --annotations FILE")
    return found[0]
