"""Finds the Vulkan drivers that the GPU delegate can run on here, and what arithmetic each has.

Tried in this order, each by running a tiny model in a child process, so that only what works is offered (Mesa 22's
lavapipe starts and fails): the driver named by POCKETFUSION_VULKAN_ICD (a JSON file); what the system's Vulkan loader
picks (a real GPU, or lavapipe of Mesa 25 or newer); the lavapipe in the folder POCKETFUSION_LAVAPIPE, as Debian's
package unpacks; and SwiftShader, which comes with Chromium and has FP32 only. One that a variable names must work:
another in its place would answer a question that nobody asked.
"""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from pocketfusion.errors import PocketfusionError
from pocketfusion.mobile.delegate.child import Answer, Child
from pocketfusion.mobile.delegate.submodel import one_operation
from pocketfusion.temporaries import scratch_folder

ICD_VARIABLE, LAVAPIPE_VARIABLE = "POCKETFUSION_VULKAN_ICD", "POCKETFUSION_LAVAPIPE"
#: By which the user names the driver of each stack: of the system's, Vulkan's own.
_NAMED_BY = {
    "named": (ICD_VARIABLE,),
    "lavapipe": (LAVAPIPE_VARIABLE,),
    "system": ("VK_ICD_FILENAMES", "VK_DRIVER_FILES"),
}
_LOADER = "libvulkan.so.1"  # finds the drivers; the delegate opens it by this name
_SWIFTSHADER = "vk_swiftshader_icd.json"
_BROWSERS = ("/usr/lib/chromium", "/usr/lib/chromium-browser", "/usr/lib64/chromium-browser", "/opt/google/chrome")
_ADVICE = (
    "install Debian's package chromium (its SwiftShader computes in FP32), or name a Vulkan driver with "
    f"{ICD_VARIABLE}=ICD.json or an unpacked Mesa 25 with {LAVAPIPE_VARIABLE}=FOLDER (FP16 too; docs/check.md)"
)
_scratch = ExitStack()  # until this process ends
atexit.register(_scratch.close)


@dataclass(frozen=True)
class GpuStack:
    """A driver that works: its name, the adapter it reports, what a process needs to use it, its precisions.

    `environment` is a tuple of pairs, so that a stack can be a key; `precisions` holds "fp32" and perhaps "fp16".
    """

    name: str
    adapter: str
    environment: tuple[tuple[str, str], ...]
    precisions: tuple[str, ...]


@cache
def find_stacks() -> tuple[GpuStack, ...]:
    """All drivers that work on this machine, the best first. Takes a second or two once per process.

    Raises PocketfusionError if one does not work that an environment variable names.
    """
    found = []
    for name, environment in _candidates():
        if isinstance(stack := _probe(name, environment), GpuStack):
            found.append(stack)
        elif by := next((variable for variable in _NAMED_BY.get(name, ()) if os.environ.get(variable)), None):
            raise PocketfusionError(
                f"the Vulkan driver that {by} names ({os.environ[by]}) does not work here ({stack}): "
                f"{_loader_advice() or f'mend it, or unset {by} to ask another driver'}"
            )
    return tuple(found)


def advice() -> str:
    """How to get a driver, for messages."""
    return f"{loader}; then {_ADVICE}" if (loader := _loader_advice()) else _ADVICE


def _loader_advice() -> str:
    """What to install if the library is missing without which no driver is found; empty if it is there."""
    try:
        ctypes.CDLL(_LOADER)
    except OSError:
        return f"{_LOADER} is missing, so install Debian's package libvulkan1"
    return ""


def choose(stacks: tuple[GpuStack, ...], precision: str, name: str | None = None) -> GpuStack | None:
    """The first stack (of that name) that has `precision`; None if there is none.

    Raises PocketfusionError if no stack is called `name`.
    """
    if name is not None and name not in {stack.name for stack in stacks}:
        known = ", ".join(stack.name for stack in stacks) or "none"
        raise PocketfusionError(f"there is no GPU stack {name!r} here (found: {known}): {advice()}")
    return next((s for s in stacks if precision in s.precisions and name in (None, s.name)), None)


def _candidates() -> Iterator[tuple[str, dict[str, str]]]:
    if named := os.environ.get(ICD_VARIABLE):
        if not Path(named).is_file():
            raise PocketfusionError(f"{ICD_VARIABLE} is {named!r}, where there is no file: name a driver's ICD JSON")
        yield "named", {"VK_ICD_FILENAMES": named}
    yield "system", {}
    if folder := os.environ.get(LAVAPIPE_VARIABLE):
        library = next(iter(sorted(Path(folder).rglob("libvulkan_lvp.so"))), None)
        if library is None:
            raise PocketfusionError(
                f"{LAVAPIPE_VARIABLE} is {folder!r}, which holds no libvulkan_lvp.so: unpack mesa-vulkan-drivers there"
            )
        yield (
            "lavapipe",
            {"VK_ICD_FILENAMES": _icd(library.resolve()), "LD_LIBRARY_PATH": str(library.resolve().parent)},
        )
    playwright = Path.home().glob(".cache/ms-playwright/chromium*/*")
    for place in (*map(Path, _BROWSERS), *sorted(playwright)):
        if (place / _SWIFTSHADER).is_file():
            yield "swiftshader", {"VK_ICD_FILENAMES": str(place / _SWIFTSHADER)}
            return


def _icd(library: Path) -> str:
    """A file that tells the Vulkan loader of `library`; the packaged one names the place it was not installed at."""
    file = _scratch.enter_context(scratch_folder("pocketfusion-vulkan")) / "lavapipe.json"
    file.write_text(
        json.dumps({"file_format_version": "1.0.0", "ICD": {"api_version": "1.3.0", "library_path": str(library)}})
    )
    return str(file)


def _reason(answer: Answer) -> str:
    """Why a driver failed: what Dawn warned of, else the error."""
    warned = re.search(r"^Warning: (.+?)[.!]?$", answer.log, re.M)
    return warned.group(1) if warned else (answer.error.strip().splitlines() or ["no answer"])[0][:200]


def _probe(name: str, environment: dict[str, str]) -> GpuStack | str:
    """Runs exp on this driver; the reason if that fails. FP16 is there if it changes the result."""
    x = np.linspace(0.1, 1, 32, dtype=np.float32).reshape(1, 1, 1, 32)
    with scratch_folder("pocketfusion-vulkan") as folder, Child(environment, folder) as child:
        file = folder / "probe.tflite"
        one_operation("EXP", x.shape, file)
        results = {}
        for precision in ("fp32", "fp16"):
            answer = child.ask(file, {"x": x}, precision=precision, timeout=60)
            if answer.outputs is None:
                return _reason(answer)
            results[precision] = answer.outputs["y"]
            adapter = re.search(r"Selected adapter: (.+?), arch=", answer.log)
        if not np.allclose(results["fp32"], np.exp(x), rtol=1e-4):
            return "it computes exp wrongly"
    fp16 = not np.array_equal(results["fp32"], results["fp16"]) and np.allclose(results["fp16"], np.exp(x), rtol=1e-2)
    return GpuStack(
        name,
        adapter.group(1).strip() if adapter else "unknown",
        tuple(sorted(environment.items())),
        ("fp32", "fp16") if fp16 else ("fp32",),
    )
