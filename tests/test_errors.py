"""Whatever the machine, the terminal or a native library fails with ends in one sentence and exit code 2."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from pocketfusion.artefact import atomic_folder
from pocketfusion.errors import PocketfusionError, told

COMMAND = [sys.executable, "-m", "pocketfusion"]


def run(*arguments: object, limit: int | None = None, **more: object) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, whose files may have `limit` bytes."""

    def small_files() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    more = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
    return subprocess.run([*COMMAND, *map(str, arguments)], text=True, timeout=120, preexec_fn=small_files, **more)  # type: ignore[call-overload]


def one_sentence(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: "), (done.returncode, done.stderr)
    for part in parts:
        assert part in lines[0], lines[0]


class PanicException(BaseException):
    """As Rust's libraries raise it."""


class SafetensorError(Exception):
    pass


DEEP = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (PocketfusionError("it is wrong: mend it"), "it is wrong: mend it"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "no space left on device: free some space and run again"),
        (
            OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), "a/b"),
            "a/b: file name too long: choose a shorter name",
        ),
        (FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), b"a"), "a: no such file or directory: it is gone"),
        (OSError("cannot identify it\nat all"), "cannot identify it: check the path and the disk"),
        (OSError(), "oSError: check"),
        (DEEP, "no space left on device: free some space"),
        (MemoryError(), "the memory is not enough: free some, or ask for less"),
        (MemoryError("Unable to allocate 8 EiB"), r"the memory is not enough \(Unable to allocate 8 EiB\): free"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "the memory is not enough"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), "the memory is not enough"),
        (RecursionError("maximum recursion depth exceeded"), "the input is nested too deeply"),
        (UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates not allowed"), "a text cannot be read or written"),
        (
            PanicException("called `unwrap()`\non a None"),
            r"a native library gave up on the input \(called `unwrap\(\)`\)",
        ),
    ],
)
def test_sentences(error: BaseException, sentence: str) -> None:
    said = told(error)
    assert said is not None and "\n" not in said and re.match(sentence, said), said


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("x"), RuntimeError("x"), SystemExit(1)])
def test_a_fault_of_the_program_has_no_sentence(error: BaseException) -> None:
    assert told(error) is None


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (PanicException("index out of bounds"), 2, "error: a native library gave up"),
        (MemoryError(), 2, "error: the memory is not enough"),
        (OSError(errno.EIO, "Input/output error", "/a\x1b[31mb"), 2, "error: "),
        (EOFError("No data left in file"), 2, "error: a file ends too early (No data left in file): "),
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, ""),
    ],
)
def test_every_command_ends_so(error, code, said, monkeypatch, capsys) -> None:
    from pocketfusion import cli

    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(cli.Commands, "get_command", fail)
    monkeypatch.setattr(sys, "argv", ["pocketfusion", "info"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    printed = capsys.readouterr().err
    assert caught.value.code == code and printed.startswith(said) and len(printed.splitlines()) <= 1


def test_a_fault_of_the_program_is_not_hidden(monkeypatch) -> None:
    from pocketfusion import cli

    monkeypatch.setattr("sys.argv", ["pocketfusion", "info"])
    monkeypatch.setattr(cli.Commands, "get_command", lambda *arguments: {}["bug"])
    with pytest.raises(KeyError):
        cli.main()


def test_no_file_can_be_as_large_as_it_must(tmp_path: Path) -> None:
    """As on a full disk: the file system refuses a write in the middle."""
    out = tmp_path / "a.png"
    one_sentence(run("generate", "x", "-o", out, "--steps", 1, limit=4000), "ile too large: ")
    assert not list(tmp_path.iterdir())


def save_tensors(folder: Path) -> None:
    save_file({"a": torch.zeros(10_000)}, folder / "a.safetensors")


def save_tokenizer(folder: Path) -> None:
    Tokenizer(WordLevel({str(i): i for i in range(10_000)}, "0")).save(str(folder / "tokenizer.json"))


def copy_tree(folder: Path) -> None:
    shutil.copytree(Path(__file__).parent, folder / "copy", ignore=shutil.ignore_patterns("__pycache__"))


@pytest.mark.parametrize("write", [save_tensors, save_tokenizer, copy_tree])
def test_native_writers_on_a_full_disk(write: Callable[[Path], None], tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(Exception) as caught, atomic_folder(tmp_path / "out") as partial:
            write(partial)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = told(caught.value)
    assert said is not None and "ile too large: the file system or a limit" in said, (said, caught.value)
    assert not list(tmp_path.iterdir())


def test_output_nowhere(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        one_sentence(run("info", stdout=full), "no space left on device: free some space")
        assert run("info", stdout=full, stderr=full).returncode == 2
    closed = subprocess.run(
        f"{sys.executable} -m pocketfusion generate x -o {tmp_path / 'a.png'} --steps 1 >&- 2>&-", shell=True
    )
    assert closed.returncode == 0 and (tmp_path / "a.png").is_file()


def test_a_reader_that_has_seen_enough() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = run("info", stdout=writer)
    os.close(writer)
    assert done.returncode == 1 and done.stderr == ""


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_what_the_terminal_cannot_show(encoding: str, tmp_path: Path) -> None:
    """Names and prompts in any script come through any encoding."""
    name = tmp_path / "Dalí 猫.png"
    prompt = "かわいい 猫, Dalí, 🍎 «q» [red]x[/red]"
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0", "LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        [*COMMAND, "generate", prompt, "-o", str(name), "--steps", "1", "--json", str(tmp_path / "r.json")],
        env=environment,
        capture_output=True,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    shown = done.stdout.decode(encoding)
    assert "64×64" in shown if encoding != "ascii" else "64\\xd764" in shown
    from PIL import Image

    assert Image.open(name).text["prompt"] == prompt  # type: ignore[attr-defined]


def test_a_prompt_that_is_no_text(tmp_path: Path) -> None:
    done = subprocess.run(
        [*(part.encode() for part in COMMAND), b"generate", b"a \xff", b"-o", os.fsencode(tmp_path / "a.png")],
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 2) and "Traceback" not in done.stderr
    assert done.returncode == 0 or not list(tmp_path.iterdir())
