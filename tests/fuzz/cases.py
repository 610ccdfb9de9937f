"""The fuzzer's cases: from a number's random generator and the good files to a function that uses what was made."""

from __future__ import annotations

import ctypes
import hashlib
import io
import json
import os
import random
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mutate

ROOT = Path(__file__).parents[2]


class World:
    """The good files, a scratch folder for each case, and canaries beside it that nothing may open."""

    def __init__(self, bundle: Path) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="fuzz-")).resolve()
        self.good, self.case, self.outside = self.root / "good", self.root / "case", self.root / "outside"
        shutil.copytree(bundle, self.good)
        self.outside.mkdir()
        self.manifest = json.loads((self.good / "bundle.json").read_text())
        for name in ("canary", "unet.tflite", "bundle.json", "tokenizer.json"):
            (self.outside / name).write_bytes(b"secret")
        os.mkfifo(self.outside / "fifo")
        self._watch = ctypes.CDLL(None, use_errno=True)
        self._events = self._watch.inotify_init1(os.O_NONBLOCK)
        for file in self.outside.iterdir():
            self._watch.inotify_add_watch(self._events, os.fsencode(file), 0x20)  # IN_OPEN

    def fresh(self, **files: bytes) -> Path:
        """The case's folder: the good bundle's files by hard links, `files` replaced, the manifest's hashes right."""
        shutil.rmtree(self.case, ignore_errors=True)
        shutil.copytree(self.good, self.case, copy_function=os.link)
        manifest = json.loads(json.dumps(self.manifest))
        for name, content in files.items():
            entry = manifest["files"][name]
            entry["sha256"], entry["size"] = hashlib.sha256(content).hexdigest(), len(content)
            self.put(entry["path"], content)
        self.put("bundle.json", json.dumps(manifest).encode())
        return self.case

    def put(self, name: str, content: bytes) -> Path:
        """Writes a file of the case, not through the link that stood there."""
        file = self.case / name
        file.unlink(missing_ok=True)
        file.write_bytes(content)
        return file

    def opened(self) -> bool:
        """Whether a canary was opened since the last call."""
        try:
            return bool(os.read(self._events, 65536))
        except BlockingIOError:
            return False

    def close(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)


def manifest_case(rng: random.Random, world: World) -> Callable[[], str]:
    path = world.fresh()
    kind = rng.randrange(10)
    if kind == 0:
        _replace_file(rng, world)
    elif kind < 5:
        changed = mutate.gentle(rng, world.manifest)
        if rng.random() < 0.3:
            place = rng.choice([changed, changed["files"], changed["provenance"], changed["licences"]])
            text = rng.choice(mutate.TEXTS)
            if place is changed["licences"]:
                place.append({"what": text, "spdx": text, "attribution": text})
            elif place is changed["files"]:
                place[text] = dict(place["decoder"])
            else:
                place["name" if place is changed else text] = mutate.hostile(rng)
        world.put("bundle.json", mutate.as_json(rng, changed) if rng.random() < 0.2 else json.dumps(changed).encode())
    else:
        world.put("bundle.json", mutate.as_json(rng, mutate.tree(rng, world.manifest)))
    return lambda: _use_bundle(rng, path)


def _replace_file(rng: random.Random, world: World) -> None:
    """A file of the bundle, or its manifest, is something else: a link, a FIFO, a folder, a device, gone."""
    names = [*(entry["path"] for entry in world.manifest["files"].values()), "bundle.json"]
    file = world.case / rng.choice(names)
    file.unlink(missing_ok=True)
    outside = [*world.outside.iterdir(), Path("/dev/zero"), Path("/etc/passwd"), world.case / "loop", file]
    kind = rng.randrange(5)
    if kind < 2:
        file.symlink_to(rng.choice(outside))
        (world.case / "loop").symlink_to(file)
    elif kind == 2:
        os.mkfifo(file)
    elif kind == 3:
        file.mkdir()


def tflite_case(rng: random.Random, world: World) -> Callable[[], str]:
    name = rng.choices(["text_encoder", "decoder", "unet"], [4, 4, 2])[0]
    path = world.fresh(**{name: mutate.tflite(rng, world.good / world.manifest["files"][name]["path"])})
    return lambda: _use_bundle(rng, path)


HOSTILE_PARTS: list[dict[str, Any]] = [
    {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}},
    {"normalizer": {"type": "Replace", "pattern": {"Regex": "(x+x+)+y"}, "content": ""}},
    {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "a" * 99}},
    {"normalizer": {"type": "Prepend", "prepend": "a" * 10**6}},
    {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a|a)*$"}, "behavior": "Isolated", "invert": False}},
    {"pre_tokenizer": {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": True}},
    {"model": {"type": "Unigram", "unk_id": 9, "vocab": []}},
    {"model": {"type": "WordLevel", "vocab": {"a": 2**40}, "unk_token": "b"}},
    {"truncation": {"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 9}},
    {"padding": {"strategy": {"Fixed": 10**9}, "direction": "Left", "pad_to_multiple_of": 0, "pad_id": 0}},
]


def tokenizer_case(rng: random.Random, world: World) -> Callable[[], str]:
    good = (world.good / world.manifest["files"]["tokenizer"]["path"]).read_bytes()
    value = json.loads(good)
    # the vocabulary is a part like the others, not most of them
    vocabulary = value["model"]["vocab"]
    value["model"]["vocab"] = {"a": 1}
    if rng.random() < 0.25:
        value.update(rng.choice(HOSTILE_PARTS))
    elif rng.random() < 0.8:
        value = mutate.tree(rng, value)
    if isinstance(model := value.get("model"), dict) and model.get("vocab") == {"a": 1}:
        model["vocab"] = vocabulary if rng.random() < 0.8 else mutate.tree(rng, vocabulary)
    content = mutate.as_json(rng, value) if rng.random() < 0.85 else mutate.flip(rng, good)
    path = world.fresh(tokenizer=content)
    return lambda: _use_bundle(rng, path)


def _use_bundle(rng: random.Random, path: Path) -> str:
    """What `info` and `generate` do with a bundle, on the same consoles."""
    from pocketfusion.cli.look_commands import _tell
    from pocketfusion.info import describe_bundle
    from pocketfusion.runtime.pipeline import Pipeline
    from pocketfusion.terminal import Console, printable_json

    about = describe_bundle(path)
    screen = io.StringIO()
    _tell(Console(file=screen, markup=False, highlight=False, soft_wrap=True), about)
    screen.write(printable_json(json.dumps(about, ensure_ascii=False)))
    no_escapes(screen.getvalue())
    mode = rng.choice(["resident", "pipelined", "sequential", None])
    budget = 10**6 if mode is None else None
    pipeline = Pipeline.load(path, 1, mode=mode, memory_budget=budget)  # type: ignore[arg-type]
    for prompt in ("a red apple, noto style", "x" * 400 + " " * 400):
        result = pipeline.generate(prompt, num_inference_steps=1, seed=1)
    pipeline.close()
    for warning in result.warnings:
        Console(file=screen, markup=False).print(warning)
    no_escapes(screen.getvalue())
    return "sound"


class Escape(Exception):
    """What reached the terminal."""


def no_escapes(text: str) -> None:
    text.encode()
    if any((c < " " and c not in "\n\t") or "\x7f" <= c < "\xa0" or c == "\u202e" for c in text):
        raise Escape(repr(text[:200]))


def safetensors_case(rng: random.Random, world: World) -> Callable[[], str]:
    import numpy as np

    shapes = {"a.weight": ("F32", [3, 5]), "b.weight": ("BF16", [4]), "c": ("I64", []), "d": ("F16", [0, 2])}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (kind, shape) in shapes.items():
        size = int(np.prod(shape)) * {"F32": 4, "BF16": 2, "I64": 8, "F16": 2}[kind]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = mutate.as_json(rng, mutate.tree(rng, header)) if rng.random() < 0.9 else json.dumps(header).encode()
    length = len(text) if rng.random() < 0.9 else rng.choice([0, len(text) + 1, 2**40, 2**63])
    content = struct.pack("<Q", length) + text + bytes(range(end))
    if rng.random() < 0.15:
        content = mutate.flip(rng, content)
    world.fresh()
    file = world.put("model.safetensors", content)

    def use() -> str:
        from pocketfusion.info import _unsound
        from pocketfusion.safetensors_header import read_safetensors_header

        list(_unsound(file, *read_safetensors_header(file)))
        return "sound"

    return use


_NINE = [(name, ",".join([f"*{before}"] * 9)) for before, name in zip("abcdefgh", "bcdefghi", strict=True)]
YAMLS = [
    "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(f"{name}: &{name} [{nine}]\n" for name, nine in _NINE),
    "a: &a {k: 1}\n" + "".join(f"{name}: &{name} {{<<: [{nine}], {name}: 1}}\n" for name, nine in _NINE),
    *(
        "a: &a [*a]",
        "!!python/object/apply:os.system ['touch PWNED']",
        "!!timestamp x",
        "!!bool x",
        "!!int 0b",
        "? [a]",
    ),
    *("{" * 3000, "- " * 3000, "a: !!binary '*'", "%YAML 9.9\n---\n", "a: 1\na: 2", "\t", "x: 1:99:99:99", "&a" * 99),
]


def recipe_case(rng: random.Random, world: World) -> Callable[[], str]:
    import yaml

    good = (ROOT / "recipes" / "tiny.yaml").read_text()
    kind = rng.randrange(10)
    if kind < 6:
        try:
            text = yaml.safe_dump(mutate.tree(rng, yaml.safe_load(good)), allow_unicode=True)
        except (yaml.YAMLError, RecursionError, ValueError):
            text = rng.choice(YAMLS)
        content = text.encode("utf-8", "surrogatepass")
    elif kind == 6:
        content = (good + rng.choice(YAMLS)).encode()
    elif kind == 7:
        numbers = [".inf", "-.inf", ".nan", "1e12", "1.0e+12", "9" * 5000, "0x" + "f" * 400, "1_0", "12:30:45"]
        lines = [line for line in good.splitlines() if line.rstrip()[-1:].isdigit()]
        line = rng.choice(lines)
        content = good.replace(line, line.partition(":")[0] + ": " + rng.choice(numbers)).encode()
    else:
        content = mutate.flip(rng, rng.choice([good, rng.choice(YAMLS)]).encode())
    world.fresh()
    file = world.put("recipe.yaml", content)

    def use() -> str:
        from pocketfusion.recipe import load_recipe

        load_recipe(file)
        return "sound"

    return use


def latency_case(rng: random.Random, world: World) -> Callable[[], str]:
    config, good = _table()
    world.fresh()
    content = mutate.as_json(rng, mutate.tree(rng, good))
    file = world.put("latency.json", mutate.flip(rng, content) if rng.random() < 0.1 else content)

    def use() -> str:
        from pocketfusion.latency.table import LatencyTable
        from pocketfusion.models.elastic.architecture import Architecture

        table = LatencyTable.load(file)
        table.check(config, table.settings, force=rng.random() < 0.5)
        milliseconds = table.predict(config, Architecture.stock(config))
        assert milliseconds == milliseconds and abs(milliseconds) < 1e30
        return "sound"

    return use


def _table() -> tuple[dict[str, Any], dict[str, Any]]:
    """A UNet's configuration and a table of it."""
    from pocketfusion.latency.unet_parts import base_shapes, list_parts
    from pocketfusion.models.elastic.architecture import Architecture

    config = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "block_out_channels": [8, 16],
        "layers_per_block": 1,
        "attention_head_dim": 2,
        "cross_attention_dim": 32,
        "norm_num_groups": 4,
    }
    ms = {"median": 1.0, "min": 1.0, "max": 1.0, "runs": 3}
    parts = {
        part.key: {"kind": part.kind, "parameters": 9, "macs": 99, "ms": {"2": ms}}
        for part in list_parts(config, Architecture.stock(config), 16)
    }
    whole = {"whole": ms, "parts": 3.0, "count": 20}
    return config, {
        "format": "pocketfusion-latency",
        "version": 1,
        "created_by": "fuzz",
        "settings": {"device": "d", "backend": "litert-cpu", "runtime": "r", "weights": "float32", "threads": 2},
        "base": base_shapes(config),
        "text_length": 16,
        "parts": parts,
        "overhead": {"2": {**whole, "bare": {**whole, "count": 9}, "empty": 0.1, "interleaved": True}},
        "networks": {"decoder": {"kind": "decoder", "parameters": 1, "macs": 1, "ms": {"1": ms}}},
        "validation": [],
    }


CASES = {
    "manifest": manifest_case,
    "tflite": tflite_case,
    "tokenizer": tokenizer_case,
    "safetensors": safetensors_case,
    "recipe": recipe_case,
    "latency": latency_case,
}
