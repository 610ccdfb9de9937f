"""The embedded bundle, loaded once."""

from __future__ import annotations

import pytest

from pocketfusion.runtime.pipeline import Pipeline


@pytest.fixture(scope="module")
def embedded() -> Pipeline:
    """On one thread, as ports are compared."""
    return Pipeline.load(num_threads=1)
