"""`pocketfusion ARGS` in a process of its own, forked from one that has imported the large libraries.

Importing torch, diffusers and transformers takes 8 s a process; the commands are the same without it.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")
# by their full names: the fork server does not see the tests' own folder
_context.set_forkserver_preload(
    [
        "peft",
        "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
        "transformers.models.bert.modeling_bert",
        "accelerate",
    ]
)


def run_command(
    arguments: list[str], timeout: float, environment: dict[str, str], die: tuple[str, int] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs it in this directory with this environment and more; raises `subprocess.TimeoutExpired`.

    `die`: a function, as MODULE:NAME, and the number of its call at whose end the process kills itself.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        state = (os.getcwd(), {**os.environ, **environment}, str(out), str(err), die)
        process = _context.Process(target=_child, args=(arguments, *state))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(arguments, timeout, out.read_bytes(), err.read_bytes())
        code = process.exitcode
        assert code is not None
        return subprocess.CompletedProcess(arguments, code, out.read_text(), err.read_text())


def leftovers(folder: Path) -> list[str]:
    """Temporaries of killed runs below `folder`."""
    return sorted(str(path) for path in folder.rglob(".*.partial*"))


def _die_at(place: str, number: int) -> None:
    """Kills this process at the end of the `number`-th call of a function."""
    module, _, name = place.partition(":")
    *owners, last = name.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    plain, calls = getattr(owner, last), itertools.count(1)

    def deadly(*given: Any, **named: Any) -> Any:
        result = plain(*given, **named)
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, last, deadly)


def _child(
    arguments: list[str],
    directory: str,
    environment: dict[str, str],
    out: str,
    err: str,
    die: tuple[str, int] | None,
) -> None:
    for stream, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), stream)
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["pocketfusion", *arguments]
    # as a fresh interpreter would have them: the fork server's were made before the files above were
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    from pocketfusion.cli import main

    if die is not None:
        _die_at(*die)
    code: object = 0
    try:
        main()
    except SystemExit as end:
        code = end.code
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    atexit._run_exitfuncs()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)
