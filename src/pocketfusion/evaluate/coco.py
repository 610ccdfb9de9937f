"""MS-COCO as published: its captions file, the fixed list of captions drawn from it, and both as a reference."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from pocketfusion.artefact import sha256_file
from pocketfusion.data.files import parse_json, read_text
from pocketfusion.data.pictures import PICTURES, read_picture
from pocketfusion.data.rows import LeftOut, captions
from pocketfusion.errors import PocketfusionError
from pocketfusion.evaluate.reference import ImageProtocol

Real = Literal["all", "listed"]  #: what FID compares with: the split's whole set, or the listed captions' pictures


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
            if not _is_plain(name):
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


def _is_plain(name: str) -> bool:
    """Whether a file's name leads nowhere else and can be written as UTF-8."""
    return Path(name).name == name != "" and "\0" not in name and not any("\ud800" <= c <= "\udfff" for c in name)


def _rank(seed: int, kind: str, id_: int) -> str:
    return sha256(f"coco-v1|{seed}|{kind}|{id_}".encode()).hexdigest()


def list_sha256(captions: Iterable[Caption]) -> str:
    """What the result file records of a caption list: SHA-256 of its lines `image_id TAB caption_id TAB text LF`."""
    lines = "".join(f"{entry.image_id}\t{entry.caption_id}\t{entry.text}\n" for entry in captions)
    return sha256(lines.encode()).hexdigest()


def _find_annotations(folder: Path) -> Path:
    """The one `captions_*.json` in `folder/annotations` or `folder`, without those of training splits if others are.

    Raises PocketfusionError if there is none or a choice.
    """
    found = [*folder.glob("annotations/captions_*.json"), *folder.glob("captions_*.json")]
    found = [file for file in found if "train" not in file.name] or found
    if len(found) != 1:
        listed = ", ".join(sorted(file.name for file in found)) or "none"
        raise PocketfusionError(f"{folder} should hold one captions_*.json (it has {listed}): give --annotations FILE")
    return found[0]


class CocoReference:
    """A caption list with its pictures (see `reference.CaptionedReference`), read when they are asked for."""

    def __init__(
        self,
        annotations: Annotations,
        chosen: Sequence[Caption],
        folder: Path,
        real: Sequence[str],
        image_protocol: ImageProtocol,
        settings: dict[str, Any],
        notes: list[str],
    ):
        """`chosen`: the list; `folder`: where the pictures are; `real`: file names of FID's real side; `settings`: how
        the list and the real side were chosen, for the result file."""
        self.folder, self.chosen, self.real, self.notes = folder, list(chosen), list(real), notes
        self.name = f"MS-COCO {annotations.file.stem}"
        self.image_protocol, self.image_size = image_protocol, image_protocol.size
        self.ids = [Path(entry.file_name).stem for entry in chosen]
        self.captions = [entry.text for entry in chosen]
        self.real_count = len(real)
        sizes = "\n".join(f"{name} {(folder / name).stat().st_size}" for name in self.real)
        self._protocol = {
            "data": {"name": "MS-COCO", "annotations": annotations.file.name, "sha256": annotations.sha256},
            **settings,
            "samples": len(chosen),
            "caption": "one an image, both by hash of seed and id",
            "list_sha256": list_sha256(chosen),
            "real_count": len(real),
            "real_sha256": sha256(sizes.encode()).hexdigest(),  # of file names and sizes
            "image": image_protocol.describe(),
        }
        self.fingerprint = sha256(json.dumps(self._protocol, sort_keys=True).encode()).hexdigest()

    def protocol(self) -> dict[str, Any]:
        """See `CaptionedReference`."""
        return self._protocol

    def prepare(self, images: np.ndarray) -> np.ndarray:
        """See `CaptionedReference`."""
        return self.image_protocol.generated(images)

    def images(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """See `CaptionedReference`; raises PocketfusionError naming a picture that cannot be read."""
        return self._read([self.chosen[int(i)].file_name for i in indices])

    def real_images(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """See `CaptionedReference`; raises PocketfusionError naming a picture that cannot be read."""
        return self._read([self.real[int(i)] for i in indices])

    def _read(self, names: Sequence[str]) -> np.ndarray:
        with ThreadPoolExecutor() as pool:  # Pillow decodes without the interpreter's lock
            return np.stack(list(pool.map(lambda name: self._picture(name), names)))

    def _picture(self, name: str) -> np.ndarray:
        with LeftOut(skip=False).or_raise():
            picture = read_picture(self.folder / name)
        return self.image_protocol.real(picture)


def _is_bad(file: Path) -> bool:
    try:
        read_picture(file)
        return False
    except PocketfusionError:
        return True


def _pictures_folder(folder: Path, annotations: Path) -> Path:
    """`folder/val2014` for captions_val2014.json, or `folder` itself."""
    split = annotations.stem.removeprefix("captions_")
    return folder / split if (folder / split).is_dir() else folder


def _named(count: int, what: str, names: Sequence[str]) -> str:
    return f"{count:,} {what} ({', '.join(names[:3])}{', …' if count > 3 else ''})."


def open_coco(
    folder: Path,
    annotations: Path | None,
    samples: int,
    size: int = 256,
    seed: int = 0,
    skip_bad: bool = False,
    real: Real = "all",
    on_checked: Callable[[int, int], None] = lambda done, total: None,
) -> CocoReference:
    """The official layout (`val2014/` beside `annotations/captions_val2014.json`; 2017 likewise) or a flat folder.

    256 px is BK-SDM's protocol, which has JPEG files in between; for other sizes no paper says more than the size.
    `real`: FID against all pictures of the annotation file that are there (BK-SDM: 40,504), or against those of the
    list. With `skip_bad` all of them are decoded first (`on_checked`: done, total) and unreadable ones left out of
    both sides. What is missing or left over is in the notes.

    Raises PocketfusionError if a file or folder is missing or not in COCO's format, the list is longer than there are
    captioned images, or a picture of the list is missing.
    """
    if not folder.is_dir():
        raise PocketfusionError(f"there is no COCO folder at {folder}: it holds val2014/ and annotations/")
    if size < 32:
        raise PocketfusionError(f"pictures of {size} px are too small to score: COCO is scored at 256 or 512 px")
    notes = []
    listed = Annotations(annotations or _find_annotations(folder))
    pictures = _pictures_folder(folder, listed.file)
    try:
        present = {
            file.name for file in pictures.iterdir() if file.suffix.lower() in PICTURES and _is_plain(file.name)
        }
    except OSError as error:
        raise PocketfusionError(f"{pictures} cannot be listed ({error.strerror})") from None
    if not present:
        raise PocketfusionError(f"{pictures} holds no pictures: unpack the split's zip file there")
    chosen = listed.choose(samples, seed)
    absent = [entry.file_name for entry in chosen if entry.file_name not in present]
    if absent:
        raise PocketfusionError(
            f"{len(absent)} of the {samples} listed captions have no picture in {pictures} "
            f"(first: {', '.join(absent[:3])}): unpack the whole split there"
        )
    expected = set(listed.images.values())
    captioned = {listed.images[id_] for id_ in listed.captions if id_ in listed.images}
    if gone := sorted(captioned - present):
        notes.append(_named(len(gone), "captioned images have no picture here", gone))
    if bare := sorted(present - captioned):
        notes.append(_named(len(bare), "pictures have no caption and are not in the list", bare))
    if strays := sorted(str(id_) for id_ in listed.captions if id_ not in listed.images):
        notes.append(_named(len(strays), "image ids have captions but no entry in 'images'", strays))
    of_real = sorted(expected & present) if real == "all" else [entry.file_name for entry in chosen]
    if skip_bad:
        needed, bad = sorted({*of_real, *(entry.file_name for entry in chosen)}), []
        with ThreadPoolExecutor() as pool:
            for done, (name, is_bad) in enumerate(
                zip(needed, pool.map(lambda name: _is_bad(pictures / name), needed), strict=True), 1
            ):
                bad += [name] if is_bad else []
                on_checked(done, len(needed))
        if bad:
            known_bad = set(bad)
            chosen = [entry for entry in chosen if entry.file_name not in known_bad]
            of_real = [name for name in of_real if name not in known_bad]
            notes.append(_named(len(bad), "unreadable pictures were left out", bad))
        if len(chosen) < 2:
            raise PocketfusionError(f"{pictures} has {len(bad)} unreadable pictures and fewer than 2 others listed")
    # BK-SDM's files are .jpg, written with Pillow's default quality
    protocol = ImageProtocol(size, jpeg_quality=75 if size == 256 else None)
    settings = {"seed": seed, "samples_asked": samples, "real": real}
    return CocoReference(listed, chosen, pictures, of_real, protocol, settings, notes)
