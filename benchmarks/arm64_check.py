"""The embedded bundle drawn by emulated aarch64 Python and LiteRT, compared with this machine's picture.

Usage: python benchmarks/arm64_check.py WORK [--bundle DIR] [--prompt TEXT] [--steps N] [--draw PROGRAM] [--json FILE]

Puts Debian's arm64 Python and the runtime's aarch64 wheels into WORK/arm64 (a folder: nothing is installed), runs the
very same `pocketfusion generate` there under qemu-user and compares the pictures. qemu is taken from
bookworm-backports (10.0): bookworm's own 7.2 dies in LiteRT's constructor. Needs Debian with apt, the registry,
about 400 MB, and minutes: emulation is many times slower than the machine.

With --draw, an aarch64 build of the C++ example draws the same there, and is compared with the emulated Python:

    pip install ziglang && python -m ziglang c++ -target aarch64-linux-gnu.2.31 -std=c++17 -O2 -ffp-contract=off \\
        src/pocketfusion/port/cpp/*.cpp WORK/site/ai_edge_litert/libLiteRt.so -o draw
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

SUITE = "bookworm"
PACKAGES = [
    "libc6",
    "libgcc-s1",
    "libstdc++6",
    "zlib1g",
    "libbz2-1.0",
    "liblzma5",
    "libexpat1",
    "libffi8",
    "libssl3",
    "libuuid1",
    "libncursesw6",
    "libtinfo6",
    "libreadline8",
    "libsqlite3-0",
    "libdb5.3",
    "libnsl2",
    "libtirpc3",
    "libgssapi-krb5-2",
    "libkrb5-3",
    "libk5crypto3",
    "libcom-err2",
    "libkrb5support0",
    "libkeyutils1",
    "libcrypt1",
    "python3.11-minimal",
    "libpython3.11-minimal",
    "libpython3.11-stdlib",
    "python3.11",
]
LIBRARIES = "usr/lib/aarch64-linux-gnu"
RUNTIME = ["ai-edge-litert", "numpy", "pillow", "pydantic", "rich", "tokenizers", "typer"]


def debian(root: Path, cache: Path, suite: str, architecture: str, packages: list[str]) -> None:
    """Unpacks Debian's packages into `root`, with apt folders of their own."""
    for name in ("lists/partial", "archives/partial"):
        (cache / name).mkdir(parents=True, exist_ok=True)
    (cache / "status").touch()
    (cache / "sources.list").write_text(f"deb [arch={architecture}] http://deb.debian.org/debian {suite} main\n")
    options = {
        "APT::Architecture": architecture,
        "APT::Architectures": architecture,
        "Dir::Etc::sourcelist": cache / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "Dir::State::lists": cache / "lists",
        "Dir::State::status": cache / "status",
        "Dir::Cache": cache,
    }
    apt = ["apt-get", "-qq", *(part for key, value in options.items() for part in ("-o", f"{key}={value}"))]
    subprocess.run([*apt, "update"], check=True)
    subprocess.run([*apt, "download", *packages], check=True, cwd=cache)
    root.mkdir(parents=True, exist_ok=True)
    for package in cache.glob("*.deb"):
        subprocess.run(["dpkg", "-x", package.name, root.absolute()], check=True, cwd=cache)


def wheels(site: Path, project: Path) -> None:
    """The runtime's dependencies for aarch64 and this project's own code."""
    platforms = [f"manylinux_2_{minor}_aarch64" for minor in (34, 31, 28, 27, 24, 17)] + ["manylinux2014_aarch64"]
    asked = [part for platform in platforms for part in ("--platform", platform)]
    pinned = [f"{name}=={_version(name)}" for name in RUNTIME]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(site), "--only-binary=:all:"]
    subprocess.run([*command, "--python-version", "3.11", "--implementation", "cp", *asked, *pinned], check=True)
    shutil.copytree(project / "src" / "pocketfusion", site / "pocketfusion", dirs_exist_ok=True)


def _version(name: str) -> str:
    from importlib.metadata import version

    return version(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--prompt", default="a red apple, noto style")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--draw", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    import pocketfusion
    from pocketfusion.runtime.manifest import Bundle, embedded_bundle

    bundle = (args.bundle or embedded_bundle()).absolute()
    root, site = args.work / "arm64", args.work / "site"
    if not (root / "usr" / "bin" / "python3.11").exists():
        debian(root, args.work / "apt", SUITE, "arm64", PACKAGES)
    qemu = args.work / "qemu" / "usr" / "bin" / "qemu-aarch64"
    if not qemu.exists():
        debian(args.work / "qemu", args.work / "apt-qemu", f"{SUITE}-backports", "amd64", ["qemu-user"])
    if not (site / "ai_edge_litert").exists():
        wheels(site, Path(__file__).parents[1])
    said = ["generate", args.prompt, "--seed", "0", "--threads", "1", "--bundle", str(bundle)]
    said += [] if args.steps is None else ["--steps", str(args.steps)]
    pictures, seconds = {}, {}
    for machine in ("x86-64", "aarch64"):
        out = args.work / f"{machine}.png"
        command = [sys.executable] if machine == "x86-64" else [
            str(qemu.absolute()), "-L", str(root.absolute()), str(root.absolute() / "usr/bin/python3.11"),
        ]  # fmt: skip
        environment = dict(os.environ)
        if machine == "aarch64":
            environment |= {"PYTHONPATH": str(site.absolute()), "PYTHONHOME": str(root.absolute() / "usr")}
            environment["LD_LIBRARY_PATH"] = ""
        start = time.perf_counter()
        subprocess.run([*command, "-m", "pocketfusion", *said, "-o", str(out)], check=True, env=environment)
        seconds[machine] = time.perf_counter() - start
        pictures[machine] = np.asarray(Image.open(out).convert("RGB"), np.float64)
    difference = pictures["aarch64"] - pictures["x86-64"]
    mse = float(np.mean(difference**2))
    result = {
        "bundle": str(bundle),
        "psnr_db": 99.0 if mse == 0 else float(10 * np.log10(255**2 / mse)),
        "largest_difference_of_255": float(np.abs(difference).max()),
        "seconds": seconds,
        "litert": _version("ai-edge-litert"),
    }
    if args.draw:
        libraries = ":".join(str(path.absolute()) for path in (site / "ai_edge_litert", root / LIBRARIES))
        command = [str(qemu.absolute()), "-L", str(root.absolute()), "-E", f"LD_LIBRARY_PATH={libraries}"]
        tables = Path(pocketfusion.__file__).parent / "port" / "unicode.json"
        more = [] if args.steps is None else ["cpu", Bundle.open(bundle).manifest.sampler, str(args.steps)]
        out = args.work / "cpp.png"
        arguments = [str(args.draw.absolute()), str(bundle), str(tables), args.prompt, "0", str(out), *more]
        subprocess.run([*command, *arguments], check=True, env={**os.environ, "LD_LIBRARY_PATH": ""})
        drawn = np.asarray(Image.open(out).convert("RGB"), np.float64)
        result["cpp_values_that_differ"] = int((drawn != pictures["aarch64"]).sum())
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
