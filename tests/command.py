"""`pocketfusion ARGS` in a process of its own, forked from one that has imported the large libraries.

Importing torch, diffusers and transformers takes 8 s a process; the commands are the same without it.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

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


def run_command(arguments: list[str], timeout: float, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs it in this directory with this environment and more; raises `subprocess.TimeoutExpired`."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        state = (os.getcwd(), {**os.environ, **environment}, str(out), str(err))
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


def _child(arguments: list[str], directory: str, environment: dict[str, str], out: str, err: str) -> None:
    for stream, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), stream)
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["pocketfusion", *arguments]
    # as a fresh interpreter would have them: the fork server's were made before the files above were
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    from pocketfusion.cli import main

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
