"""Registers every command on the application, in the order in which `--help` lists them."""

from pocketfusion.cli import generate, info, architecture, data, train, elastic, evaluate, export  # noqa: F401  # isort: skip
