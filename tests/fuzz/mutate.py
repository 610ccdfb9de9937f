"""Hostile variants of good files: JSON-like trees by their structure, bytes, `.tflite` models by the schema."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

ESCAPE = "\x1b[31mred\x9b0m"
NUMBERS = [0, 1, -1, 2, 3, 7, 255, 2**15, 2**24, 2**31 - 1, 2**31, 2**40, 10**12, 2**63, 2**64, 10**400, -(2**63)]
FLOATS = [0.0, -0.5, 1e-320, 1e12, 1e308, float("nan"), float("inf"), float("-inf")]
TEXTS = [
    *("", " ", ESCAPE, "\x00", "\ud800", "\u202eevil", "a" * 5000, "../outside/canary", "/etc/passwd", "C:\\x"),
    *(
        "unet.tflite",
        "sub/../unet.tflite",
        "./unet.tflite",
        "float32",
        "int32",
        "int4-dynamic",
        "1e12",
        ".inf",
        "null",
    ),
    *("timestep_cond", "step_coefficients", "timestep_embedding", "embedded", "folded", "litert-gpu", "%s{0}", "💥"),
]


def deep(levels: int) -> Any:
    """A list in a list in a list …"""
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def hostile(rng: random.Random) -> Any:
    """A value that nobody expects."""
    pools: list[Callable[[], Any]] = [
        lambda: rng.choice(NUMBERS),
        lambda: rng.choice(FLOATS),
        lambda: rng.choice(TEXTS),
        lambda: rng.choice([None, True, False, [], {}, [[]], {"": {}}, [None], {ESCAPE: ESCAPE}]),
        lambda: deep(rng.choice([3, 60, 400])),
        lambda: [rng.choice(NUMBERS) for _ in range(rng.choice([1, 4, 9, 200]))],
        lambda: {f"k{i}": rng.choice(TEXTS) for i in range(rng.choice([1, 300]))},
    ]
    return rng.choice(pools)()


def _places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(place for key, value in inner for place in _places(value, (*path, key)))]


def _replace_all(tree: Any, old: Any, new: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _replace_all(value, old, new) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_replace_all(value, old, new) for value in tree]
    return new if type(tree) is type(old) and tree == old else tree


def tree(rng: random.Random, good: Any) -> Any:
    """`good` with one to three of its places changed; now and then one number everywhere, so that it still agrees."""
    value = copy.deepcopy(good)
    for _ in range(rng.choice([1, 1, 2, 3])):
        places = [place for place in _places(value) if place]
        if not places:
            return value
        *way, key = rng.choice(places)
        parent = value
        for step in way:
            parent = parent[step]
        old, kind = parent[key], rng.randrange(9)
        if kind == 0:
            del parent[key]
        elif kind == 1 and isinstance(parent, dict):
            parent[rng.choice(TEXTS)] = parent.pop(key)
        elif kind == 2 and isinstance(parent, list):
            parent.insert(rng.randrange(len(parent) + 1), copy.deepcopy(rng.choice(parent)))
        elif kind == 3 and isinstance(parent, list):
            rng.shuffle(parent)
        elif kind == 4 and type(old) in (int, float):
            parent[key] = rng.choice([old + 1, old - 1, old * 2, -old, old / 2, str(old), [old]])
        elif kind == 5 and type(old) is int:
            value = _replace_all(value, old, rng.choice([old + 1, old * 2, max(old // 2, 1), rng.choice(NUMBERS)]))
        elif kind == 6:
            way, key = list((other := rng.choice(places))[:-1]), other[-1]
            try:
                source = value
                for step in (*way, key):
                    source = source[step]
                parent[key if key in parent or isinstance(parent, dict) else 0] = copy.deepcopy(source)
            except (KeyError, IndexError, TypeError):
                parent.clear()
        else:
            parent[key] = hostile(rng)
    return value


def gentle(rng: random.Random, good: Any) -> Any:
    """`good` with one value changed a little, one number changed everywhere, or other text: much of it still holds."""
    value = copy.deepcopy(good)
    leaves = []
    for place in _places(value):
        parent, leaf = None, value
        for step in place:
            parent, leaf = leaf, leaf[step]
        if place and not isinstance(leaf, (dict, list)):
            leaves.append((parent, place[-1], leaf))
    number = rng.random() < 0.6
    parent, key, old = rng.choice([leaf for leaf in leaves if (type(leaf[2]) in (int, float)) == number] or leaves)
    if type(old) is int and rng.random() < 0.5:
        return _replace_all(value, old, rng.choice([old + 1, max(old - 1, 0), old * 2, old // 2]))
    if type(old) in (int, float):
        parent[key] = rng.choice([old + 1, old - 1, old * 2, old / 2, old * 1000, float(old), -old])
    elif isinstance(old, str):
        parent[key] = rng.choice([old + rng.choice(TEXTS[:7]), rng.choice(TEXTS), old.upper(), old[:-1]])
    else:
        parent[key] = not old if isinstance(old, bool) else rng.choice(TEXTS)
    return value


def as_json(rng: random.Random, value: Any) -> bytes:
    """JSON text of a tree, seldom damaged as text."""
    try:
        text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    except (ValueError, RecursionError):
        text = "[" * rng.choice([5, 5000]) + str(10**400)
    kind = rng.randrange(12)
    if kind == 0:
        text = text[: rng.randrange(len(text) + 1)]
    elif kind == 1:
        text = text.replace("{", rng.choice(['{"format": "x", ', '{"name": "a", "name": "b", ', "{,"]), 1)
    elif kind == 2:
        text = rng.choice(["\ufeff", "[" * 10_000, "NaN ", "\x00"]) + text
    data = text.encode(rng.choice(["utf-8"] * 9 + ["utf-16"]), "surrogatepass")
    return flip(rng, data) if kind == 3 else data


def flip(rng: random.Random, data: bytes, where: list[tuple[int, int]] | None = None) -> bytes:
    """`data` with some bytes or little-endian integers changed, or cut or lengthened; `where`: (start, end) to hit."""
    out = bytearray(data)
    if not out:
        return b"\x00"
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        start, end = rng.choice(where) if where else (0, len(out))
        at = rng.randrange(start, max(end, start + 1)) % len(out)
        kind = rng.randrange(5)
        if kind < 2:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            out[at] = rng.choice([0, 1, 255, 127, 128, rng.randrange(256)])
        else:
            at &= ~3
            number = rng.choice([0, 1, 2, 4, 2**16, 2**31 - 1, 2**31, 2**32 - 1, rng.randrange(2**32)])
            out[at : at + 4] = number.to_bytes(4, "little")[: len(out) - at]
    kind = rng.randrange(20)
    if kind == 0:
        del out[rng.randrange(len(out)) :]
    elif kind == 1:
        out += bytes(rng.randrange(256) for _ in range(rng.choice([1, 64])))
    return bytes(out)


def tflite(rng: random.Random, path: Path) -> bytes:
    """The network with its bytes (those of weights seldom) or its structure changed."""
    data = path.read_bytes()
    if rng.random() < 0.4:
        return flip(rng, data, _structure(path) if rng.random() < 0.9 else None)
    import numpy as np
    from ai_edge_litert import schema_py_generated as schema

    from pocketfusion.mobile import flatbuffer

    model = flatbuffer.read(path)
    for operator in model.subgraphs[0].operators:  # views of the file otherwise
        operator.inputs, operator.outputs = np.array(operator.inputs), np.array(operator.outputs)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        _change(rng, model, schema)
    out = path.with_name(f"{path.stem}.changed")
    try:
        flatbuffer.write(model, out)
        return out.read_bytes()
    except Exception:  # a change that the builder refuses: another one
        return flip(rng, data, _structure(path))
    finally:
        out.unlink(missing_ok=True)


_KNOWN: dict[Path, list[tuple[int, int]]] = {}


def _structure(path: Path) -> list[tuple[int, int]]:
    """The parts of a file that lie between large buffers."""
    if path not in _KNOWN:
        from pocketfusion.runtime.trust.flat import Flat
        from pocketfusion.runtime.trust.litert_file import _BUFFER, _MODEL

        data = memoryview(path.read_bytes())
        flat = Flat(data)
        model = flat.read(_MODEL, flat.root(b"TFL3"))
        buffers = [flat.vector(table[0], 1) for table in flat.tables(_BUFFER, model[4])]
        large = sorted((start, start + length) for start, length in buffers if length > 64)
        edges = [0, *(edge for pair in large for edge in pair), len(data)]
        _KNOWN[path] = [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if b > a]
    return _KNOWN[path]


def _change(rng: random.Random, model: Any, schema: Any) -> None:
    import numpy as np

    graph = model.subgraphs[0]
    tensor, operator = rng.choice(graph.tensors), rng.choice(graph.operators)
    number = rng.choice([-1, 0, 1, 2, 3, 5, 17, 2**16, 2**31 - 1])
    kind = rng.randrange(20)
    if kind < 4 and tensor.shape is not None and len(tensor.shape):
        shape = [int(extent) for extent in tensor.shape]
        at = rng.randrange(len(shape))
        shape[at] = rng.choice([shape[at] + 1, shape[at] - 1, shape[at] * 2, number])
        tensor.shape = np.array(rng.choice([shape, shape[1:], [*shape, 1], shape[::-1]]), np.int32)
    elif kind == 4:
        tensor.type = rng.randrange(20)
    elif kind == 5:
        tensor.buffer = rng.randrange(len(model.buffers) + 1)
    elif kind == 6:
        packed = [t for t in graph.tensors if t.quantization is not None and t.quantization.scale is not None]
        q = rng.choice(packed).quantization if packed else schema.QuantizationParametersT()
        q.scale = np.array(rng.choice([[], [0.0], [float("nan")], [1.0] * 3, [1.0] * 4096]), np.float32)
        q.zeroPoint = np.array(rng.choice([[], [0], [2**40], [0] * 3]), np.int64)
        q.quantizedDimension = rng.choice([0, 1, 3, 4, -1, 100])
        tensor.quantization = tensor.quantization or q
    elif kind in (7, 8):
        ends = rng.choice([operator.inputs, operator.outputs])
        if len(ends):
            ends[rng.randrange(len(ends))] = rng.choice([-1, rng.randrange(len(graph.tensors)), 2**31 - 1, -2])
    elif kind == 9:
        operator.inputs = np.array(rng.choice([[], operator.inputs[:1], [*operator.inputs, 0]]), np.int32)
    elif kind == 10:
        other = rng.choice(graph.operators)
        operator.inputs, other.inputs = other.inputs, operator.inputs
    elif kind in (11, 12) and operator.builtinOptions is not None:
        fields = [
            name for name, value in vars(operator.builtinOptions).items() if isinstance(value, (int, float, bool))
        ]
        if fields:
            name = rng.choice(fields)
            small = [-1, 0, 1, 2, 5, 100] if not name.startswith(("stride", "dilation")) else [0, -1, 2, 2**31 - 1]
            old = getattr(operator.builtinOptions, name)
            setattr(operator.builtinOptions, name, not old if isinstance(old, bool) else rng.choice(small))
    elif kind == 13:
        operator.opcodeIndex = rng.randrange(len(model.operatorCodes) + 1)
    elif kind == 14:
        code = rng.choice(model.operatorCodes)
        code.builtinCode = rng.choice([32, 118, 119, 206, rng.randrange(210)])
        code.deprecatedBuiltinCode = min(code.builtinCode, 127)
    elif kind in (15, 16):
        small = [b for b in model.buffers if b.data is not None and 0 < len(b.data) <= 64]
        if small:
            chosen = rng.choice(small)
            values = np.frombuffer(bytes(chosen.data[: len(chosen.data) // 4 * 4]), np.int32).copy()
            if len(values):
                values[rng.randrange(len(values))] = number
                chosen.data = values.view(np.uint8)
    elif kind == 17:
        full = [b for b in model.buffers if b.data is not None and len(b.data)]
        chosen = rng.choice(full)
        size = rng.choice([0, 1, len(chosen.data) // 2, len(chosen.data) - 1])
        chosen.data = np.asarray(chosen.data)[:size].copy()
    elif kind == 18:
        rng.shuffle(graph.operators) if rng.random() < 0.5 else graph.operators.remove(operator)
    else:
        choice = rng.randrange(6)
        if choice == 0:
            graph.inputs = np.array([*graph.inputs, rng.randrange(len(graph.tensors))], np.int32)
        elif choice == 1:
            graph.outputs = np.array([rng.randrange(len(graph.tensors))], np.int32)
        elif choice == 2:
            tensor.isVariable = True
        elif choice == 3:
            model.signatureDefs[0].inputs[0].tensorIndex = rng.randrange(len(graph.tensors) + 2)
        elif choice == 4:
            model.subgraphs.append(graph)
        else:
            model.signatureDefs[0].signatureKey = rng.choice([b"", b"\xff\xfe", ESCAPE.encode()])
