"""Hostile input, counted: `python tests/fuzz/fuzz.py [KIND=COUNT ...] [--bundle PATH] [--seed N] [--json FILE]`.

Each case is made from its number alone, runs in a process of its own that may use 6 GB and 60 s, and ends as `sound`
(it was used), `refused` (PocketfusionError), or wrong: a traceback, a crash, a hang, an escape that would reach the
terminal, or a file opened outside of the bundle. Exit code 1 if any is wrong; what was wrong is printed with its
number: `KIND=N-N` runs case N alone. Needs Linux, and no torch.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import io
import json
import os
import random
import resource
import select
import signal
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cases import CASES, Escape, World, no_escapes

import pocketfusion
from pocketfusion.errors import PocketfusionError

TIME, MEMORY = 60.0, 6 * 10**9
KINDS = {"manifest": 4000, "tflite": 500, "tokenizer": 200, "safetensors": 200, "recipe": 200, "latency": 200}
PRELOADED = (
    *("pocketfusion.cli.look_commands", "pocketfusion.info", "pocketfusion.latency.table", "pocketfusion.recipe"),
    *("pocketfusion.runtime.pipeline", "rich.box", "rich.table", "rich.markup", "yaml", "PIL.PngImagePlugin"),
    *("ai_edge_litert.schema_py_generated", "pocketfusion.runtime.budget"),
)
WRONG = ("traceback", "crash", "hang", "escape", "outside")


def run_case(kind: str, number: int, seed: int, world: World) -> tuple[str, str]:
    """Outcome and detail of one case."""
    rng = random.Random(f"{seed} {kind} {number}")
    use = CASES[kind](rng, world)
    world.opened()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        _child(use, world, write)
    os.close(write)
    answer, end = b"", time.monotonic() + TIME
    while select.select([read], [], [], max(end - time.monotonic(), 0))[0]:
        if not (part := os.read(read, 65536)):
            break
        answer += part
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read)
        return "hang", f"over {TIME:g} s"
    os.close(read)
    status = os.waitpid(child, 0)[1]
    if world.opened():
        return "outside", "a canary was opened"
    if os.WIFSIGNALED(status) or not answer:
        return "crash", f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"status {status}"
    outcome, detail = json.loads(answer)
    return outcome, detail


def _child(use: Callable[[], str], world: World, answer: int) -> None:
    """Runs a case and writes its outcome; never returns."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.disable()  # pytest's; a crash is seen by its signal
    log = os.open(world.root / "log", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    opened: list[str] = []
    mine = (str(world.case), *map(os.path.realpath, (sys.prefix, sys.base_prefix, sysconfig.get_path("stdlib"))))
    mine += (
        str(Path(pocketfusion.__file__).parent),
        "/proc",
        "/sys",
        "/dev/null",
        "/usr",
        "/lib",
        str(world.root / "log"),
    )
    mine += (*(os.path.realpath(entry) for entry in sys.path if entry), tempfile.gettempdir() + "/pocketfusion-")

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], (str, bytes)):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if not path.startswith(mine) and path != tempfile.gettempdir():
                opened.append(path)
        elif event in ("os.system", "subprocess.Popen", "os.exec", "socket.connect"):
            opened.append(event)

    sys.addaudithook(audit)
    try:
        outcome, detail = use(), ""
    except PocketfusionError as error:
        outcome, detail = _shown(str(error))
    except Escape as error:
        outcome, detail = "escape", str(error)
    except BaseException as error:
        import traceback

        where = traceback.extract_tb(error.__traceback__)[-1]
        outcome, detail = "traceback", f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"[:500]
    if opened:
        outcome, detail = "outside", opened[0]
    os.write(answer, json.dumps([outcome, detail]).encode())
    os._exit(0)


def _shown(message: str) -> tuple[str, str]:
    """A refusal as the command prints it: one line without escapes."""
    from rich.markup import escape

    from pocketfusion.terminal import Console

    screen = io.StringIO()
    Console(file=screen, highlight=False, soft_wrap=True).print(f"[red]error:[/red] {escape(message)}")
    text = screen.getvalue()
    try:
        no_escapes(text)
    except (Escape, UnicodeEncodeError):
        return "escape", repr(text[:300])
    return ("refused" if text.count("\n") == 1 and len(text) < 4000 else "traceback"), text[:300]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "kinds", nargs="*", metavar="KIND=COUNT", help="default: " + " ".join(f"{k}={n}" for k, n in KINDS.items())
    )
    parser.add_argument("--bundle", type=Path, default=None, help="good bundle; default: the embedded one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", action="store_true", help="print every outcome")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    from pocketfusion.runtime.manifest import embedded_bundle

    wanted = dict(entry.split("=") for entry in options.kinds) if options.kinds else KINDS
    world = World(options.bundle or embedded_bundle())
    for module in PRELOADED:  # once, not in every child
        importlib.import_module(module)

    table, wrong = {}, []
    try:
        for kind, count in wanted.items():
            first, _, last = str(count).rpartition("-")
            numbers = range(int(first), int(last) + 1) if first else range(int(last))
            outcomes: Counter[str] = Counter()
            began, slowest = time.monotonic(), 0.0
            for number in numbers:
                start = time.monotonic()
                outcome, detail = run_case(kind, number, options.seed, world)
                slowest = max(slowest, time.monotonic() - start)
                outcomes[outcome] += 1
                if options.show:
                    print(f"{kind} {number}: {outcome}: {detail.strip()}", flush=True)
                if outcome in WRONG:
                    wrong.append([kind, number, outcome, detail])
                    print(f"{kind} {number}: {outcome}: {detail!r}", flush=True)
            row = {"cases": len(numbers), **{key: outcomes[key] for key in ("sound", "refused", *WRONG)}}
            table[kind] = {**row, "slowest": round(slowest, 1), "seconds": round(time.monotonic() - began)}
            print(f"{kind:12}" + " ".join(f"{key} {value}" for key, value in table[kind].items()), flush=True)
    finally:
        world.close()
    if options.json:
        options.json.write_text(json.dumps({"seed": options.seed, "kinds": table, "wrong": wrong}, indent=2) + "\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
