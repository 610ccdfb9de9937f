"""Bundles on the GPU delegate: the CPU's picture where it takes the graph, one sentence where it does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SWIFTSHADER = Path("/usr/lib/chromium/vk_swiftshader_icd.json")  # Debian's chromium: Vulkan in software, fp32

CHILD = """
import json, sys
import numpy as np
from pocketfusion.errors import PocketfusionError
from pocketfusion.runtime.pipeline import Pipeline
path, = sys.argv[1:]
settings = {"seed": 1, "num_inference_steps": 3}
try:
    gpu = Pipeline.load(path, 1, accelerator="gpu", mode="sequential").generate("a red apple", **settings)
except PocketfusionError as error:
    print(json.dumps(str(error)))
else:
    cpu = Pipeline.load(path, 1).generate("a red apple", **settings)
    print(json.dumps(int(np.abs(np.asarray(gpu.images[0], int) - np.asarray(cpu.images[0], int)).max())))
"""


def on_gpu(path: Path, driver: Path | str):
    """The largest difference in a pixel to the CPU's picture, or the error, in a process that has only `driver`."""
    environment = {**os.environ, "VK_ICD_FILENAMES": str(driver), "VK_DRIVER_FILES": str(driver)}
    command = [sys.executable, "-c", CHILD, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])  # the delegate's compiler prints as well


def needs_driver() -> None:
    if not SWIFTSHADER.is_file():
        told = "no Vulkan driver: apt-get install chromium libvulkan1"
        (pytest.fail if os.environ.get("POCKETFUSION_TEST_DRIVERS") else pytest.skip)(told)


def test_the_gpu_draws_the_cpus_picture(tiny_bundle, tmp_path):
    needs_driver()
    from small_unet import make_folded

    assert on_gpu(make_folded(tiny_bundle, tmp_path / "folded"), SWIFTSHADER) <= 1


def test_a_graph_that_the_gpu_does_not_take(tiny_bundle):
    needs_driver()
    told = on_gpu(tiny_bundle, SWIFTSHADER)
    assert (
        "the GPU does not take every operation of" in told and "unet.tflite: export the bundle with --target" in told
    )


def test_no_gpu(tiny_bundle):
    told = on_gpu(tiny_bundle, "/nonexistent.json")
    assert "cannot be run on a GPU" in told and "install a Vulkan driver, or run it on the CPU" in told
