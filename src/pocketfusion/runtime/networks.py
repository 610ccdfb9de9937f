"""One network of a bundle, loaded from its file and ready to run."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Literal, get_args

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
from pocketfusion.runtime.kept_weights import KeptWeights
from pocketfusion.runtime.memory import release
from pocketfusion.runtime.runtimes import RuntimeName, load_engine
from pocketfusion.runtime.trust.litert_file import verify

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
