"""The public API: what docs/api.md names can be imported, is typed and documented, and keeps its signature."""

import importlib
import inspect
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: Signatures as they were released. To change one on purpose, change it there too: python tests/test_api.py
GOLDEN = ROOT / "tests" / "golden" / "api.json"


def public() -> dict[str, object]:
    """Each name of docs/api.md with what it is; modules stand for their `__all__`, classes for their own methods."""
    found: dict[str, object] = {}
    for name in re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), flags=re.M):
        try:
            module = importlib.import_module(name)
            found |= {f"{name}.{member}": getattr(module, member) for member in module.__all__}
        except ModuleNotFoundError:
            owner, _, member = name.rpartition(".")
            found[name] = getattr(importlib.import_module(owner), member)
    for name, thing in list(found.items()):
        if inspect.isclass(thing):
            for member, value in vars(thing).items():
                value = getattr(value, "__func__", value)
                if inspect.isfunction(value) and not member.startswith("_"):
                    found[f"{name}.{member}"] = value
    return found


def signature(thing: object) -> str:
    return (
        re.sub(r"<[\w.]+ object at 0x\w+>", "<object>", str(inspect.signature(thing))) if callable(thing) else "data"
    )


def test_signatures_are_those_that_were_released():
    assert {name: signature(thing) for name, thing in public().items()} == json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("name", sorted(json.loads(GOLDEN.read_text())) if GOLDEN.exists() else [])
def test_it_is_typed_and_documented(name):
    thing = public()[name]
    words = inspect.getdoc(thing) or ""
    assert words and not words.startswith(f"{name.rpartition('.')[2]}(")  # as a dataclass makes up
    if inspect.isfunction(thing):
        untyped = [p for p in inspect.signature(thing).parameters.values() if p.annotation is p.empty]
        assert [p.name for p in untyped if p.name not in ("self", "cls")] == []
        assert inspect.signature(thing).return_annotation is not inspect.Signature.empty


if __name__ == "__main__":
    GOLDEN.write_text(
        json.dumps({name: signature(thing) for name, thing in sorted(public().items())}, indent=1) + "\n"
    )
