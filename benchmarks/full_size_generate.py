"""One 512x512 picture at full size, end to end: the base's guided steps against a squeezed bundle's, on this machine.

Usage: python benchmarks/full_size_generate.py BASE SQUEEZED [--threads N] [--base-steps 2] [--mode pipelined]
           [--json FILE]

BASE and SQUEEZED are bundles, made from random weights by

    python benchmarks/full_size_folder.py sd-1.5 sd15
    pocketfusion export sd15 BASE --gate-steps 1
    python benchmarks/full_size_folder.py sd-1.5 evolved --unet snapfusion --decoder half
    pocketfusion export evolved SQUEEZED --gate-steps 1 --two-calls --decoder-tile 32 --weights int8-dynamic

Every row is a `pocketfusion generate` of its own, one after the other. The base draws `--base-steps` steps; its 50 are
text + 50 x step + decode, extrapolated from these. The squeezed one draws 8 guided steps (two UNet calls each), and 8
and 4 steps of one call each, as a UNet with distilled guidance has (here: guidance 1 of the same weights; latency does
not depend on weights). Totals are text + steps x median step + decode; loading, and the wall time with what pipelined
execution loads and frees on the way, stand beside them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pocketfusion.runtime.networks import available_cores
from pocketfusion.runtime.output import cpu_name


def draw(bundle: Path, steps: int, guidance: float, threads: int, mode: str, scratch: Path) -> dict[str, Any]:
    """The record that `generate --json` writes."""
    out = scratch / "record.json"
    command = [sys.executable, "-m", "pocketfusion", "generate", "a red apple", "--seed", "0", "--bundle", str(bundle)]
    command += ["--steps", str(steps), "--guidance", str(guidance), "--threads", str(threads), "--mode", mode]
    subprocess.run([*command, "-o", str(scratch / "p.png"), "--json", str(out)], check=True, stdout=subprocess.DEVNULL)
    record: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("squeezed", type=Path)
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--base-steps", type=int, default=2)
    parser.add_argument("--mode", default="pipelined")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        plans = {
            "base, 50 guided steps": (args.base, args.base_steps, 7.5, "resident"),
            "squeezed, 8 guided steps": (args.squeezed, 8, 7.5, args.mode),
            "squeezed, 8 steps of one call": (args.squeezed, 8, 1.0, args.mode),
            "squeezed, 4 steps of one call": (args.squeezed, 4, 1.0, args.mode),
        }
        for name, (bundle, steps, guidance, mode) in plans.items():
            record = draw(bundle, steps, guidance, args.threads, mode, Path(folder))
            times = record["seconds"]
            step, decode = times["step"]["median"], times["decode"]["median"]
            total = times["text"] + (50 if name.startswith("base") else steps) * step + decode
            rows[name] = {
                "total": total,
                "step": step,
                "text": times["text"],
                "decode": decode,
                "load": times["load"],
                "wall": times["total"],
                "peak_rss": record["peak_rss"],
                "mode": mode,
            }
            first = next(iter(rows.values()))["total"]
            print(
                f"{name:<32}{total:>9.1f} s  {first / total:>6.1f}x  step {step:.2f} s, text {times['text']:.2f} s, "
                f"decode {decode:.2f} s, load {times['load']:.1f} s, "
                f"wall {times['total']:.1f} s, peak {(record['peak_rss'] or 0) / 1e6:,.0f} MB ({mode})",
                flush=True,
            )
    print(f"{args.threads} threads, {cpu_name()}; the base's total is extrapolated from {args.base_steps} steps")
    if args.json:
        args.json.write_text(json.dumps({"cpu": cpu_name(), "threads": args.threads, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
