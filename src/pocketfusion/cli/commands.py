"""Registers every command on the application."""

import importlib.util

for _name in ("data", "train", "evaluate", "export", "generate", "info"):
    if importlib.util.find_spec(f"pocketfusion.cli.{_name}"):
        importlib.import_module(f"pocketfusion.cli.{_name}")
