"""Finishes a cache of latents whose parts are all there: the index and the manifest, written last."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from pocketfusion import __version__
from pocketfusion.artefact import atomic_file, atomic_folder, sha256_file, write_json
from pocketfusion.data.latents.layout import (
    FORMAT,
    INDEX,
    MANIFEST,
    PART,
    PARTS,
    ROWS,
    TABLE,
    VERSION,
    Plan,
    check_part,
    missing_parts,
)
from pocketfusion.data.rows import hold_out, rank, said, told_of
from pocketfusion.errors import PocketfusionError

LEFT_OUT = "left_out.txt"


def finish(out: Path, machine: str = "") -> dict[str, Any]:
    """Writes `index.npy` and `cache.json` (returned), and a list of what was left out.

    Memory: 100 bytes a picture. Raises PocketfusionError if parts are missing, or there is no picture.
    """
    plan = Plan.load(out)
    if missing := missing_parts(out, plan):
        named = ", ".join(part.name for part in missing[:3]) + (", …" if len(missing) > 3 else "")
        raise PocketfusionError(
            f"{out} lacks {len(missing)} of {len(plan.parts)} parts ({named}): run 'data cache' with all its --part"
        )
    parts = [check_part(out / PARTS / part.name, plan.key) for part in plan.parts]
    count = sum(about["count"] for about in parts)
    left_out = [*plan.left_out, *(one for about in parts for one in about["left_out"])]
    if not count:
        raise PocketfusionError(f"{out} holds no pictures: {left_out[0] if left_out else plan.source + ' has none'}")
    index, ranks, keys = np.empty(count, INDEX), np.empty(count, np.int64), np.empty(count, np.uint64)
    digest, names = sha256(), {"train": 0, "val_combo": 1}  # a split's number; free ones train until some are held out
    free, validated = np.zeros(count, bool), False
    for number, (line, part, start, length, record) in enumerate(_lines(out, plan)):
        row, key = line["row"], line.get("key", line["row"]["id"])
        split = names.setdefault(row["split"] or "train", len(names))
        index[number] = (part, start, length, line["bucket"], split, row["flip"], record)
        free[number], validated = row["split"] is None, validated or str(row["split"]).startswith("val")
        ranks[number], keys[number] = rank(row["id"]), int(sha256(key.encode()).hexdigest()[:16], 16)
        digest.update(said(row, line["pixels"]))
    index["split"][hold_out(ranks, free, validated)] = names["val_combo"]
    with atomic_file(out / TABLE) as partial, partial.open("wb") as file:
        np.save(file, index)
    buckets = plan.encoding.buckets
    if left_out:
        with atomic_file(out / LEFT_OUT) as partial:
            partial.write_text("".join(f"{one}\n" for one in left_out), encoding="utf-8")
    name, notes = told_of(plan.name, plan.notes, left_out, count - len(np.unique(keys)))
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "name": name,
        "fingerprint": _fingerprint(plan, digest.hexdigest()[:32]),
        "count": count,
        "splits": {name: int((index["split"] == number).sum()) for name, number in names.items()},
        "buckets": {str(bucket): int((index["bucket"] == n).sum()) for n, bucket in enumerate(buckets)},
        "encoding": asdict(plan.encoding),
        "licences": list(plan.licences),
        "notes": notes,
        "provenance": {
            "pocketfusion": __version__,
            "source": plan.source,
            "machine": machine,
            "hours": round(sum(about["seconds"] for about in parts) / 3600, 3),
        },
        "parts": {part.name: sha256_file(out / PARTS / part.name / PART) for part in plan.parts},
        "files": {TABLE: {"sha256": sha256_file(out / TABLE), "size": (out / TABLE).stat().st_size}},
    }
    write_json(out / MANIFEST, manifest)
    return manifest


def _lines(out: Path, plan: Plan) -> Iterator[tuple[dict[str, Any], int, int, int, int]]:
    """(line, part, where it begins, its length, its first record) of every picture."""
    for part, (name, _) in enumerate(plan.parts):
        records, start = [0] * len(plan.encoding.buckets), 0
        with (out / PARTS / name / ROWS).open("rb") as file:
            for text in file:
                line = json.loads(text)
                yield line, part, start, len(text), records[line["bucket"]]
                records[line["bucket"]] += 2 if line["row"]["flip"] else 1
                start += len(text)


def _fingerprint(plan: Plan, of_samples: str) -> str:
    """That of the pictures at one square size, so that a cache can take their place; else one of its own."""
    size, buckets = plan.encoding.size, plan.encoding.buckets
    if plan.fingerprint is None or buckets == ((size, size),):
        return plan.fingerprint or of_samples
    return sha256(f"{plan.fingerprint} {buckets}".encode()).hexdigest()[:32]


def merge(out: Path, folders: list[Path]) -> dict[str, Any]:
    """Brings the parts that machines made in `folders` of their own into `out` (made if need be), and finishes it.

    Files are linked where they can be, else copied. Raises PocketfusionError if a folder is of another plan, or parts
    are missing still.
    """
    for folder in folders:
        plan = Plan.load(folder)
        plan.save(out)
        (out / PARTS).mkdir(exist_ok=True)
        for part in plan.parts:
            have, place = folder / PARTS / part.name, out / PARTS / part.name
            if not (have / PART).is_file() or (place / PART).is_file():
                continue
            check_part(have, plan.key)
            with atomic_folder(place, overwrite=True) as partial:
                for file in have.iterdir():
                    _link(file, partial / file.name)
    return finish(out)


def _link(file: Path, place: Path) -> None:
    try:
        place.hardlink_to(file)
    except OSError:  # another disk, or a file system without links
        shutil.copyfile(file, place)
