"""Every `pocketfusion` command of the README runs on small data, and those of the pages are at least commands."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import typer

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]


def console_commands(page: Path) -> list[str]:
    """The lines that begin with `$` in the page's `console` blocks."""
    blocks = re.findall(r"^```console\n(.*?)^```", page.read_text(), flags=re.S | re.M)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("$ ")]
    return [line.removeprefix("$ ").split(" #")[0].strip() for line in lines]


def test_the_readme_has_commands():
    assert sum(c.startswith("pocketfusion ") for c in console_commands(README)) >= 6
    assert "make demo" in README.read_text() and "make test" in README.read_text()


@pytest.mark.timeout(1500)
def test_every_command_of_the_readme_runs(cli, compressed, shallow_recipe, tmp_path, monkeypatch):
    """On the chain that `compress` has made: its own command finds every stage finished."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(compressed, tmp_path / "OUT")
    for command in console_commands(README):
        if command.startswith("pocketfusion "):
            done = cli(*shlex.split(command.replace("recipes/emoji128.yaml", str(shallow_recipe)))[1:])
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page_have_its_options(page):
    """Parsed as the command line would be, and not run."""
    from pocketfusion.cli import app, commands  # noqa: F401  (registers them)

    for command in console_commands(page):
        if command.startswith("pocketfusion "):
            group, arguments = typer.main.get_command(app), shlex.split(command)[1:]
            while arguments and arguments[0] in getattr(group, "commands", {}):
                group, arguments = group.commands[arguments[0]], arguments[1:]
            group.make_context("pocketfusion", list(arguments))


@pytest.mark.parametrize(
    "command",
    [
        "compress",
        "data",
        "train-teacher",
        "evaluate",
        "export",
        "generate",
        "info",
        "profile",
        "train-elastic",
        "evolve",
        "recover",
        "score",
        "distill-steps",
        "distill-decoder",
        "distill-guidance",
        "distill-consistency",
        "architecture",
        "quantize",
        "check",
        "bench",
    ],
)
def test_the_readme_names_every_command(command):
    assert f"`{command}" in README.read_text() or f"pocketfusion {command}" in README.read_text()
