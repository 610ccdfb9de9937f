"""Fills a cache of latents part by part: pictures stream from the source through the encoder to disk, once.

A part is written beside its name and renamed when it is whole, so a killed run loses the part that it was at, and
processes and machines that write other parts need not know of each other.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pocketfusion.artefact import atomic_folder, write_json
from pocketfusion.data.buckets import Bucket, choose_bucket, fit
from pocketfusion.data.decoding import decoded
from pocketfusion.data.latents.layout import (
    FORMAT,
    PART,
    PARTS,
    ROWS,
    VERSION,
    Encoding,
    Plan,
    check_part,
    records_file,
)
from pocketfusion.data.rows import LeftOut, Sample, Source
from pocketfusion.errors import PocketfusionError, told
from pocketfusion.terminal import Console, titled

#: (pixels uint8 [B, H, W, 3], halved) → mean and deviation of their latents, fp16 [B, 2C, h, w].
Encode = Callable[[np.ndarray, bool], np.ndarray]
#: Hears how many pictures are done since the last call, and of which part.
Tell = Callable[[int, str], None]


def fill(
    out: Path,
    source: Source,
    plan: Plan,
    encode: Encode,
    *,
    share: tuple[int, int] = (0, 1),
    batch: int = 32,
    workers: int | None = None,
    progress: Tell = lambda count, part: None,
) -> int:
    """Makes the parts that are missing of every `share[1]`-th from `share[0]`; returns the pictures encoded.

    Memory: one part's rows and captions, and a few batches of pictures. Raises PocketfusionError if `out` was begun
    with another plan, a sample is bad (unless the plan leaves such out), a latent is not finite, or the disk is full;
    what is whole stays.
    """
    plan.save(out)
    (out / PARTS).mkdir(exist_ok=True)
    own = range(share[0], len(plan.parts), share[1])
    encoded = 0
    for number in own:
        name = plan.parts[number].name
        folder = out / PARTS / name
        if is_whole(folder, plan.key):
            progress(0, name)
            continue
        try:
            with atomic_folder(folder, overwrite=True) as partial:
                encoded += _write(partial, source, number, plan, encode, batch, workers, progress)
        except OSError as error:
            kept = sum(is_whole(out / PARTS / part.name, plan.key) for part in plan.parts)
            where = "" if error.filename else f"{folder}: "
            raise PocketfusionError(
                f"{where}{told(error)} ({kept} of {len(plan.parts)} parts are whole and stay)"
            ) from None
    return encoded


def is_whole(folder: Path, plan_key: str) -> bool:
    """Whether a part is there with all its files."""
    if not (folder / PART).is_file():
        return False
    try:
        check_part(folder, plan_key)
    except PocketfusionError:
        return False
    return True


def _write(
    folder: Path,
    source: Source,
    number: int,
    plan: Plan,
    encode: Encode,
    batch: int,
    workers: int | None,
    progress: Tell,
) -> int:
    encoding, left_out, began, count = plan.encoding, LeftOut(plan.skip_bad), time.monotonic(), 0

    def bring(picture: Image.Image) -> tuple[int, np.ndarray]:
        bucket = choose_bucket(picture.width, picture.height, encoding.buckets)
        return bucket, fit(picture, *encoding.buckets[bucket])

    with ExitStack() as stack:
        samples = stack.enter_context(source.reading(number, left_out))
        rows = _Hashed(stack.enter_context((folder / ROWS).open("wb")))
        records = [_Records(folder, encoding, bucket, encode, batch, stack) for bucket in encoding.buckets]
        for sample, (bucket, pixels) in decoded(samples, bring, left_out, workers):
            rows.write(_line(sample, bucket, pixels))
            records[bucket].add(pixels, sample.row["flip"])
            count += 1
            progress(1, plan.parts[number].name)
        files = {ROWS: rows.entry()}
        for one in records:
            files |= one.close()
    about = {"format": FORMAT, "version": VERSION, "plan": plan.key, "source": plan.parts[number].made_of}
    about |= {"count": count, "records": [one.count for one in records], "files": files}
    about |= {"left_out": left_out.found, "seconds": round(time.monotonic() - began, 1)}
    write_json(folder / PART, about)
    return count


def _line(sample: Sample, bucket: int, pixels: np.ndarray) -> bytes:
    line = {"row": sample.row, "bucket": bucket, "pixels": sha256(pixels.tobytes()).hexdigest()}
    if sample.key != sample.row["id"]:
        line["key"] = sample.key
    return json.dumps(line, ensure_ascii=False).encode() + b"\n"


class _Hashed:
    """A file that is written once, from its beginning to its end."""

    def __init__(self, file: BinaryIO):
        self.file, self.digest, self.size = file, sha256(), 0

    def write(self, data: bytes) -> None:
        self.file.write(data)
        self.digest.update(data)
        self.size += len(data)

    def entry(self) -> dict[str, Any]:
        """For a manifest."""
        self.file.flush()
        return {"sha256": self.digest.hexdigest(), "size": self.size}


class _Records:
    """One bucket's records of a part: pictures wait here until they are a batch."""

    def __init__(self, folder: Path, encoding: Encoding, bucket: Bucket, encode: Encode, batch: int, stack: ExitStack):
        self.folder, self.encoding, self.bucket, self.stack = folder, encoding, bucket, stack
        self.encode, self.batch = encode, batch
        self.waiting: list[np.ndarray] = []
        self.files: dict[bool, _Hashed] = {}
        self.count = 0

    def add(self, pixels: np.ndarray, flip: bool) -> None:
        """A record of a picture and, where it may be mirrored, one of its mirror image."""
        self.waiting += [pixels, pixels[:, ::-1]] if flip else [pixels]
        self.count += 2 if flip else 1
        if len(self.waiting) >= self.batch:
            self._flush()

    def _flush(self) -> None:
        pixels, self.waiting = np.stack(self.waiting), []
        for halved in (False, True) if self.encoding.halved else (False,):
            made = np.ascontiguousarray(self.encode(pixels, halved), dtype="<f2")
            shape = (len(pixels), *self.encoding.shape(self.bucket, halved))
            if made.shape != shape:
                raise PocketfusionError(
                    f"the autoencoder makes latents {made.shape}, not {shape}: it is of another kind"
                )
            if not np.isfinite(made).all():
                raise PocketfusionError("the autoencoder gives latents that are not finite: check its weights")
            if halved not in self.files:
                file = (self.folder / records_file(self.bucket, halved)).open("wb")
                self.files[halved] = _Hashed(self.stack.enter_context(file))
            self.files[halved].write(made.tobytes())

    def close(self) -> dict[str, dict[str, Any]]:
        """Encodes the rest; the entries of its files."""
        if self.waiting:
            self._flush()
        return {records_file(self.bucket, halved): file.entry() for halved, file in self.files.items()}


def wait_until(done: Callable[[], bool]) -> None:
    """Looks twice a second: what other processes make on the same disk has no time limit."""
    while not done():
        time.sleep(0.5)


class PartsBar:
    """Context of a bar on standard error; `add` hears what `fill` tells."""

    def __init__(self, what: str, parts: int, shown: bool = True):
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
        )
        self.bar = Progress(
            *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True), disable=not shown
        )
        self.task = self.bar.add_task(titled(what), total=parts, rate="")
        self.began, self.pictures, self.parts = time.monotonic(), 0, dict[str, int]()

    def __enter__(self) -> PartsBar:
        self.bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.update(self.task, completed=len(self.parts) if error[0] is None else max(0, len(self.parts) - 1))
        self.bar.stop()

    def add(self, count: int, part: str) -> None:
        """So many more pictures of a part."""
        new = part not in self.parts
        self.parts[part] = self.parts.get(part, 0) + count
        self.pictures += count
        if new or self.pictures % 64 < count:
            rate = self.pictures / (time.monotonic() - self.began)
            said = f"{self.pictures:,} pictures, {rate:,.0f} a second"
            self.bar.update(self.task, completed=len(self.parts) - 1, rate=said)
