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
    assert f"<!-- empty -->{entry.size}<" in ANDROID and f'open("{entry.path}")' in ANDROID
    assert f"<!-- guidance -->{manifest.defaults.guidance_scale}<" in ANDROID
    assert f"<!-- steps -->{manifest.defaults.num_inference_steps}<" in ANDROID
    said = re.sub(r"\s+", " ", ANDROID.split("<!-- tokenizer -->", 1)[1])
    spec = manifest.tokenizer
    tokenizer = json.loads(bundle.file("tokenizer").read_text(encoding="utf-8"))
    assert f"cut to {spec.max_length} tokens" in said
    assert f"`{spec.pad_token}` (id {spec.pad_token_id})" in said
    assert tokenizer["model"]["type"] == "WordPiece" and tokenizer["normalizer"]["lowercase"]
    assert f"lower-casing WordPiece of {len(tokenizer['model']['vocab'])} pieces" in said
