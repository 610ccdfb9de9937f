"""A guided step (batch 2) of several model folders' UNets on LiteRT, timed in turns: evolved ones against their base.

Usage: python benchmarks/step_latency.py models/emoji/base models/emoji/evolved [FOLDER …] [--runs 200] [--threads N]
           [--cache DIR] [--json FILE]

Protocol: as the latency table's (pocketfusion.latency.profiling.rounds): twice `--runs` rounds, each of which runs
every network once; the calmer half counts, by the median with minimum and maximum. The ratio is to the first folder.
Shapes are the folders', weights random: latency does not depend on them.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from pocketfusion.artefact import write_json
from pocketfusion.runtime.networks import available_cores

BATCH = 2


def main() -> None:
    """Parses the command line, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--cache", type=Path, help="keep the exported networks here")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    from pocketfusion.cli.shared import quiet_libraries

    quiet_libraries()
    from pocketfusion.latency.profiling import time_jobs, whole_job
    from pocketfusion.latency.target import load_target
    from pocketfusion.latency.timing_backends import make_backend
    from pocketfusion.models.elastic_unet import load_elastic

    with tempfile.TemporaryDirectory() as scratch:
        cache = given.cache or Path(scratch)
        cache.mkdir(parents=True, exist_ok=True)
        backend = make_backend("litert-cpu", "float32", given.threads, cache)
        target = load_target(str(given.folders[0]))
        unets = {str(folder): load_elastic(folder) for folder in given.folders}
        jobs = {name: whole_job(target, unet.architecture, BATCH) for name, unet in unets.items()}
        times, _ = time_jobs(backend, jobs, given.runs, lambda stage, done, total: None, "")
    first = times[str(given.folders[0])].median
    print(f"{'folder':40} {'parameters':>11} {'ms (min to max)':>24} {'ratio':>6}")
    rows = {}
    for name, time in times.items():
        parameters = sum(p.numel() for p in unets[name].parameters())
        rows[name] = {"parameters": parameters, "ratio": time.median / first, **time.model_dump()}
        spread = f"{time.median:.2f} ({time.min:.2f} to {time.max:.2f})"
        print(f"{name:40} {parameters / 1e6:9.2f} M {spread:>24} {time.median / first:6.3f}")
    if given.json:
        write_json(given.json, {"settings": backend.settings.model_dump(), "batch": BATCH, "networks": rows})


if __name__ == "__main__":
    main()
