"""Measuring on a phone: the parts as `.tflite` files beside a script around LiteRT's `benchmark_model`, and back."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from pocketfusion.artefact import atomic_folder, write_json
from pocketfusion.errors import PocketfusionError
from pocketfusion.latency.benchmark_log import statistics
from pocketfusion.latency.profiling import (
    BARE,
    EMPTY,
    WHOLE,
    PartJobs,
    Progress,
    empty_job,
    network_entry,
    overhead_of,
    quiet_progress,
    whole_job,
)
from pocketfusion.latency.table import Entry, LatencyTable, Settings, Timing
from pocketfusion.latency.target import Target
from pocketfusion.latency.timing_backends import Backend, Job
from pocketfusion.latency.unet_parts import bare, base_shapes
from pocketfusion.models.elastic.architecture import Architecture

MANIFEST, SCRIPT, LOGS = "pack.json", "run.sh", "logs"

_SCRIPT = r"""#!/bin/sh
# Times every network of this pack on the phone that adb sees, with LiteRT's benchmark_model (android_arm64; see
# https://ai.google.dev/edge/litert/next/benchmark). Logs go to logs/, for `pocketfusion profile FOLDER --import`.
#
# Usage: ./run.sh BENCHMARK_MODEL [cpu|gpu] [THREADS] [RUNS]
set -eu
tool=${1:?usage: ./run.sh BENCHMARK_MODEL [cpu|gpu] [THREADS] [RUNS]}
backend=${2:-cpu}
threads=${3:-4}
runs=${4:-50}
case $backend in
    cpu) flags="--use_gpu=false" ;;
    gpu) flags="--use_gpu=true" ;;
    *) echo "the second argument is '$backend': choose cpu or gpu" >&2; exit 2 ;;
esac
digest=$(sha256sum "$tool" | cut -c 1-12)
here=$(cd "$(dirname "$0")" && pwd)
remote=/data/local/tmp/pocketfusion-profile
rm -rf "$here/logs"
mkdir "$here/logs"
adb shell "mkdir -p $remote" </dev/null
adb push "$tool" "$remote/benchmark_model" </dev/null >/dev/null
adb shell "chmod +x $remote/benchmark_model" </dev/null
{
    echo "device=$(adb shell 'echo $(getprop ro.product.manufacturer) $(getprop ro.product.model),' \
        '$(getprop ro.soc.model), Android $(getprop ro.build.version.release)' </dev/null)"
    echo "backend=benchmark_model $backend"
    echo "runtime=benchmark_model sha256 $digest"
    echo "threads=$threads"
} >"$here/logs/settings.txt"
for file in "$here"/*.tflite; do
    name=$(basename "$file")
    echo "$name"
    adb push "$file" "$remote/$name" </dev/null >/dev/null
    adb shell "$remote/benchmark_model --graph=$remote/$name --num_threads=$threads --num_runs=$runs --warmup_runs=3 \
        --report_peak_memory_footprint=true $flags" </dev/null >"$here/logs/$name.log" 2>&1 ||
        echo "$name failed: see logs/$name.log" >&2
    adb shell "rm $remote/$name" </dev/null
done
"""


class Pack(BaseModel):
    """`pack.json`: what the files are. Every network's files by batch size."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: str = "pocketfusion-latency-pack"
    version: int = 1
    base: dict
    text_length: int
    weights: str
    parts: dict[str, Entry]
    networks: dict[str, Entry]
    files: dict[str, dict[int, str]]


def write_pack(
    target: Target,
    backend: Backend,
    directory: Path,
    *,
    batches: Sequence[int],
    base_only: bool = False,
    overwrite: bool = False,
    progress: Progress = quiet_progress,
) -> int:
    """Writes the pack of `target` to `directory`; returns its number of `.tflite` files.

    Raises PocketfusionError if `directory` exists, unless `overwrite` is set and it holds a pack.
    """
    if directory.exists() and overwrite and not (directory / MANIFEST).is_file():
        raise PocketfusionError(f"{directory} exists and is not a pack: it is not replaced, choose another folder")
    jobs = PartJobs(target, base_only=base_only)
    others, modules = target.networks()
    todo: list[tuple[str, int, Job]] = [(EMPTY, 1, empty_job())]
    for batch in batches:
        todo += [(key, batch, jobs.job(key, batch)) for key in jobs.parts]
        for key, architecture in ((WHOLE, Architecture.stock(target.config)), (BARE, bare(target.config))):
            todo.append((key, batch, whole_job(target, architecture, batch)))
    todo += [(name, 1, job) for name, job in others.items()]
    with atomic_folder(directory, overwrite=overwrite) as partial:
        files: dict[str, dict[int, str]] = {}
        for number, (key, batch, job) in enumerate(todo):
            progress("packing", number, len(todo))
            name = f"{number:03d}-{re.sub('[^a-z_].*', '', key)}-batch{batch}.tflite"
            path = backend.prepare(job)
            if path is None:
                raise PocketfusionError("a pack is made of .tflite files: use --backend litert-cpu")
            shutil.copyfile(path, partial / name)
            files.setdefault(key, {})[batch] = name
        progress("packing", len(todo), len(todo))
        pack = Pack(
            base=base_shapes(target.config),
            text_length=target.text_length,
            weights=backend.settings.weights,
            parts={key: jobs.entry(key, {}) for key in jobs.parts},
            networks={name: network_entry(name, modules[name], job, {}) for name, job in others.items()},
            files=files,
        )
        write_json(partial / MANIFEST, pack.model_dump(mode="json"))
        (partial / SCRIPT).write_text(_SCRIPT, encoding="utf-8")
        (partial / SCRIPT).chmod(0o755)
    return len(todo)


def import_pack(directory: Path) -> LatencyTable:
    """The table that a pack's logs hold. Raises PocketfusionError naming the log that is missing or not understood."""
    try:
        pack = Pack.model_validate_json((directory / MANIFEST).read_text(encoding="utf-8"))
    except OSError:
        raise PocketfusionError(f"{directory} has no {MANIFEST}: write a pack there with --pack") from None
    except (ValidationError, json.JSONDecodeError, UnicodeDecodeError):
        raise PocketfusionError(f"{directory / MANIFEST} is damaged: write the pack again with --pack") from None
    settings = _read_settings(directory / LOGS / "settings.txt", pack.weights)
    times = {
        key: {batch: read_log(directory / LOGS / f"{name}.log") for batch, name in files.items()}
        for key, files in pack.files.items()
    }
    parts = {key: entry.model_copy(update={"ms": times[key]}) for key, entry in pack.parts.items()}
    overhead = {}
    for batch in times[WHOLE]:
        found = {EMPTY: times[EMPTY][1]} | {
            key: ms[batch] for key, ms in times.items() if batch in ms and key != EMPTY
        }
        overhead[batch] = overhead_of(pack.base, pack.text_length, found, interleaved=False)
    return LatencyTable(
        settings=settings,
        base=pack.base,
        text_length=pack.text_length,
        parts=parts,
        overhead=overhead,
        networks={name: entry.model_copy(update={"ms": times[name]}) for name, entry in pack.networks.items()},
    )


def _read_settings(path: Path, weights: str) -> Settings:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        raise PocketfusionError(f"{path} is missing: run the pack's {SCRIPT} on the phone first") from None
    found = dict(line.split("=", 1) for line in lines if "=" in line)
    try:
        return Settings(
            weights=weights,
            threads=int(found["threads"]),
            **{key: found[key].strip() for key in ("device", "backend", "runtime")},
        )
    except (KeyError, ValueError):
        raise PocketfusionError(f"{path} is not what {SCRIPT} writes: run the pack's {SCRIPT} again") from None


def read_log(path: Path) -> Timing:
    """The timed runs of one log; raises PocketfusionError as `statistics` does."""
    return Timing(**statistics(path))
