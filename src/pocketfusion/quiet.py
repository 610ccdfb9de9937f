"""Keeps native log lines (absl, MLIR, XNNPACK) and libraries' Python warnings off the terminal."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Sends file descriptor 2 to /dev/null, and warnings and log records below ERROR nowhere, while the block runs.

    Exceptions pass through untouched: what went wrong is in them, not in the log.
    """
    sys.stderr.flush()
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    os.dup2(null, 2)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.stderr.flush()
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)
        logging.disable(disabled)
