"""docs/running-on-android.md and docs/running-on-ios.md say what the embedded bundle's manifest and files say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from ai_edge_litert.compiled_model import CompiledModel

from pocketfusion.quiet import quiet
from pocketfusion.runtime.manifest import NETWORKS, Bundle, embedded_bundle

DOCS = Path(__file__).parents[2] / "docs"
KOTLIN = DOCS.parent / "examples" / "android" / "app" / "src" / "main" / "kotlin" / "pocketfusion"
SWIFT = DOCS.parent / "examples" / "ios" / "Sources" / "Pocketfusion"
#: Of LiteRT's classes; `writeInt8` and others are there that the examples do not call.
MEMBERS = {
    "close", "createInputBuffer", "createInputBuffers", "createOutputBuffer", "createOutputBuffers", "cpuOptions",
    "getAvailableAccelerators", "getInputBufferRequirements", "gpuOptions", "readBoolean", "readFloat", "readInt",
    "readInt8", "run", "writeBoolean", "writeFloat", "writeInt", "writeInt8",
}  # fmt: skip
ANDROID = (DOCS / "running-on-android.md").read_text(encoding="utf-8")
IOS = (DOCS / "running-on-ios.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.open(embedded_bundle(), verify=False)


def _table(text: str, mark: str) -> list[list[str]]:
    """The rows of the table behind `<!-- mark -->`, without its head."""
    lines = text.split(f"<!-- {mark} -->\n", 1)[1].splitlines()
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().strip("`") for cell in line.strip("|").split("|")])
    return rows[2:]


def test_tensors_in_the_order_of_the_files(bundle: Bundle) -> None:
    expected = []
    for name in NETWORKS:
        network = getattr(bundle.manifest.networks, name)
        with quiet():
            signature = CompiledModel.from_file(str(bundle.file(name))).get_signature_by_index(0)
        for kind, names, tensors in (
            ("input", signature["inputs"], network.inputs),
            ("output", signature["outputs"], network.outputs),
        ):
            specs = {tensor.name: tensor for tensor in tensors}
            assert set(names) == set(specs)
            for index, tensor in enumerate(names):
                spec = specs[tensor]
                expected.append([f"{name}.tflite", f"{kind} {index}", tensor, spec.dtype, str(spec.shape)])
    assert _table(ANDROID, "tensors") == expected


@pytest.mark.parametrize(("page", "file"), [(ANDROID, KOTLIN / "Drawing.kt"), (IOS, SWIFT / "Drawing.swift")])
def test_the_code_is_the_examples(page: str, file: Path) -> None:
    """What is shown is what tests/port compiles and runs; every file that it needs is named beside it."""
    shown = page.split(f"<!-- {file.name} -->\n", 1)[1].split("\n", 1)[1].split("```", 1)[0]
    assert shown == file.read_text(encoding="utf-8")
    assert {other.name for other in file.parent.iterdir()} - {file.name} <= set(re.findall(r"\w+\.(?:kt|swift)", page))


#: LiteRT's public names that the examples call, as its documentation and its source at 2.3.0 spell them:
#: https://developers.google.com/edge/litert/next/android_kotlin with litert/kotlin/…/{Model,TensorBuffer}.kt,
#: litert/swift/README.md with litert/swift/Sources/LiteRT/*.swift. A name that is not here was not looked up.
KOTLIN_API = {
    "Accelerator", "Accelerator.CPU", "Accelerator.GPU", "CompiledModel", "CompiledModel.GpuOptions",
    "CompiledModel.GpuOptions.Precision.FP32", "CompiledModel.Options", "CompiledModel.create", "Environment",
    "Environment.create", "TensorBuffer", "close", "createInputBuffer", "createOutputBuffer", "gpuOptions",
    "readFloat", "run", "writeFloat", "writeInt",
}  # fmt: skip
SWIFT_API = {
    "CompiledModel", "CompiledModel(filePath:environment:options:)", "Environment", "Environment()", "Options",
    "Options()", "TensorBuffer", "createInputBuffers", "createOutputBuffers", "inputName(inputIndex:)", "read",
    "run(inputs:outputs:)", "setHardwareAccelerators", "write",
}  # fmt: skip


def test_calls_of_litert_on_android() -> None:
    code = (KOTLIN / "Drawing.kt").read_text(encoding="utf-8")
    types = set(re.findall(r"import com\.google\.ai\.edge\.litert\.(\w+)", code))
    found = types | set(re.findall(rf"\b(?:{'|'.join(types)})(?:\.\w+)+", code))
    # members of models, environments and buffers: calls on what `Network` and `Drawing` hold
    found |= set(re.findall(r"(?:model|environment|it|getValue\(input\)|first\(\)|options)\.(\w+)", code)) & MEMBERS
    assert found == KOTLIN_API


def test_calls_of_litert_on_ios() -> None:
    code = (SWIFT / "Drawing.swift").read_text(encoding="utf-8")
    found = {
        name for name in ("CompiledModel", "TensorBuffer", "Environment", "Options") if re.search(rf"\b{name}\b", code)
    }
    calls = re.findall(r"try (CompiledModel|Environment|Options)\(([^)]*)\)", code)
    for name, arguments in calls + re.findall(r"(?:model|options|buffer|outputs\[0\])\.(\w+)\(([^)]*)\)", code):
        labels = "".join(f"{label}:" for label in re.findall(r"(\w+):", arguments))
        found.add(f"{name}({labels})" if labels or name[0].isupper() else name)
    assert found == SWIFT_API


def test_order_on_ios(bundle: Bundle) -> None:
    expected = []
    for name in NETWORKS:
        network = getattr(bundle.manifest.networks, name)
        names = [", ".join(f"`{t.name}`" for t in tensors) for tensors in (network.inputs, network.outputs)]
        expected.append([f"{name}.tflite", *(cell.strip("`") for cell in names)])
    assert _table(IOS, "order") == expected


def test_scheduler_constants(bundle: Bundle) -> None:
    spec = bundle.manifest.scheduler.model_dump()
    assert dict(_table(ANDROID, "scheduler")) == {name: str(value) for name, value in spec.items()}


def test_the_formulas_give_the_runtimes_steps(bundle: Bundle) -> None:
    """What the page says of timesteps and coefficients, computed here in plain Python."""
    from pocketfusion.runtime.samplers.sampler import Sampler

    spec = bundle.manifest.scheduler
    first, last = spec.beta_start**0.5, spec.beta_end**0.5
    cumulative, product = [], 1.0
    for i in range(1000):
        product *= 1 - (first + (last - first) * i / 999) ** 2
        cumulative.append(product)
    ours = Sampler("ddim", spec)
    steps = bundle.manifest.defaults.num_inference_steps
    timesteps = [round(1000 - k * 1000 / steps) - 1 for k in range(steps)]
    assert ours.set_timesteps(steps).tolist() == timesteps
    for k, t in enumerate(timesteps):
        before = t - 1000 // steps
        now, then = cumulative[t], cumulative[before] if before >= 0 else cumulative[0]
        alpha, sigma, alpha2, sigma2 = now**0.5, (1 - now) ** 0.5, then**0.5, (1 - then) ** 0.5
        v = (alpha * alpha2 + sigma * sigma2, alpha * sigma2 - sigma * alpha2)
        assert ours.coefficients(k) == pytest.approx(v, rel=1e-9)


def test_defaults_and_tokenizer(bundle: Bundle) -> None:
    manifest = bundle.manifest
    entry = manifest.files["empty_prompt_embeds"]
    assert f"<!-- empty -->{entry.size}<" in ANDROID and f"`{entry.path}` (`files.empty_prompt_embeds`" in ANDROID
    assert f"<!-- guidance -->{manifest.defaults.guidance_scale}<" in ANDROID
    assert f"<!-- steps -->{manifest.defaults.num_inference_steps}<" in ANDROID
    said = re.sub(r"\s+", " ", ANDROID.split("<!-- tokenizer -->", 1)[1])
    spec = manifest.tokenizer
    tokenizer = json.loads(bundle.file("tokenizer").read_text(encoding="utf-8"))
    assert f"cut to {spec.max_length} tokens" in said
    assert f"`{spec.pad_token}` (id {spec.pad_token_id})" in said
    assert tokenizer["model"]["type"] == "WordPiece" and tokenizer["normalizer"]["lowercase"]
    assert f"lower-casing WordPiece of {len(tokenizer['model']['vocab'])} pieces" in said
