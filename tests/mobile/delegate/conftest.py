"""Vulkan drivers, if there are any, and paths of small models."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from pocketfusion.mobile.delegate.stack import GpuStack, choose, find_stacks


@pytest.fixture(scope="session")
def fp32_stack() -> GpuStack:
    stack = choose(find_stacks()[::-1], "fp32")  # SwiftShader before lavapipe, which compiles for seconds
    if stack is None:
        pytest.skip("no Vulkan driver")
    return stack


@pytest.fixture(scope="session")
def fp16_stack() -> GpuStack:
    stack = choose(find_stacks(), "fp16")
    if stack is None:
        pytest.skip("no Vulkan driver with fp16")
    return stack
