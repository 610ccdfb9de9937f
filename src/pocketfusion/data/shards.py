"""webdataset shards: tar archives of picture + `.txt` (or `.json`) under one name, read by us and never unpacked."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from pocketfusion.data.files import open_file, parse_json, plain_text
from pocketfusion.data.pictures import PICTURES, UNREAD, Stored
from pocketfusion.data.rows import MAX_CAPTION, LeftOut, Sample, captions, parse_row, split_of_path
from pocketfusion.errors import PocketfusionError


@dataclass
class _Sample:
    pictures: list[tarfile.TarInfo] = field(default_factory=list)
    texts: dict[str, tarfile.TarInfo] = field(default_factory=dict)  #: `.txt` and `.json`
    unread: str | None = None  #: a member that is a picture of a type that is not read


def iter_shard(
    file: Path, left_out: LeftOut, shown: str | None = None
) -> Iterator[tuple[str, Stored, dict[str, Any]]]:
    """(key, picture, row) of each sample; pictures are not read yet. `shown`: how sentences name the file.

    A key is the member's path without what follows its *last* dot.
    webdataset cuts at the first dot, which loses `photo v1.5.png`; members as `0001.seg.png` without a caption beside
    a sample `0001` are further fields and no samples, as there. Fields of other types are not read.

    Raises PocketfusionError for a damaged archive, links, devices, paths that lead out, and bad samples, unless
    `left_out` takes them.
    """
    opened, shown = None, shown or str(file)
    with left_out.or_raise():
        opened = open_file(file)
    if opened is None:
        return
    with opened:
        try:
            # "r:": no decompression, which could grow without end; tarfile gets our stream and never the name
            tar = tarfile.open(fileobj=opened, mode="r:")  # noqa: SIM115
        except Exception as error:
            left_out.tell(f"the shard {shown} is damaged ({_reason(error)}): fetch or build it again, uncompressed")
            return
        samples = _samples(tar, shown, opened, left_out)
        for key, sample in samples.items():
            head, _, tail = key.rpartition(".")
            if (
                tail.isalpha()
                and head in samples
                and samples[head].pictures
                and not (sample.pictures and sample.texts)
            ):
                continue
            if not (sample.pictures or sample.texts or sample.unread):
                continue
            made = None
            with left_out.or_raise():
                made = _read(tar, file, f"{shown}: sample '{key}'", sample)
            if made is not None:
                yield key, *made


def shard_samples(
    file: Path, name: PurePosixPath, shards: int, left_out: LeftOut, shown: str | None = None
) -> Iterator[Sample]:
    """The samples of one of several `shards`, which may all count from 0: `name` is a part of their ids then."""
    for key, picture, row in iter_shard(file, left_out, shown):
        split = split_of_path([*name.with_suffix("").parts, *PurePosixPath(key).parts[:-1]])
        unique = key if shards == 1 else f"{name.with_suffix('')}/{key}"
        yield Sample(key, picture, {"id": unique, "split": split, "flip": False, **row})


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:80]


def _samples(tar: tarfile.TarFile, shown: str, opened: BinaryIO, left_out: LeftOut) -> dict[str, _Sample]:
    """The archive's members by key, in its order; nothing of them is read."""
    samples: dict[str, _Sample] = {}
    seen: set[str] = set()
    end = -1
    try:
        while (member := tar.next()) is not None:
            if member.offset_data <= end:  # a crafted header leads back, and tarfile would go round for ever
                raise tarfile.ReadError("a header leads back")
            end = member.offset_data
            with left_out.or_raise():
                _sort_in(member, shown, samples, seen)
        _check_end(tar, opened)
    except PocketfusionError:
        raise
    except Exception as error:  # tarfile raises many kinds on crafted headers, also RecursionError
        left_out.tell(f"the shard {shown} is damaged ({_reason(error)}): fetch or build it again")
    return samples


def _check_end(tar: tarfile.TarFile, opened: BinaryIO) -> None:
    """tarfile ends in silence at a damaged header, and at the first of two archives joined by `cat`."""
    opened.seek(tar.offset)
    block = opened.read(512)
    if len(block) < 512 or any(block):
        raise tarfile.ReadError("it has no end mark: it was cut short or has a bad header")
    while block := opened.read(1 << 20):
        if block.count(0) < len(block):
            raise tarfile.ReadError("data follows its end, as in archives joined by cat")


def _sort_in(member: tarfile.TarInfo, shown: str, samples: dict[str, _Sample], seen: set[str]) -> None:
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        raise PocketfusionError(f"{shown} holds the path {member.name!r}: pack it with paths below its own folder")
    if member.isdir() or any(part.startswith((".", "__")) for part in path.parts):
        return  # hidden, such as the ._ files of macOS
    name = str(path)
    if not path.name:
        raise PocketfusionError(f"{shown} holds a file without a name ({member.name!r}): pack it again without it")
    if not member.isreg():
        kind = "link" if member.issym() or member.islnk() else "device or FIFO"
        raise PocketfusionError(f"{shown} holds the {kind} {name!r}: pack plain files (tar --dereference)")
    if member.issparse():
        raise PocketfusionError(f"{shown} holds the sparse file {name!r}: pack it again without --sparse")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise PocketfusionError(f"{shown} holds a name that is not UTF-8 ({name!r}): rename it") from None
    if name in seen:
        raise PocketfusionError(f"{shown} holds {name!r} twice: keep one of them")
    seen.add(name)
    suffix = path.suffix.lower()
    sample = samples.setdefault(str(path.with_suffix("")), _Sample())
    if suffix in PICTURES:
        sample.pictures.append(member)
    elif suffix in (".txt", ".json"):
        sample.texts[suffix] = member
    elif suffix in UNREAD:
        sample.unread = name


def _read(tar: tarfile.TarFile, file: Path, where: str, sample: _Sample) -> tuple[Stored, dict[str, Any]] | None:
    """(picture, row), or None for a `.json` that belongs to nothing."""
    if not sample.pictures and sample.unread is not None:
        raise PocketfusionError(f"{where} has a picture of a type that is not read ({sample.unread}): make it a PNG")
    extra: Any = {}
    if ".json" in sample.texts:
        extra = parse_json(_text(tar, sample.texts[".json"], where), f"{where} (.json)")
    if not sample.pictures and ".txt" not in sample.texts and not {"text", "caption"} & {*_names(extra)}:
        return None
    if len(sample.pictures) != 1:
        has = f"{len(sample.pictures)} pictures" if sample.pictures else "a caption without a picture"
        raise PocketfusionError(f"{where} has {has}: give it one (.png, .jpg, .webp …)")
    if ".txt" in sample.texts:
        row = parse_row(extra, where, captions(_text(tar, sample.texts[".txt"], where), where)[0])
    elif ".json" in sample.texts:
        row = parse_row(extra, where)
    else:
        raise PocketfusionError(f"{where} has no caption (.txt, or .json with 'caption')")
    picture = sample.pictures[0]
    return Stored(file, where, picture.offset_data, picture.size), row


def _names(values: Any) -> list[str]:
    return list(values) if isinstance(values, dict) else []


def _text(tar: tarfile.TarFile, member: tarfile.TarInfo, where: str) -> str:
    return plain_text(_bytes(tar, member, where, MAX_CAPTION), f"{where} ({PurePosixPath(member.name).suffix})")


def _bytes(tar: tarfile.TarFile, member: tarfile.TarInfo, where: str, limit: int) -> bytes:
    if not 0 <= member.size <= limit:
        raise PocketfusionError(f"{where} is too large ({limit >> 20} MiB is the most that is read of {member.name})")
    try:
        stream = tar.extractfile(member)
        data = stream.read() if stream is not None else b""
    except Exception as error:
        raise PocketfusionError(f"{where} is damaged ({_reason(error)}): build the shard again") from None
    if len(data) != member.size:
        raise PocketfusionError(f"{where} is cut short: build the shard again")
    return data
