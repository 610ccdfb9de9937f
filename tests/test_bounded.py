"""Recipes, latency tables and weight headers that others wrote: within bounds, or refused in a sentence."""

from __future__ import annotations

import json
import os
import struct
import time
from pathlib import Path

import pytest

from pocketfusion.bounded import check_numbers, parse_json, read_bytes, read_yaml
from pocketfusion.errors import PocketfusionError
from pocketfusion.mobile.quantization.weight_forms import WeightRecipe
from pocketfusion.recipe import load_recipe
from pocketfusion.safetensors_header import read_safetensors_header

TINY = Path(__file__).parents[1] / "recipes" / "tiny.yaml"
LISTS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{n}: &{n} [{','.join([f'*{m}'] * 9)}]\n" for m, n in zip("abcdefghi", "bcdefghij", strict=True)
)
MERGES = "a: &a {k: 1}\n" + "".join(
    f"{n}: &{n} {{<<: [{','.join([f'*{m}'] * 9)}], {n}: 1}}\n" for m, n in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (LISTS, "more than 20,000 values"),
        (MERGES, "more than 20,000 values"),
        ("a: &a [*a]", "inside of what it stands for"),
        ("[" * 2000, "nested too deeply"),
        ("a: 1\na: 2", "it gives 'a' twice"),
        ("a: !!timestamp x", "not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("a: \x00", "not valid YAML"),
        ("# " + "x" * 200_000, "more than 0 MB"),
    ],
)
def test_hostile_yaml(tmp_path, text, match):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    began = time.process_time()
    for load in (load_recipe, WeightRecipe.load):
        with pytest.raises(PocketfusionError, match=match) as caught:
            load(file)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert time.process_time() - began < 10


def test_merge_keys_and_aliases_still_work(tmp_path):
    (tmp_path / "a.yaml").write_text("a: &a {x: 1, y: [2, 3]}\nb: {<<: *a, x: 4}\nc: *a\n")
    assert read_yaml(tmp_path / "a.yaml") == {
        "a": {"x": 1, "y": [2, 3]},
        "b": {"x": 4, "y": [2, 3]},
        "c": {"x": 1, "y": [2, 3]},
    }


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("batch_size: 4", "batch_size: 1000000000000", "autoencoder.train.batch_size"),
        ("steps: 6", "steps: 1000000000000", "autoencoder.train.steps"),
        ("learning_rate: 1.0e-3", "learning_rate: .inf", "autoencoder.train.learning_rate"),
        ("learning_rate: 1.0e-3", "learning_rate: .nan", "autoencoder.train.learning_rate"),
        ("learning_rate: 1.0e-3", "learning_rate: 1e12", "autoencoder.train.learning_rate: 1e\\+12 is out of range"),
        ("block_out_channels: [8, 8, 16, 16]", "block_out_channels: [8, 8, 16, 1e12]", "is not|out of range|got"),
        ("layers_per_block: 1", "layers_per_block: 1000000000000", "autoencoder.config: .* out of range"),
        ("beta_end: 0.012", "beta_end: .inf", "teacher.scheduler: inf is out of range"),
        ("size: 64", f"size: {'9' * 400}", "data.size"),
    ],
)
def test_numbers_of_a_recipe_are_bounded(tmp_path, old, new, match):
    text = TINY.read_text()
    assert old in text
    (tmp_path / "r.yaml").write_text(text.replace(old, new, 1))
    if "1e12]" in new:  # YAML 1.1 reads that as text, which the network's own settings refuse
        load_recipe(tmp_path / "r.yaml")
        return
    with pytest.raises(PocketfusionError, match=match) as caught:
        load_recipe(tmp_path / "r.yaml")
    assert len(str(caught.value)) < 500


def test_the_projects_recipes_are_within_the_bounds():
    for path in TINY.parent.glob("*.yaml"):
        load_recipe(path, whole=False)  # sd15-phone trains nothing


def test_json_is_bounded(tmp_path):
    many = "{" + ",".join(f'"{key}":0' for key in [*range(50_000), 49_999]) + "}"
    with pytest.raises(ValueError, match="it gives '49999' twice"):
        parse_json(many)  # minutes where every key is counted among all
    with pytest.raises(ValueError, match="it gives 'a' twice"):
        parse_json('{"b": [{"a": 1, "a": 2}]}')
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * 100_000)
    with pytest.raises(ValueError, match="number of 401 digits is out of range"):
        check_numbers({"a": [1, 10**400]})
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ValueError, match="no regular file"):
        read_bytes(tmp_path / "fifo", 10)


def header(**tensors: object) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


def tensor(begin: int, end: int, shape: object = (2,), dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({"a": tensor(0, 8), "b": tensor(4, 12)}, "b begins at byte 4, not behind"),
        ({"a": tensor(0, 8), "b": tensor(12, 20)}, "b begins at byte 12, not behind"),
        ({"a": tensor(-8, 0)}, "a shape or place that is none"),
        ({"a": tensor(0, 8, (-1, -2))}, "a shape or place that is none"),
        ({"a": tensor(0, 8, (2.0,))}, "a shape or place that is none"),
        ({"a": tensor(0, 8, dtype="F16")}, r"a of shape \[2\] and type F16 has 8 bytes"),
        ({"a": tensor(0, 8, dtype="F12")}, "unknown type 'F12'"),
        ({"a": tensor(0, 8, (2**40, 2**40))}, "has 8 bytes"),
        ({"a": {**tensor(0, 8), "more": 1}}, "keys beside"),
        ({"__metadata__": {"a": 1}}, "metadata"),
    ],
)
def test_a_weight_header_that_lies(tmp_path, tensors, match):
    file = tmp_path / "m.safetensors"
    file.write_bytes(header(**tensors) + bytes(20))
    with pytest.raises(PocketfusionError, match=match):
        read_safetensors_header(file)


def test_a_weight_header_that_is_right(tmp_path):
    """The types that the safetensors library writes, by its own hand."""
    import numpy as np
    from safetensors.numpy import save_file

    kinds = ("bool", "uint8", "int8", "int16", "uint16", "float16", "int32", "float32", "int64", "float64")
    arrays = {kind: np.ones((3, 2), kind) for kind in kinds} | {"empty": np.ones((0, 2), np.float32)}
    save_file(arrays, tmp_path / "m.safetensors", metadata={"format": "np"})
    found, start = read_safetensors_header(tmp_path / "m.safetensors")
    assert {name: one["shape"] for name, one in found.items()} == {k: list(v.shape) for k, v in arrays.items()}
    (tmp_path / "m.safetensors").write_bytes((tmp_path / "m.safetensors").read_bytes() + b"x")
    with pytest.raises(PocketfusionError, match="longer than its tensors"):
        read_safetensors_header(tmp_path / "m.safetensors")
