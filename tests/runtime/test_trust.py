"""Bundles are not trusted: each way in which one can lie is told in a sentence before native code believes it."""

from __future__ import annotations

import json
import math
import os
import re
import struct
import types
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

from pocketfusion.artefact import sha256_file
from pocketfusion.errors import PocketfusionError
from pocketfusion.mobile import flatbuffer
from pocketfusion.mobile.quantization.packing import FORMS, pack
from pocketfusion.runtime.manifest import NETWORKS, Bundle, embedded_bundle
from pocketfusion.runtime.networks import Network
from pocketfusion.runtime.pipeline import Pipeline
from pocketfusion.runtime.tokenizer import PromptTokenizer, TokenizerSpec, _told
from pocketfusion.runtime.trust.flat import Unsound
from pocketfusion.runtime.trust.litert_file import read_verified
from pocketfusion.runtime.trust.schema import OPERATIONS, TYPES
from pocketfusion.terminal import printable, printable_json

# --- the manifest


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: m["latents"].update(height=9, width=9), r"sample \[2, 8, 8, 4\] .* \[2, 9, 9, 4\] float32"),
        (
            lambda m: m["latents"].update(channels=3),
            r"sample \[2, 8, 8, 4\] .* \[2, 8, 8, 3\] float32",
        ),
        (lambda m: m["image"].update(height=65), "image is 65x64, no whole multiple of the latents' 8x8"),
        (lambda m: m["image"].update(height=128, width=128), r"image \[1, 64, 64, 3\] .* \[1, 128, 128, 3\]"),
        (lambda m: m["tokenizer"].update(max_length=1), r"takes input_ids \[1, 32\] .* \[1, 1\]"),
        (lambda m: m["tokenizer"].update(max_length=10**9), "tokenizer.max_length"),
        (lambda m: m["scheduler"].update(num_train_timesteps=10**12), "scheduler.num_train_timesteps"),
        (lambda m: m["scheduler"].update(steps_offset=1000), "steps_offset is not below"),
        (lambda m: m["scheduler"].update(beta_start=1e-300), "scheduler.beta_start"),
        (lambda m: m["scheduler"].update(beta_start=0.9, beta_end=0.99), r"scheduler: .*alpha\^2 = 0 at the last"),
        (lambda m: m["scheduler"].update(num_train_timesteps=100_000), r"scheduler: .*alpha\^2 = .* at the last"),
        (lambda m: m["networks"]["decoder"]["inputs"][0].update(shape=[]), r"decoder.inputs.0.shape"),
        (lambda m: m["networks"]["unet"]["outputs"][0].update(shape=[2**40]), r"unet.outputs.0.shape"),
        (lambda m: m["networks"]["unet"]["outputs"][0].update(shape=[2**14] * 4), "elements"),
        (lambda m: m["networks"]["unet"].update(outputs=[]), "unet.outputs"),
        (lambda m: m["networks"]["unet"]["inputs"].pop(1), "unet takes sample, encoder_hidden_states, not"),
        (lambda m: m["networks"]["text_encoder"]["inputs"][1].update(dtype="float32"), r"attention_mask \[1, 32\] fl"),
        (
            lambda m: m["networks"]["text_encoder"]["outputs"][0].update(shape=[1, 32, 16]),
            "encoder_hidden_states|empty_prompt",
        ),
        (lambda m: m.update(provenance={"a": json.loads("[" * 60 + "]" * 60)}), "nested too deeply"),
        (lambda m: m.update(provenance={"a": math.inf}), "inf is out of range"),
        (lambda m: m["files"]["unet"].update(path="a\x00b"), "none that a file can have"),
        (lambda m: m["files"]["unet"].update(path="a" * 300), "none that a file can have"),
    ],
)
def test_manifest_that_contradicts_itself(bundle, edit, change, match):
    edit(change)
    with pytest.raises(PocketfusionError, match=match) as caught:
        Bundle.open(bundle)
    assert "\n" not in str(caught.value)


def test_a_key_that_is_given_twice(bundle):
    file = bundle / "bundle.json"
    file.write_text('{"name": "a", ' + file.read_text().lstrip()[1:])
    with pytest.raises(PocketfusionError, match="it gives 'name' twice"):
        Bundle.open(bundle)


def hub_cache(bundle: Path, root: Path) -> Path:
    """The bundle as huggingface_hub's cache keeps it: links from a snapshot to blobs named by their hashes."""
    store, snapshot = root / "models--a--b" / "blobs", root / "models--a--b" / "snapshots" / "c0ffee"
    store.mkdir(parents=True)
    for file in [path for path in bundle.rglob("*") if path.is_file()]:
        blob = store / sha256_file(file)
        blob.write_bytes(file.read_bytes())
        link = snapshot / file.relative_to(bundle)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def test_links_of_the_hubs_cache_are_read_and_others_are_not(bundle, tmp_path):
    snapshot = hub_cache(bundle, tmp_path / "hub")
    assert Bundle.open(snapshot).hash == Bundle.open(bundle).hash
    decoder = snapshot / "decoder.tflite"
    blob = decoder.resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    with pytest.raises(PocketfusionError, match="altered: its SHA-256"):
        Bundle.open(snapshot)
    blob.unlink()
    os.mkfifo(blob)
    with pytest.raises(PocketfusionError, match="decoder.tflite is missing"):
        Bundle.open(snapshot)
    decoder.unlink()
    decoder.symlink_to(bundle / "decoder.tflite")
    with pytest.raises(PocketfusionError, match="a link that leaves the bundle"):
        Bundle.open(snapshot)
    for file in (snapshot / "bundle.json", decoder):
        file.unlink()
        file.symlink_to(file)  # a circle
        with pytest.raises(PocketfusionError, match="a link that leaves the bundle"):
            Bundle.open(snapshot)


@pytest.mark.parametrize("name", ["bundle.json", "decoder.tflite"])
def test_a_fifo_is_not_waited_for(bundle, name):
    (bundle / name).unlink()
    os.mkfifo(bundle / name)
    with pytest.raises(PocketfusionError, match="it has no bundle.json|decoder.tflite is missing"):
        Bundle.open(bundle)


# --- .tflite files


def test_the_rules_have_the_schemas_numbers():
    for name, (number, options, _, _) in OPERATIONS.items():
        assert number == getattr(schema.BuiltinOperator, name)
        if options:
            class_name = next(key for key, value in vars(schema.BuiltinOptions).items() if value == options)
            wanted = {"MAXIMUM": "MAXIMUMMINIMUM", "MINIMUM": "MAXIMUMMINIMUM", "MEAN": "REDUCER", "SUM": "REDUCER"}
            wanted |= {"REDUCE_MAX": "REDUCER", "REDUCE_MIN": "REDUCER", "MATMUL": "BATCHMATMUL"}
            assert class_name.upper() == wanted.get(name, name.replace("_", "")) + "OPTIONS"
    for number, name in TYPES.items():
        assert getattr(schema.TensorType, name.upper()) == number


def test_the_embedded_bundle_is_sound():
    bundle = Bundle.open(embedded_bundle())
    for name in NETWORKS:
        spec, found = getattr(bundle.manifest.networks, name), read_verified(bundle.file(name))
        assert found.inputs == {t.name: (t.dtype, tuple(t.shape)) for t in spec.inputs}
        assert found.outputs == {t.name: (t.dtype, tuple(t.shape)) for t in spec.outputs}
        biggest = max(4 * math.prod(t.shape) for t in (*spec.inputs, *spec.outputs))
        assert biggest <= found.live < 100e6


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_weights_is_sound(tiny_bundle, tmp_path, form):
    for name in ("text_encoder", "decoder"):
        pack(tiny_bundle / f"{name}.tflite", tmp_path / f"{name}.tflite", lambda weight: form)
        assert read_verified(tmp_path / f"{name}.tflite").signature == "serving_default"


@pytest.fixture
def decoder(tiny_bundle):
    """The tiny decoder as the schema's object, and a function that writes it and says what is found wrong."""
    model = flatbuffer.read(tiny_bundle / "decoder.tflite")
    graph = model.subgraphs[0]
    for operator in graph.operators:
        operator.inputs, operator.outputs = np.array(operator.inputs), np.array(operator.outputs)
    return model, graph


def reason(model, tmp_path: Path) -> str:
    flatbuffer.write(model, tmp_path / "changed.tflite")
    with pytest.raises(Unsound) as caught:
        read_verified(tmp_path / "changed.tflite")
    return str(caught.value)


def of(model, graph, name: str):
    """The first operator of a name."""
    return next(one for one in graph.operators if flatbuffer.operation_name(model, one) == name)


def set_values(model, tensor, values) -> None:
    model.buffers.append(schema.BufferT())
    model.buffers[-1].data = np.array(values, np.int32).view(np.uint8)
    tensor.buffer = len(model.buffers) - 1


CHANGES = {
    "the shape of an activation": (
        lambda m, g: setattr(g.tensors[of(m, g, "CONV_2D").outputs[0]], "shape", np.array([1, 8, 8, 99], np.int32)),
        r"\(CONV_2D\) makes float32 \[1, 8, 8, 4\], declared is float32 \[1, 8, 8, 99\]",
    ),
    "a constant that is cut": (
        lambda m, g: setattr(
            buffer := m.buffers[g.tensors[of(m, g, "CONV_2D").inputs[1]].buffer], "data", np.array(buffer.data[:-4])
        ),
        "a constant of shape .* has .* bytes, not",
    ),
    "a stride of 0": (
        lambda m, g: setattr(of(m, g, "CONV_2D").builtinOptions, "strideH", 0),
        r"\(CONV_2D\): its stride is 0",
    ),
    "an axis that is not there": (
        lambda m, g: set_values(
            m, g.tensors[of(m, g, "MEAN").inputs[1]], [7] * g.tensors[of(m, g, "MEAN").inputs[1]].shape[0]
        ),
        r"\(MEAN\): its axis is 7",
    ),
    "an order with one axis twice": (
        lambda m, g: set_values(m, g.tensors[of(m, g, "TRANSPOSE").inputs[1]], [0, 1, 1, 2]),
        r"\(TRANSPOSE\): \[0, 1, 1, 2\] is no order of 4 dimensions",
    ),
    "a tensor before it is made": (
        lambda m, g: g.operators.insert(0, g.operators.pop()),
        "reads a tensor that nothing has made",
    ),
    "a tensor made twice": (
        lambda m, g: of(m, g, "ADD").outputs.__setitem__(0, of(m, g, "CONV_2D").outputs[0]),
        "writes a tensor that is not its own|reads a tensor",
    ),
    "an operation that calls others": (
        lambda m, g: (
            setattr(m.operatorCodes[0], "builtinCode", schema.BuiltinOperator.WHILE),
            setattr(m.operatorCodes[0], "deprecatedBuiltinCode", schema.BuiltinOperator.WHILE),
        ),
        "an operation, number 119, that the exporter does not write",
    ),
    "a custom operation": (
        lambda m, g: setattr(m.operatorCodes[0], "customCode", b"evil"),
        "that the exporter does not write",
    ),
    "a variable tensor": (lambda m, g: setattr(g.tensors[3], "isVariable", True), "variable"),
    "a size that is not fixed": (
        lambda m, g: setattr(g.tensors[g.inputs[0]], "shapeSignature", np.array([-1, 8, 8, 4], np.int32)),
        "of a size that is not fixed",
    ),
    "metadata for another path": (
        lambda m, g: setattr(m.metadata[0], "name", b"LiteRtDispatch"),
        "metadata that the exporter does not write",
    ),
    "a second graph": (lambda m, g: m.subgraphs.append(g), "it has 2 graphs and 1 signatures, not one"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_network_that_lies(decoder, tmp_path, change):
    model, graph = decoder
    act, match = CHANGES[change]
    act(model, graph)
    assert re.search(match, found := reason(model, tmp_path)), found


def test_what_the_converter_says_of_large_networks_is_sound(decoder, tmp_path):
    """Above 2 GB it puts the weights behind the flatbuffer and says so in the metadata."""
    model, _ = decoder
    model.metadata[0].name = b"buffer_location"
    flatbuffer.write(model, tmp_path / "changed.tflite")
    assert read_verified(tmp_path / "changed.tflite").signature == "serving_default"


def test_scales_that_do_not_fit(tiny_bundle, tmp_path):
    pack(tiny_bundle / "decoder.tflite", tmp_path / "int8.tflite", lambda weight: "int8-dynamic")
    for scales, axis, match in (
        (2, 0, r"has 2 scales"),
        (1, 9, "no scales, or along a wrong axis"),
        (0, 0, "no scales"),
    ):
        model = flatbuffer.read(tmp_path / "int8.tflite")
        packed = next(t for t in model.subgraphs[0].tensors if t.type == schema.TensorType.INT8)
        packed.quantization.scale = np.ones(scales, np.float32)
        packed.quantization.zeroPoint = np.zeros(scales, np.int64)
        packed.quantization.quantizedDimension = axis
        assert match in reason(model, tmp_path)


def test_every_byte_of_the_structure_is_read_within_the_file(tiny_bundle, tmp_path):
    """Cut anywhere, or with any integer near its beginning far too large, the file is refused and nothing else."""
    content = (tiny_bundle / "text_encoder.tflite").read_bytes()
    file = tmp_path / "a.tflite"
    for end in [*range(0, 64, 3), *range(64, len(content), 9973)]:
        file.write_bytes(content[:end])
        with pytest.raises(Unsound):
            read_verified(file)
    for at in range(0, 400, 4):
        for value in (2**31 - 1, 2**32 - 1):
            file.write_bytes(content[:at] + struct.pack("<I", value) + content[at + 4 :])
            with suppress(Unsound):
                read_verified(file)


def test_a_network_too_large_for_the_machine(tiny_bundle, monkeypatch):
    monkeypatch.setattr("pocketfusion.runtime.trust.litert_file._memory", lambda: 1000)
    bundle = Bundle.open(tiny_bundle)
    with pytest.raises(PocketfusionError, match=r"decoder.tflite needs .* MB for its activations"):
        Network(bundle.file("decoder"), bundle.manifest.networks.decoder, 1)


@pytest.mark.parametrize("mode", ["resident", "pipelined"])
def test_a_token_that_the_table_lacks(bundle, sign, mode):
    file = bundle / "tokenizer.json"
    file.write_text(file.read_text().replace('"red":', '"red": 99999, "\u2603":'))
    sign("tokenizer")
    pipeline = Pipeline.load(bundle, 1, mode=mode)
    with pytest.raises(PocketfusionError, match="text_encoder.tflite cannot be run"):
        pipeline.generate("red", num_inference_steps=1)


# --- the tokenizer


def parts(good: dict) -> dict[str, dict]:
    nested = [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}] * 8
    return {
        "normalizer": {"normalizer": {"type": "Sequence", "normalizers": nested}},
        "map": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}},
        "regex": {"normalizer": {"type": "Replace", "pattern": {"Regex": "(x+x+)+y"}, "content": ""}},
        "replaced by text": {
            "normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaaaaaaaaaaaaaaaaaa"}
        },
        "replaced without end": {
            "normalizer": {"type": "Replace", "pattern": {"String": "\U00017001"}, "content": "\U00017001" * 9}
        },
        "too many vectors": {
            "normalizer": {"type": "Replace", "pattern": {"String": "<x>"}, "content": "\U00017001" * 65}
        },
        "split": {
            "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "x"}, "behavior": "Removed", "invert": True}
        },
        "model": {"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 0}},
        "id": {"model": {**good["model"], "vocab": {**good["model"]["vocab"], "x": 2**40}}},
        "word": {"model": {**good["model"], "max_input_chars_per_word": 10**9}},
        "truncation": {"truncation": {"max_length": 0, "stride": 9, "strategy": "LongestFirst", "direction": "Right"}},
        "unknown": {"surprise": 1},
        "version": {"version": 1.0},
    }


@pytest.mark.parametrize("part", parts({"model": {"vocab": {}}}))
def test_a_tokenizer_of_parts_that_bundles_lack(tiny_bundle, tmp_path, part):
    good = json.loads((tiny_bundle / "tokenizer.json").read_text())
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps({**good, **parts(good)[part]}))
    with pytest.raises(PocketfusionError, match="is not a tokenizer .*no.* exported bundle has"):
        PromptTokenizer(file, TokenizerSpec(max_length=32, pad_token="[PAD]", pad_token_id=0))


def test_clips_tokenizer_is_one_of_bundles(tmp_path):
    from tiny_clip import clip_tokenizer

    tokenizer, file = clip_tokenizer(), tmp_path / "tokenizer.json"
    file.write_text(tokenizer.backend_tokenizer.to_str())
    spec = TokenizerSpec(max_length=16, pad_token=tokenizer.pad_token, pad_token_id=tokenizer.pad_token_id)
    for prompt in ("a red cat", "", "Ünïcode 🍎"):
        wanted = tokenizer(prompt, padding="max_length", max_length=16, truncation=True).input_ids
        assert PromptTokenizer(file, spec).encode(prompt).input_ids.tolist() == [wanted]
    with pytest.raises(PocketfusionError, match="prompts have 2 tokens and .* adds 2"):
        PromptTokenizer(file, spec.model_copy(update={"max_length": 2}))


def test_a_panic_is_told_and_other_ends_pass():
    panic = types.new_class("PanicException", (BaseException,))
    with (
        pytest.raises(PocketfusionError, match=r"it is broken \(called unwrap\): mend it"),
        _told("it is broken", "mend it"),
    ):
        raise panic("called\nunwrap")
    with pytest.raises(KeyboardInterrupt), _told("broken", "mend it"):
        raise KeyboardInterrupt


# --- the terminal


def test_text_of_a_bundle_is_shown_and_not_obeyed(run, bundle, edit):
    evil = "emoji\x1b[31mred\x9b1m\u202egnp.exe\ud800\rover"
    edit(
        lambda m: m.update(
            name=evil,
            created_by=evil,
            licences=[{"what": evil, "spdx": evil, "attribution": evil}],
            provenance={"key\x1b[2J": evil},
        )
    )
    text = (bundle / "bundle.json").read_text()
    (bundle / "bundle.json").write_text(text.replace("\\ud800", ""))  # pydantic refuses half characters in text
    for options in ((), ("--json",)):
        code, printed, _ = run("info", bundle, *options)
        assert code == 0 and "red" in printed
        assert not any(c < " " and c not in "\n\t" or "\x7f" <= c <= "\x9f" or c == "\u202e" for c in printed)
    edit(lambda m: m["files"].update({"\x1b[31m": {}}))
    code, _, error = run("info", bundle)
    assert code == 2 and r"\x1b[31m" in error and "\x1b[31m" not in error


def test_printable_keeps_every_script():
    for text in ("a red apple", "👩🏽‍🚀", "تفاحة", "苹果", "é\n\ttab"):
        assert printable(text) == text
    assert printable("\x1b\x9b\ud800\u2028\r") == "\\x1b\\x9b\\ud800\\u2028\\r"
    value = {"a": "\x9b\u202e\ud800x"}
    assert json.loads(printable_json(json.dumps(value, ensure_ascii=False))) == value


def test_threads_are_bounded(tiny_bundle):
    for threads in (0, 1025, 2**31):
        with pytest.raises(PocketfusionError, match=f"number of threads is {threads}: choose 1 to 1024"):
            Pipeline.load(tiny_bundle, threads)
