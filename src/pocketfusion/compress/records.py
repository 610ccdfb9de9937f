"""What OUT remembers of each stage: what its result was made from and holds, so that only what changed runs again.

OUT/compress.json      the recipe           OUT/NAME, OUT/NAME.run   a stage's result and its run folder
OUT/_stages/NAME.json  a stage's record     OUT/_earlier/NAME-KEY    a result that other settings made
OUT/_stages/doing      what the stage at work does just now, as JSON
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from pocketfusion.artefact import sha256_file, write_json
from pocketfusion.bounded import read_yaml
from pocketfusion.data.latents.reading import is_cache, open_cache
from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import PROVENANCE

#: Says how, when, where and from what a result was made: two that are otherwise equal are the same.
_NOT_CONTENT = {"bundle.json": ("provenance",), "weights.yaml": ("model",), "config.json": ("_name_or_path",)}
_BEGUN, FINISHED = "begun", "finished"


class Record(BaseModel):
    """One stage: `key` is what its result depends on, `sha256` what it holds, `seen` when that was last looked at."""

    model_config = ConfigDict(extra="forbid")

    key: dict[str, Any]
    made_of: dict[str, str] = {}  #: stage → `made` of its record, when this one began
    made: str = ""  #: names this making of it
    state: Literal["begun", "finished"] = "begun"
    sha256: str = ""
    seen: str = ""
    seconds: float = 0.0
    samples: int = 0
    scores: dict[str, float] = {}
    gate: str = ""
    gate_met: bool | None = None


def new_making() -> str:
    """Names one making of a result among all."""
    return f"{time.time_ns():x}-{os.getpid()}"


def content_hash(path: Path) -> str:
    """SHA-256 of what a result holds: its files but provenance, cards and pictures, so that times do not count."""
    if path.is_file():
        return sha256_file(path)
    if is_cache(path):
        return open_cache(path).key
    digest = sha256()
    for file in _files(path):
        name = file.relative_to(path).as_posix()
        digest.update(f"{name}\0{_file_hash(file)}\n".encode())
    return digest.hexdigest()


def _file_hash(file: Path) -> str:
    if file.name not in _NOT_CONTENT:
        return sha256_file(file)
    try:
        values = read_yaml(file)  # JSON is YAML
        kept = {key: value for key, value in dict(values).items() if key not in _NOT_CONTENT[file.name]}
        return sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
    except (ValueError, TypeError):  # a given result's file may hold anything
        return sha256_file(file)


def _files(path: Path) -> list[Path]:
    files = [file for file in path.rglob("*") if file.is_file() and file.suffix != ".png"]
    return sorted(file for file in files if file.name not in (PROVENANCE, "README.md"))


def _glance(path: Path) -> str:
    """Names, sizes and times of a result's files: unchanged, its content is."""
    files = [path] if path.is_file() else _files(path)
    seen = [(str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return sha256(json.dumps(seen).encode()).hexdigest()


class Records:
    """The records of an OUT folder; `frozen` for who only looks."""

    def __init__(self, out: Path, *, frozen: bool = False):
        self.out, self.frozen = out, frozen

    def place(self, name: str) -> Path:
        """Where a stage's result is."""
        return self.out / name

    def get(self, name: str) -> Record | None:
        """The stage's record; None if it never began. Raises PocketfusionError if the record is damaged."""
        file = self.out / "_stages" / f"{name}.json"
        try:
            return Record.model_validate_json(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValidationError, ValueError):
            raise PocketfusionError(f"{file} is damaged: delete it to make the stage {name} again") from None

    def put(self, name: str, record: Record) -> None:
        """Keeps the stage's record."""
        if self.frozen:
            return
        (self.out / "_stages").mkdir(exist_ok=True)
        write_json(self.out / "_stages" / f"{name}.json", record.model_dump())

    def tell(self, name: str, since: float, what: str = "", done: int = 0, total: int = 0) -> None:
        """Says what a stage is doing, and since when (seconds of the epoch), to who asks from elsewhere."""
        doing = {"stage": name, "since": since, "what": what, "done": done, "total": total}
        with suppress(OSError):  # of a full disk the work itself will tell
            (self.out / "_stages" / "doing").write_text(json.dumps(doing), encoding="utf-8")

    def told(self, name: str) -> dict[str, Any]:
        """What `tell` said last of the stage; empty if it was another or is being written."""
        try:
            doing = json.loads((self.out / "_stages" / "doing").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return doing if doing.get("stage") == name else {}

    def begin(self, name: str, key: dict[str, Any], made_of: Mapping[str, str]) -> Record:
        """The record to work under: what was begun or finished under `key`, brought back if other settings came
        between, else a new one; what other settings made is put aside."""
        record = self.get(name)
        if record is not None and record.key != key:
            self.put_aside(name, record.key)
            record = None
        if record is None or self._shelf(name, key).is_dir():
            self._move(name, key, aside=False)
            record = self.get(name)
        if record is not None and record.state == _BEGUN and record.made_of != made_of:
            self.clear(name)  # its run has seen other makings of its inputs
            record = None
        if record is None:
            self.clear(name)
            record = Record(key=key, made_of=dict(made_of), made=new_making())
            self.put(name, record)
        return record

    def put_aside(self, name: str, key: dict[str, Any]) -> None:
        """Keeps what other settings made, for when they come back."""
        self._move(name, key, aside=True)

    def clear(self, name: str) -> None:
        """Removes a stage's result and run folder."""
        for path in self._parts(name)[:2]:
            shutil.rmtree(path, ignore_errors=True)

    def finished(self, name: str, record: Record) -> bool:
        """Whether the stage's result is there and holds what its record says.

        Raises PocketfusionError if it was altered since it was made.
        """
        place = self.place(name)
        if record.state != FINISHED or not place.exists():
            return False
        glance = _glance(place)
        if glance == record.seen:
            return True
        if content_hash(place) != record.sha256:
            raise PocketfusionError(
                f"{place} was altered since it was made: restore it, or delete it to make it again"
            )
        record.seen = glance
        self.put(name, record)
        return True

    def finish(self, name: str, record: Record) -> None:
        """Marks the stage finished with what its result holds now."""
        place = self.place(name)
        record.state, record.sha256, record.seen = "finished", content_hash(place), _glance(place)
        self.put(name, record)

    def _parts(self, name: str) -> tuple[Path, Path, Path]:
        return self.out / name, self.out / f"{name}.run", self.out / "_stages" / f"{name}.json"

    def _shelf(self, name: str, key: dict[str, Any]) -> Path:
        return self.out / "_earlier" / f"{name}-{sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]}"

    def _move(self, name: str, key: dict[str, Any], *, aside: bool) -> None:
        """Puts the stage's parts aside or brings them back; the record goes last aside and first back, so that a kill
        in between is made good by the next call."""
        shelf = self._shelf(name, key)
        if aside:
            shelf.mkdir(parents=True, exist_ok=True)
        elif not shelf.is_dir():
            return
        pairs = [
            (part, shelf / label)
            for part, label in zip(self._parts(name), ("result", "run", "record.json"), strict=True)
        ]
        for here, there in pairs if aside else reversed(pairs):
            source, target = (here, there) if aside else (there, here)
            if source.exists():
                if target.is_dir():
                    shutil.rmtree(target)
                os.replace(source, target)
        if not aside:
            shelf.rmdir()


def given_hash(records: Records, name: str, path: Path) -> str:
    """The content of a result that is there already, read again only where its files have changed."""
    glance, record = _glance(path), records.get(name)
    if record is None or record.seen != glance or record.state != FINISHED:
        if record is not None and "given" not in record.key and not records.frozen:
            records.put_aside(name, record.key)
        record = Record(key={"given": str(path)}, state="finished", sha256=content_hash(path), seen=glance)
        record.made = record.sha256
        records.put(name, record)
    return record.sha256


@contextmanager
def sole(out: Path) -> Iterator[None]:
    """Holds the folder's lock; raises PocketfusionError if another process does.

    A POSIX lock: it ends with its process, however that ends, and children do not inherit it.
    """
    file = out / ".lock"
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        for attempt in range(5):  # whoever asks for the status holds it for a moment
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if attempt == 4:
                    holder = os.pread(descriptor, 20, 0).decode(errors="replace").strip() or "unknown"
                    raise PocketfusionError(
                        f"another compress is at work in {out} (process {holder}): see --status, wait for it or end it"
                    ) from None
                time.sleep(0.1)
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def at_work(out: Path) -> bool:
    """Whether a process holds the folder's lock."""
    try:
        descriptor = os.open(out / ".lock", os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except OSError:
        return True
    finally:
        os.close(descriptor)
