"""Embedded and folded guidance from model folder to picture: stock diffusers against the bundle on LiteRT."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from guided import RANGE, SCALE, STEPS, small_unet
from pocketfusion.errors import PocketfusionError
from pocketfusion.evaluate.comparison.compare import Asked, compare
from pocketfusion.mobile import gate, measure
from pocketfusion.mobile.export import export
from pocketfusion.models.loading import load_pipeline
from pocketfusion.models.sampling import Sampling, write_sampling
from pocketfusion.runtime.manifest import Bundle
from pocketfusion.runtime.networks import Network
from pocketfusion.runtime.pipeline import Pipeline

PROMPT = "a red apple, noto style"
KINDS = ("embedded", "folded")


@pytest.fixture
def same_files(converted: Callable[[str], None]) -> None:
    converted("embedded")


@pytest.mark.parametrize("kind", KINDS)
def test_manifest(guided: dict, kind: str) -> None:
    manifest = Bundle.open(guided[kind][1]).manifest
    written = json.loads((guided[kind][1] / "bundle.json").read_text())
    assert written["guidance"] == manifest.guidance == kind
    assert manifest.defaults.model_dump() == {"num_inference_steps": STEPS, "guidance_scale": SCALE}
    inputs = {tensor.name: tensor.shape for tensor in manifest.networks.unet.inputs}
    expected = {"sample": [1, 8, 8, 4], "timestep": [1], "encoder_hidden_states": [1, 32, 32]}
    assert inputs == (expected | {"timestep_cond": [1, 12]} if kind == "embedded" else expected)
    assert manifest.guidance_range == (RANGE if kind == "embedded" else None)
    assert manifest.networks.unet.guidance_delta == pytest.approx(1, abs=1e-3)


def test_a_bundle_of_classifier_free_guidance_says_what_it_always_said(tiny_bundle: Path) -> None:
    written = json.loads((tiny_bundle / "bundle.json").read_text())
    assert not {"guidance", "guidance_range"} & written.keys()
    assert Bundle.open(tiny_bundle).manifest.guidance == "classifier-free"


@pytest.mark.parametrize(("kind", "scale"), [("embedded", 3.0), ("embedded", 7.0), ("folded", 3.0)])
def test_runtime_draws_what_the_stock_pipeline_draws(guided: dict, kind: str, scale: float) -> None:
    """Stock diffusers passes the scale's embedding by itself, and of a folded folder is asked for no guidance."""
    folder, bundle = guided[kind]
    stock = load_pipeline(folder)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    settings: dict = {"num_inference_steps": 4, "latents": latents.clone(), "output_type": "np"}
    image = stock(PROMPT, guidance_scale=scale if kind == "embedded" else 1.0, **settings).images[0]
    other = stock(PROMPT, guidance_scale=scale + 1 if kind == "embedded" else 4.0, **settings).images[0]
    nhwc = np.ascontiguousarray(latents.permute(0, 2, 3, 1).numpy())
    result = Pipeline.load(bundle, num_threads=1).generate(
        PROMPT, num_inference_steps=4, guidance_scale=scale, latents=nhwc
    )
    drawn = np.asarray(result.images[0], np.float64)

    def psnr(expected: np.ndarray) -> float:
        return float(10 * np.log10(255**2 / max(np.mean((np.round(expected * 255) - drawn) ** 2), 1e-12)))

    assert psnr(image) > 40 and psnr(image) > psnr(other) + 6


@pytest.mark.parametrize("kind", KINDS)
def test_compare_draws_both_sides_alike(guided: dict, kind: str) -> None:
    """The original's unconditional prediction, which it never asks for, is made for the guidance delta."""
    folder, bundle = guided[kind]
    (one,) = compare(folder, [bundle], Asked([PROMPT]), threads=1).comparison.bundles
    assert one.pairs[0].psnr_db > 40 and one.guidance_scale == SCALE and one.num_inference_steps == STEPS
    assert one.guidance_delta == pytest.approx(1, abs=1e-3)
    with pytest.raises(PocketfusionError, match="has guidance 3 folded in" if kind == "folded" else "is out of range"):
        compare(folder, [bundle], Asked([PROMPT], seed=0 if kind == "folded" else -1, guidance_scale=2.0))


@pytest.mark.parametrize("kind", KINDS)
def test_one_call_a_step_and_one_text(guided: dict, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline.load(guided[kind][1], num_threads=1)
    assert pipeline.bundle.empty_prompt_embeds() is None  # no branch that would need them
    calls: list[str] = []
    run = Network.run

    def counting(network: Network) -> None:
        calls.append(f"{network.path.stem} of batch {network.spec.batch}")
        run(network)

    monkeypatch.setattr(Network, "run", counting)
    result = pipeline.generate("cat", seed=1)
    assert calls == ["text_encoder of batch 1", *["unet of batch 1"] * STEPS, "decoder of batch 1"]
    assert (result.num_inference_steps, result.guidance_scale) == (STEPS, SCALE)


def test_options_go_before_the_folders_own(guided: dict, tmp_path: Path, same_files: None) -> None:
    export(guided["embedded"][0], tmp_path / "b", num_inference_steps=2, guidance_scale=5.0)
    assert Bundle.open(tmp_path / "b").manifest.defaults.model_dump() == {
        "num_inference_steps": 2,
        "guidance_scale": 5.0,
    }


def refused(folder: Path, out: Path, match: str, **settings: Any) -> None:
    with pytest.raises(PocketfusionError, match=match):
        export(folder, out, **settings)
    assert not out.exists()


def test_another_scale_than_the_folded_one(guided: dict, tmp_path: Path) -> None:
    refused(guided["folded"][0], tmp_path / "b", r"--guidance is 4 but .*folded has 3 folded in", guidance_scale=4.0)


def test_sampling_of_another_model_or_damaged(guided: dict, tmp_path: Path) -> None:
    copy = shutil.copytree(guided["embedded"][0], tmp_path / "copy")
    write_sampling(copy, Sampling(num_inference_steps=4, guidance_scale=3.0, guidance="folded"))
    refused(copy, tmp_path / "b", "its sampling.json and its unet/ belong to different models")
    (copy / "sampling.json").write_text('{"num_inference_steps": "many"}')
    refused(copy, tmp_path / "b", "sampling.json is damaged")


def test_a_lost_scale_or_prompt_writes_nothing(
    guided: dict, tmp_path: Path, same_files: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate's second delta sees a UNet that ignores `timestep_cond`, its first one a text that says nothing."""
    original = gate.run

    def ignoring(path: Path, inputs: list, output: str, signature: str) -> Any:
        if output == "noise_pred":
            inputs = [one | {"timestep_cond": inputs[0]["timestep_cond"]} for one in inputs]
        return original(path, inputs, output, signature)

    monkeypatch.setattr(measure.gate, "check_sqnr", lambda *arguments: None)
    monkeypatch.setattr(gate, "run", ignoring)
    refused(guided["embedded"][0], tmp_path / "b", r"follow the prompt 0\.000 times")
    monkeypatch.setattr(gate, "run", original)
    real = measure.run_file

    def deaf(*arguments: Any) -> Any:
        *others, embeds = inspect.signature(real).bind(*arguments).args
        return real(*others, None if embeds is None else embeds[:1].repeat(len(embeds), 0))

    monkeypatch.setattr(measure, "run_file", deaf)
    refused(guided["embedded"][0], tmp_path / "b", r"follow the prompt 0\.000 times")


def test_guidance_delta_by_hand() -> None:
    reference = np.zeros((1, 3, 1, 2, 1), np.float32)
    reference[0, 1, 0, :, 0] = [2, 6]  # against row 0: std 2; against row 2: std 3
    reference[0, 2, 0, :, 0] = [2, 0]
    measured = reference.copy()
    measured[0, 2, 0, :, 0] = [2, 3]  # against row 2: std 1.5
    assert gate.guidance_delta(reference, measured) == pytest.approx(0.5)
    assert gate.guidance_delta(reference[:, :2], measured[:, :2]) == pytest.approx(1)
    assert gate.guidance_delta(np.zeros((1, 2, 1, 2, 1)), measured[:, :2]) is None


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"guidance": "folded"}, "guidance is folded and the UNet has timestep_cond"),
        ({"guidance": "classifier-free"}, "guidance is classifier-free and the UNet has timestep_cond"),
        ({"guidance": "telepathy"}, "guidance: Input should be"),
    ],
)
def test_a_manifest_that_contradicts_itself(guided: dict, tmp_path: Path, change: dict, match: str) -> None:
    bundle = Path(shutil.copytree(guided["embedded"][1], tmp_path / "b"))
    file = bundle / "bundle.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(PocketfusionError, match=match):
        Bundle.open(bundle)


def test_what_generate_refuses_and_warns_of(guided: dict) -> None:
    embedded, folded = (Pipeline.load(guided[kind][1], num_threads=1) for kind in KINDS)
    for pipeline, kind in ((embedded, "embedded"), (folded, "folded")):
        with pytest.raises(PocketfusionError, match=f"guidance is {kind}, so a negative prompt has no effect"):
            pipeline.generate("cat", negative_prompt="dog")
    with pytest.raises(PocketfusionError, match="guidance scale is 4, but this bundle has 3 folded in"):
        folded.generate("cat", guidance_scale=4)
    with pytest.raises(PocketfusionError, match="guidance scale is nan"):
        embedded.generate("cat", guidance_scale=float("nan"))
    far = embedded.generate("cat", guidance_scale=20, num_inference_steps=1)
    assert far.warnings == ["the guidance scale 20 is outside 1 to 8, which the UNet was taught"]
    assert embedded.generate("cat", guidance_scale=8, num_inference_steps=1).warnings == []
    assert folded.generate("cat", guidance_scale=3, num_inference_steps=1).guidance_scale == 3


def test_commands_say_which_guidance(guided: dict, tmp_path: Path) -> None:
    from pocketfusion.cli import app, commands  # noqa: F401  (registers them)

    def run(*arguments: object) -> Any:
        return CliRunner().invoke(app, [*map(str, arguments)])

    bundle, record = guided["embedded"][1], tmp_path / "j"
    drawn = run("generate", "cat", "-o", tmp_path / "a.png", "--bundle", bundle, "--json", record)
    assert drawn.exit_code == 0 and "embedded guidance 3" in drawn.output, drawn.output
    assert json.loads(record.read_text())["guidance"] == "embedded"
    refusal = run("generate", "cat", "-o", tmp_path / "b.png", "--bundle", guided["folded"][1], "--guidance", 9)
    assert isinstance(refusal.exception, PocketfusionError) and "3 folded in" in str(refusal.exception)
    assert not (tmp_path / "b.png").exists()
    for path, words in (
        (guided["embedded"][1], "embedded: one prediction a step, the scale its input, taught for 1 to 8"),
        (guided["embedded"][0], "embedded: one prediction a step, the scale its input, taught for 1 to 8"),
        (guided["folded"][0], "folded: one prediction a step, at one scale"),
    ):
        shown = run("info", path)
        assert shown.exit_code == 0 and words in shown.output and "4 steps, guidance 3" in shown.output, shown.output


def test_the_small_unets_follow_their_scale() -> None:
    """Else the tests above would pass with an input that does nothing."""
    torch.manual_seed(0)
    unet = small_unet(12)
    z, states = torch.randn(1, 4, 8, 8), torch.randn(1, 32, 32)
    with torch.no_grad():
        one, two = (unet(z, 500, states, timestep_cond=torch.full((1, 12), x)).sample for x in (0.5, -0.5))
    assert (one - two).std() > 0.01 * one.std()
