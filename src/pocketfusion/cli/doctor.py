"""`doctor`: what this machine and installation can do."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from pocketfusion.cli import app

_STYLES = {"ok": "green", "absent": "yellow", "broken": "red"}


@app.command("doctor")
def doctor_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a list.")] = False,
) -> None:
    """Say what this machine and installation can do, and the command for what is missing.

    Exits with code 2 if drawing does not work. What is absent is no fault: only some commands ask for it.
    """
    import json

    from pocketfusion.doctor import examine
    from pocketfusion.terminal import Console, printable_json

    with Console(stderr=True, markup=False, highlight=False).status("looking") as status:
        found = examine(lambda what: status.update(f"looking at {what}"))
    if as_json:
        typer.echo(printable_json(json.dumps([asdict(one) for one in found], indent=2, ensure_ascii=False)))
    else:
        console = Console(markup=False, highlight=False, soft_wrap=True)
        section = ""
        for one in found:
            if one.section != section:
                section = one.section
                console.print(section, style="bold")
            console.print(f"  {one.state:<7} {one.name}: {one.text}", style=_STYLES[one.state])
            if one.cure:
                console.print(f"          → {one.cure}")
    if any(one.state == "broken" for one in found):
        raise typer.Exit(2)
