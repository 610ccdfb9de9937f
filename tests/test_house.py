"""The house: imports run one way, modules have names and sizes one finds one's way by, docs/map.md leads somewhere."""

from __future__ import annotations

import ast
import importlib
import re
import statistics
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "src" / "pocketfusion"
#: From the lowest: a room imports, inside of functions too, only from those before it. Modules of the root are rooms.
ORDER = [
    *(
        "errors",
        "bounded",
        "quiet",
        "processes",
        "locks",
        "likeness",
        "html_page",
        "temporaries",
        "artefact",
        "terminal",
    ),
    *(
        "recipe",
        "safetensors_header",
        "recognise",
        "folder",
        "runtime",
        "models",
        "data",
        "mobile",
        "latency",
        "contest",
    ),
    *("port", "train", "distill", "evaluate", "evolve", "prune", "compress", "serve", "losses", "info"),
    *("architecture_report", "doctor", "cli", "__main__"),
]
MODULES = {file.relative_to(SOURCES.parent).with_suffix(""): file for file in sorted(SOURCES.rglob("*.py"))}


def dotted(path: Path) -> str:
    return ".".join(path.parts).removesuffix(".__init__")


NAMES = {dotted(path): file for path, file in MODULES.items()}


@cache
def imported(file: Path) -> set[str]:
    """The project's modules that a module imports, at its top or inside of functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in NAMES else node.module)
    return {name for name in found if name in NAMES and name != "pocketfusion"}


def room(name: str) -> str:
    return name.split(".")[1]


def test_imports_run_one_way():
    back = [
        f"{name} imports {other}"
        for name, file in NAMES.items()
        if name != "pocketfusion"
        for other in imported(file)
        if ORDER.index(room(other)) > ORDER.index(room(name))
    ]
    assert back == []


def test_every_room_stands_in_the_order():
    assert {room(name) for name in NAMES if name != "pocketfusion"} == set(ORDER)


#: Modules of under 80 lines that one module imports and that are a concept of their own, and why.
CONCEPTS = {
    "pocketfusion.contest.call_worker": "a process of its own",
    "pocketfusion.data.shapes": "pictures for tests and trials, drawn here",
}


def test_a_name_is_there_once():
    names = Counter(file.name for file in NAMES.values() if file.name != "__init__.py")
    assert [name for name, times in names.items() if times > 1] == []


def test_a_module_is_one_idea_of_a_size_to_read():
    lines = {name: len(file.read_text().splitlines()) for name, file in NAMES.items() if file.name != "__init__.py"}
    assert max(lines.values()) <= 400
    assert 150 <= statistics.median(lines.values()) <= 200
    importers = Counter(other for file in NAMES.values() for other in imported(file))
    small = {name for name, count in lines.items() if count < 80 and importers[name] == 1}
    assert small == set(CONCEPTS)  # else it lives in its importer


ROWS = re.findall(
    r"^\|.*`([\w.]+)`<br>\[([\w/.]+)\]\(\.\./\2\) \| \[.*\]\(([\w-]+\.md)\) \|$",
    (ROOT / "docs/map.md").read_text(),
    re.M,
)


def test_the_map_has_lines():
    assert len(ROWS) == (ROOT / "docs" / "map.md").read_text().count("\n| ") - 3  # heads of three tables


@pytest.mark.parametrize("function,test,page", ROWS, ids=[row[0] for row in ROWS])
def test_the_map_leads_somewhere(function, test, page):
    module, _, name = f"pocketfusion.{function}".rpartition(".")
    assert (getattr(importlib.import_module(module), name).__doc__ or "").strip()
    assert (ROOT / test).exists() and (ROOT / "docs" / page).is_file()
    tests = [ROOT / test] if test.endswith(".py") else sorted((ROOT / test).glob("test_*.py"))
    words = "".join(file.read_text() for file in tests)
    assert name in words or module.rpartition(".")[2] in words or module in words, f"{test} never names {name}"
