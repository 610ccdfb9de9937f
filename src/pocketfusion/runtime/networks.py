"""One network of a bundle, loaded from its file and ready to run; and its packed weights, kept from start to start.

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
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Literal, TypeVar, get_args

import ai_edge_litert

from pocketfusion.errors import PocketfusionError
from pocketfusion.quiet import quiet
from pocketfusion.runtime import manifest
from pocketfusion.runtime.engines import (
    Array,
    Compiled,
    Engine,
    Interpreted,
    cpu_options,
    gpu_options,
)
from pocketfusion.runtime.memory import release
from pocketfusion.runtime.runtimes import RuntimeName, load_engine
from pocketfusion.runtime.trust.litert_file import verify
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


Accelerator = Literal["cpu", "gpu"]
ACCELERATORS: tuple[str, ...] = get_args(Accelerator)
MAX_THREADS = 1024


def available_cores() -> int:
    """CPU cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MAX_THREADS)


def check_threads(threads: int) -> int:
    """`threads`, if LiteRT can have so many; raises PocketfusionError."""
    if not 1 <= threads <= MAX_THREADS:
        raise PocketfusionError(f"the number of threads is {threads}: choose 1 to {MAX_THREADS}")
    return threads


class Network:
    """A network's file, loaded: its constructor packs the weights, so that calls cost run time only.

    `write` fills inputs, which keep their values from run to run; `run` computes; `read` copies the output. Calling
    the network does all three.
    """

    def __init__(
        self,
        path: Path,
        spec: manifest.Network,
        num_threads: int,
        *,
        mapped: bool = False,
        kept: KeptWeights | None = None,
        sha256: str = "",
        accelerator: Accelerator = "cpu",
        runtime: RuntimeName = "litert",
    ) -> None:
        """With `mapped` (LiteRT on the CPU only), XNNPACK's packed weights go to a temporary file that is mapped into
        memory: pages that the system may drop, where the heap would hold them beside the pages of the network's file.
        With `kept` (the same) it is a file there, by the `sha256` of the network's, that the next start finds.

        Raises PocketfusionError if the file is not sound, computes other tensors than the manifest's or is refused by
        the runtime, the GPU does not take all of it (or there is none), or the disk is too full for that file.
        """
        self.path, self.spec, self.runtime = path, spec, runtime
        self.kept_in: Path | None = None  #: the folder of the packed weights that it computes with
        self._packed: IO[bytes] | None = None
        self._engine: Engine
        if runtime != "litert":
            try:
                with quiet():
                    self._engine = load_engine(runtime, path, spec, num_threads)
            except (ValueError, RuntimeError) as error:
                raise PocketfusionError(
                    f"{runtime} cannot load {path} ({_reason(error)}): export the bundle again"
                ) from None
            return
        signature = verify(path, spec)

        def with_packed(packed: Path) -> Compiled:
            return Compiled(path, spec, signature, cpu_options(num_threads, packed))

        with quiet():  # LiteRT's native log; its errors come as exceptions
            try:
                engine: Engine | None = None
                if accelerator == "gpu":
                    engine = Compiled(path, spec, signature, gpu_options(spec))
                elif kept is not None:
                    engine = kept.load(sha256, packed_size(spec), with_packed)
                    self.kept_in = kept.folder if engine else None
                if engine is None and mapped:
                    # held until the network is closed: the mapping is of this file, which has no name in any folder
                    self._packed = _temporary_file(spec)
                if engine is None and self._packed is not None:
                    engine = with_packed(Path(f"/proc/self/fd/{self._packed.fileno()}"))
                self._engine = engine or Interpreted(path, spec, signature, num_threads)
            except (ValueError, RuntimeError) as error:
                raise _refused(path, accelerator, error) from None

    def write(self, **inputs: Array) -> None:
        """Copies `inputs`, given by the manifest's names and of its shapes and types."""
        with self._told():
            for name, values in inputs.items():
                self._engine.write(name, values)

    def run(self) -> None:
        """Computes the output from what was written."""
        with self._told():
            self._engine.run()

    def read(self) -> Array:
        """A copy of the network's first output."""
        return self._engine.read()

    def feed_back(self, name: str) -> None:
        """Makes the last output the input `name` of the next run, if the engine can without a copy."""
        self._engine.feed_back(name)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Turns what LiteRT raises, such as for a token that the table lacks, into PocketfusionError."""
        try:
            yield
        except (ValueError, RuntimeError) as error:
            raise PocketfusionError(f"{self.path} cannot be run ({_reason(error)}): export the bundle again") from None

    def __call__(self, **inputs: Array) -> Array:
        """The network's first output for `inputs`, given by the manifest's names."""
        self.write(**inputs)
        self.run()
        return self.read()

    def close(self) -> None:
        """Frees everything and gives the memory back to the system; the network cannot be used any more."""
        self._engine.close()
        if self._packed is not None:
            self._packed.close()
        release()


def _refused(path: Path, accelerator: Accelerator, error: Exception) -> PocketfusionError:
    if accelerator == "cpu" or isinstance(error, ValueError):
        return PocketfusionError(f"LiteRT cannot load {path} ({_reason(error)}): export the bundle again")
    if "not accelerated" in str(error):
        return PocketfusionError(
            f"the GPU does not take every operation of {path}: export the bundle with --target litert-gpu, or run it "
            "on the CPU"
        )
    return PocketfusionError(
        f"{path} cannot be run on a GPU, as LiteRT finds none that it can use here: install a Vulkan driver, or run "
        "it on the CPU"
    )


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


def packed_size(spec: manifest.Network) -> int:
    """Bytes of the network's weights as XNNPACK packs them, about."""
    return spec.parameters * (1 if spec.weights in ("int8-dynamic", "int4-dynamic") else 4)


def _temporary_file(spec: manifest.Network) -> IO[bytes] | None:
    """A file without a name, which vanishes with the process however that ends; None where that has no path either.

    Raises PocketfusionError if the disk lacks the space for the packed weights: LiteRT would write until it is full.
    """
    if not Path("/proc/self/fd").is_dir():
        return None
    folder = tempfile.gettempdir()
    packed = packed_size(spec)
    if (free := shutil.disk_usage(folder).free) < packed:
        raise PocketfusionError(
            f"the packed weights need up to {packed / 1e6:,.0f} MB in {folder}, which has {free / 1e6:,.0f} MB free: "
            "set TMPDIR to a folder with more, or choose the mode resident"
        )
    return tempfile.TemporaryFile(prefix="pocketfusion-")
