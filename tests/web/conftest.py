"""What the browser's tests compare with: numbers and pictures that Python computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def vectors(once: Callable, packages: Path) -> Path:
    """A folder with what Python computes of what the engine computes too."""
    from vectors import write

    return once("vectors", write)


@pytest.fixture(scope="session")
def drawn(once: Callable, forms: dict[str, Path], packages: Path) -> Path:
    """A folder of small bundles, and the pictures that Python draws with them and with the embedded one."""
    from drawn import make

    return once("drawn", lambda folder: make(folder, forms))
