"""Keeps native log lines (absl, MLIR, XNNPACK) and libraries' Python warnings off the terminal."""

from __future__ import annotations

import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

_lock = threading.Lock()
_inside = 0
_restore = ExitStack()


@contextmanager
def quiet() -> Iterator[None]:
    """Sends file descriptor 2 to /dev/null, and warnings and log records below ERROR nowhere, while the block runs.

    Exceptions pass through untouched: what went wrong is in them, not in the log. Blocks may overlap in several
    threads: all of it belongs to the process, so the first one in changes it and the last one out restores it.
    """
    global _inside, _restore
    with _lock:
        _inside += 1
        if _inside == 1:
            _restore = _silence()
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _restore.close()


def _silence() -> ExitStack:
    restore = ExitStack()
    sys.stderr.flush()
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    restore.callback(logging.disable, logging.root.manager.disable)
    logging.disable(logging.WARNING)
    restore.callback(os.close, null)
    restore.callback(os.close, saved)
    restore.callback(os.dup2, saved, 2)
    restore.callback(sys.stderr.flush)
    os.dup2(null, 2)
    restore.enter_context(warnings.catch_warnings())
    warnings.simplefilter("ignore")
    return restore
