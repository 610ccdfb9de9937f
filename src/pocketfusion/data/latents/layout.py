"""What lies in a cache of latents, and the plan that all who write it follow.

```
plan.json            what it is made of and how: the same for all who write it
parts/NAME/          one shard or chunk of the source, whole or not there
    latents-WxH.f16  a bucket's records: mean and standard deviation, fp16 [records, 2C, h, w]; halved-WxH.f16 too
    rows.jsonl       one line a picture: its row, bucket and SHA-256 of its pixels
    part.json        counts, SHA-256 and size of these files, samples left out
index.npy            one entry a picture (`INDEX`)
cache.json           the manifest, written last
```
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from pocketfusion.artefact import write_json
from pocketfusion.data.buckets import Bucket
from pocketfusion.data.files import parse_json, read_text
from pocketfusion.data.rows import Part, Source
from pocketfusion.errors import PocketfusionError

FORMAT, VERSION = "pocketfusion-latents", 1
MANIFEST, PLAN, PARTS, PART, ROWS, TABLE = "cache.json", "plan.json", "parts", "part.json", "rows.jsonl", "index.npy"
#: A picture: its part, where its line is in that part's rows, its bucket, its split's number, whether the record after
#: its own is of its mirror image, and its first record in the part's file of the bucket.
INDEX = np.dtype(
    [
        ("part", "<u4"),
        ("line", "<u8"),
        ("length", "<u4"),
        ("bucket", "<u2"),
        ("split", "<u2"),
        ("flip", "?"),
        ("record", "<u4"),
    ]
)


@dataclass(frozen=True)
class Encoding:
    """What turns pictures into records: an autoencoder, known by its encoder's SHA-256, and the sizes of pictures.

    `halved`: the latents of each picture at half its width and height are kept too. `precision`: the encoder's.
    """

    autoencoder: str
    channels: int
    factor: int
    size: int  #: pixels of the square that the buckets have the area of; the largest of several
    buckets: tuple[Bucket, ...]
    halved: bool = False
    precision: str = "no"

    def shape(self, bucket: Bucket, halved: bool = False) -> tuple[int, int, int]:
        """Of a record: (2C, h, w)."""
        factor = self.factor * (2 if halved else 1)
        return 2 * self.channels, bucket.height // factor, bucket.width // factor


@dataclass(frozen=True)
class Plan:
    """What a cache will be. `left_out`: what of the source is bad before a part is read."""

    name: str
    fingerprint: str | None
    encoding: Encoding
    parts: tuple[Part, ...]
    skip_bad: bool
    left_out: tuple[str, ...]
    notes: tuple[str, ...]
    licences: tuple[dict[str, Any], ...]
    source: str  #: where it was read, for people

    @classmethod
    def of(cls, source: Source, encoding: Encoding, skip_bad: bool, where: str) -> Plan:
        """The plan for a source."""
        if not source.parts:
            raise PocketfusionError(f"{where} holds no dataset.json, no .tar shards and no pictures with captions")
        licences = tuple(asdict(note) for note in source.licences)
        lists = tuple(source.left_out), tuple(source.notes)
        return cls(source.name, source.fingerprint, encoding, tuple(source.parts), skip_bad, *lists, licences, where)

    @property
    def key(self) -> str:
        """SHA-256 of what the parts depend on."""
        return sha256(json.dumps(self._identity(), sort_keys=True).encode()).hexdigest()

    def _identity(self) -> dict[str, Any]:
        """By what a user may have changed. The left-out paths and the source's place differ between machines."""
        encoding = asdict(self.encoding)
        return {
            "autoencoder": [encoding.pop(name) for name in ("autoencoder", "channels", "factor")],
            "size or buckets": [encoding.pop("size"), [list(bucket) for bucket in encoding.pop("buckets")]],
            "--skip-bad": self.skip_bad,
            "pictures": [self.fingerprint, [list(part) for part in self.parts]],
            "settings": encoding,
        }

    def save(self, out: Path) -> None:
        """Writes `plan.json`, or checks that the one there is of the same.

        Raises PocketfusionError naming what differs.
        """
        if not (out / PLAN).is_file():
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / PLAN, {"format": FORMAT, "version": VERSION} | asdict(self))
        before, now = Plan.load(out)._identity(), self._identity()
        if differing := [name for name in now if json.dumps(before[name]) != json.dumps(now[name])]:
            raise PocketfusionError(
                f"{out} was begun with another {' and another '.join(differing)}: delete it, or choose another folder"
            )

    @classmethod
    def load(cls, out: Path) -> Plan:
        """Reads `plan.json`; raises PocketfusionError if it is missing or damaged."""
        values = read_json(out / PLAN)
        try:
            encoding = values["encoding"]
            buckets = tuple(Bucket(*map(int, bucket)) for bucket in encoding["buckets"])
            if odd := [name for name, _ in values["parts"] if not re.fullmatch(r"[a-z]+-\d{5,9}", name)]:
                raise ValueError(f"a part is named {odd[0]!r}")
            return cls(
                name=values["name"],
                fingerprint=values["fingerprint"],
                encoding=Encoding(**{**encoding, "buckets": buckets}),
                parts=tuple(Part(*map(str, part)) for part in values["parts"]),
                skip_bad=values["skip_bad"],
                left_out=tuple(values["left_out"]),
                notes=tuple(values["notes"]),
                licences=tuple(values["licences"]),
                source=values["source"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise PocketfusionError(f"{out / PLAN} is damaged ({error}): delete {out} and make it again") from None


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object of this version of a cache; raises PocketfusionError if it is missing, damaged or newer."""
    if not file.is_file():
        raise PocketfusionError(f"{file} is missing: run the same 'data cache' again, which makes what is missing")
    values = parse_json(read_text(file), str(file))
    if not isinstance(values, dict) or values.get("format") != FORMAT or values.get("version") != VERSION:
        raise PocketfusionError(f"{file} is of no cache that this version of pocketfusion reads: make it again")
    return values


def check_part(folder: Path, plan_key: str) -> dict[str, Any]:
    """`part.json` of a part whose files are all there at their sizes and of this plan; else PocketfusionError."""
    about = read_json(folder / PART)
    if about.get("plan") != plan_key:
        raise PocketfusionError(f"{folder} is of another cache: delete it and run the same 'data cache' again")
    try:
        sizes = {folder / name: entry["size"] for name, entry in about["files"].items() if Path(name).name == name}
    except (KeyError, TypeError, AttributeError) as error:
        raise PocketfusionError(f"{folder / PART} is damaged ({error}): run the same 'data cache' again") from None
    for file, size in sizes.items():
        if not file.is_file() or file.stat().st_size != size:
            raise PocketfusionError(f"{file} is missing or truncated: run the same 'data cache' again")
    return about


def records_file(bucket: Bucket, halved: bool) -> str:
    """The name of a bucket's file of records."""
    return f"{'halved' if halved else 'latents'}-{bucket}.f16"


def missing_parts(out: Path, plan: Plan) -> Sequence[Part]:
    """Those that are not there."""
    return [part for part in plan.parts if not (out / PARTS / part.name / PART).is_file()]
