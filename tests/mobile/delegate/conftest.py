"""Vulkan drivers, if there are any, and paths of small models."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from pocketfusion.mobile.delegate.stack import GpuStack, choose, find_stacks


def without(what: str) -> NoReturn:
    """Skips the test; fails it where the drivers have to be there, as in CI."""
    (pytest.fail if os.environ.get("POCKETFUSION_TEST_DRIVERS") else pytest.skip)(what)


@pytest.fixture(scope="session")
def fp32_stack() -> GpuStack:
    stack = choose(find_stacks()[::-1], "fp32")  # SwiftShader before lavapipe, which compiles for seconds
    if stack is None:
        without("no Vulkan driver: apt-get install chromium libvulkan1")
    return stack


@pytest.fixture(scope="session")
def fp16_stack() -> GpuStack:
    stack = choose(find_stacks(), "fp16")
    if stack is None:
        without("no Vulkan driver with fp16: .ci/lavapipe FOLDER, then POCKETFUSION_LAVAPIPE=FOLDER")
    return stack
