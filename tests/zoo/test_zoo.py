"""The zoo: every kind of checkpoint that people bring is drawn as stock diffusers draws it, or refused by its name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from drive import drive
from members import LEAST_DB, MEMBERS, Member

from conversions import kept_in
from pocketfusion.errors import PocketfusionError
from pocketfusion.mobile import export as module


@pytest.fixture(scope="module", autouse=True)
def conversions(once: Callable) -> Iterator[None]:
    """Networks that are the same are converted once."""
    kept = once("zoo-conversions", lambda root: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_convert_network", kept_in(kept, module._convert_network))
        yield


DRAWN = [
    pytest.param(member, id=member.name, marks=[pytest.mark.slow] * member.slow)
    for member in MEMBERS
    if member.refused is None
]
REFUSED = [member for member in MEMBERS if member.refused is not None]


@pytest.mark.parametrize("member", DRAWN)
def test_it_is_drawn_as_stock_diffusers_draws_it(member: Member, tmp_path: Path) -> None:
    """In int8 the export's own gate holds; the picture is then that of the prompt, at least."""
    drawn = drive(member, tmp_path / "member", ("float32", "int8") if member.int8 else ("float32",))
    assert drawn.psnr["float32"] >= LEAST_DB
    assert drawn.psnr.get("int8", 99) >= 20


@pytest.mark.parametrize("member", REFUSED, ids=lambda member: member.name)
def test_it_is_refused_by_its_name(member: Member, tmp_path: Path) -> None:
    with pytest.raises(PocketfusionError, match=member.refused):
        drive(member, tmp_path / "member")
    assert not {"imported", "float32"} & {path.name for path in (tmp_path / "member").iterdir()}
