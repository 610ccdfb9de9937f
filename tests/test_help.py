"""What `--help` shows: every command under one heading, with examples that its own options accept."""

import ast
import shlex
from collections import Counter
from pathlib import Path

import pytest
import typer.main

from pocketfusion.cli import app, commands

GROUP = typer.main.get_command(app)


def examples():
    for line in commands.every_example():
        yield pytest.param(line, id=line)


def test_every_command_stands_under_one_heading():
    names = [name for group in commands.GROUPS.values() for name in group]
    assert sorted(names) == sorted(set(names)) == sorted(GROUP.commands)


@pytest.mark.parametrize("line", examples())
def test_an_example_is_one_that_the_command_takes(line):
    context, command, words = None, GROUP, shlex.split(line)
    while hasattr(command, "commands"):
        name, *words = words
        command = command.commands[name]
    with command.make_context(command.name, words, parent=context) as parsed:
        assert all(parsed.params[p.name] is not None for p in command.params if p.required)


def test_every_command_has_an_example():
    shown = {line.split()[0] for line in commands.every_example()}
    assert shown == set(GROUP.commands)
    data = {line.split()[1] for line in commands.every_example() if line.startswith("data ")}
    assert data == set(GROUP.commands["data"].commands)


def test_an_option_is_declared_once():
    """Equal words in two places would drift apart: they are shared by name (`shared_options`)."""
    declared = Counter(
        ast.unparse(node)
        for file in Path(commands.__file__).parent.glob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("typer.Option", "typer.Argument")
    )
    assert len(declared) > 100
    assert [words for words, times in declared.items() if times > 1] == []
