"""JSON and YAML that others wrote, read within bounds: size, depth, keys given once, aliases that do not multiply."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MB = 10**6
_DEPTH = 50
#: Of a YAML file; the project's own recipes have some 5 kB and 200 values.
_YAML_BYTES, _YAML_VALUES = 200_000, 20_000


def read_json(path: Path, limit: int) -> tuple[Any, bytes]:
    """The value that the file holds and its bytes; OSError, or ValueError with what is wrong with it."""
    content = read_bytes(path, limit)
    return parse_json(content), content


def read_bytes(path: Path, limit: int) -> bytes:
    """A regular file's content; OSError, or ValueError if it is no such file or has more than `limit` bytes."""
    if not path.is_file() and path.exists():
        raise ValueError("it is no regular file")
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"it has more than {limit / MB:,.0f} MB")
    return content


def parse_json(content: bytes | str) -> Any:
    """The value of JSON text; ValueError with what is wrong with it."""
    try:
        value = json.loads(content, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not valid JSON: {error.msg}, line {error.lineno}") from None
    except UnicodeDecodeError:
        raise ValueError("it is not valid JSON: not UTF-8") from None
    except RecursionError:
        raise ValueError("it is not valid JSON: nested too deeply") from None
    return value


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON by its pairs (json's `object_pairs_hook`); ValueError for a key that it gives twice."""
    _check_once([key for key, _ in pairs])
    return dict(pairs)


def _check_once(keys: list[str]) -> None:
    seen = set[str]()
    for key in keys:  # in one pass: a file has a million keys
        if key in seen:
            raise ValueError(f"it gives {key[:80]!r} twice")
        seen.add(key)


def walk(value: Any) -> Iterator[Any]:
    """All values inside of `value`, itself first; ValueError for what is nested deeper than is ever written."""
    pending = [(value, 0)]
    while pending:
        one, depth = pending.pop()
        yield one
        if isinstance(one, (dict, list, tuple)):
            if depth >= _DEPTH:
                raise ValueError("it is nested too deeply")
            pending += [(inner, depth + 1) for inner in (one.values() if isinstance(one, dict) else one)]


def check_numbers(value: Any, limit: float = 1e9) -> Any:
    """`value`, if all numbers in it are finite and no larger than `limit`; ValueError names the first that is not."""
    for one in walk(value):
        if isinstance(one, (int, float)) and not abs(one) <= limit:
            shown = f"{one:g}" if isinstance(one, float) or abs(one) < 10**18 else f"a number of {_digits(one)} digits"
            raise ValueError(f"{shown} is out of range: use numbers up to {limit:g}")
    return value


def _digits(number: int) -> int:
    return int(number.bit_length() * math.log10(2)) + 1


def read_yaml(path: Path) -> Any:
    """The value that a YAML file holds; OSError, or ValueError with what is wrong with it."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            _check_once(keys)  # the safe loader takes the last
            return super().construct_mapping(node, deep)

    content = read_bytes(path, _YAML_BYTES)
    try:
        loader = Loader(content.decode("utf-8"))
        document = loader.get_single_node()
        if document is None:
            return None
        if _written_out(document, {}) > _YAML_VALUES:
            raise ValueError(f"it has more than {_YAML_VALUES:,} values once its aliases are written out")
        return loader.construct_document(document)
    except RecursionError:
        raise ValueError("it is not valid YAML: nested too deeply") from None
    except ValueError as error:
        if isinstance(error, UnicodeDecodeError):
            raise ValueError("it is not valid YAML: not UTF-8") from None
        raise
    except Exception as error:  # a value that its tag does not fit raises whatever comes of it
        reason = str(error).splitlines()[0] if isinstance(error, yaml.YAMLError) else type(error).__name__
        raise ValueError(f"it is not valid YAML: {reason}") from None


def _written_out(node: Any, known: dict[int, int]) -> int:
    """The nodes at and below `node`, each as often as aliases name it; ValueError if one is inside itself."""
    import yaml

    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in known:
        if not known[id(node)]:
            raise ValueError("it has an alias inside of what it stands for")
        return known[id(node)]
    known[id(node)] = 0
    inner = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
    known[id(node)] = 1 + sum(_written_out(part, known) for part in inner)
    return known[id(node)]
