"""Packed weights that stay on disk from start to start: a network that has been loaded once is mapped, not packed.

XNNPACK packs every weight when a network is loaded, which takes seconds at full size, and maps the result where it is
in a file (`engines.cpu_options`). Such a file is right for one network, one build of LiteRT and one kind of processor,
so its name is made of all three; and of its size, as a mapped file that was cut short ends the process. Nothing is
ever read that this user did not write.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import ai_edge_litert

from pocketfusion.temporaries import clean, temporary

Loaded = TypeVar("Loaded")
#: What of a processor's description XNNPACK chooses its kernels, and so its layouts, by.
_CPU = ("model name", "flags", "Features", "CPU implementer", "CPU architecture", "CPU variant", "CPU part")


class KeptWeights:
    """The packed weights in `folder`, which is made if it is missing. What cannot be written there is not kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.expanduser().absolute()

    def load(self, sha256: str, size: int, load: Callable[[Path], Loaded]) -> Loaded | None:
        """What `load` makes with the packed weights of the network file with this hash in the file that it is given:
        those of an earlier start, or an empty one, which is kept. None where the folder cannot be used, or lacks room
        for `size` bytes."""
        name = f"{sha256[:32]}-{self._machine()}"
        with suppress(OSError):
            for file in self.folder.glob(f"{name}.*.packed"):
                found = file.stat()
                if found.st_size == int(file.name.split(".")[1]) and found.st_uid == os.geteuid():
                    return load(file)
                file.unlink()
            self.folder.mkdir(0o700, parents=True, exist_ok=True)
            clean(self.folder)
            if shutil.disk_usage(self.folder).free < size:
                return None
            with temporary(self.folder / name, folder=False, mode=0o600) as file:
                loaded = load(file)
                with suppress(OSError):
                    for other in self.folder.glob(f"{sha256[:32]}-*.packed"):  # of another build or processor
                        other.unlink()
                    file.rename(self.folder / f"{name}.{file.stat().st_size}.packed")
                return loaded
        return None

    @staticmethod
    def _machine() -> str:
        """A hash of LiteRT's build and of the processor's kind."""
        library = Path(ai_edge_litert.__file__).parent / "libLiteRt.so"
        build = library.stat() if library.exists() else Path(ai_edge_litert.__file__).stat()
        said = [platform.machine(), platform.processor(), str(build.st_size), str(build.st_mtime_ns)]
        info = Path("/proc/cpuinfo")
        if info.exists():
            first = info.read_text(errors="replace").partition("\n\n")[0]
            said += [line for line in first.splitlines() if line.partition(":")[0].strip() in _CPU]
        return hashlib.sha256("\n".join(said).encode()).hexdigest()[:16]
