"""`pocketfusion compare`: stock diffusers beside bundles, what is measured, the page, and what is refused."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from pocketfusion.errors import PocketfusionError
from pocketfusion.evaluate.comparison.compare import Asked, check_match, compare
from pocketfusion.evaluate.comparison.stock import Drawing, Stock
from pocketfusion.evaluate.prompts import BUILT_IN, read_prompts
from pocketfusion.likeness import EQUAL, psnr, ssim
from pocketfusion.mobile.gate import guidance_delta
from pocketfusion.runtime.manifest import Bundle
from pocketfusion.runtime.pipeline import Pipeline
from pocketfusion.runtime.specs import SAMPLERS

PROMPTS = ["a red apple", "", "a dog left of a <b>tree</b>"]


@pytest.fixture(scope="module")
def stock(tiny_folder) -> Stock:
    return Stock(tiny_folder)


@pytest.fixture
def edited(tiny_bundle, tmp_path):
    """A copy of the tiny bundle with a changed manifest."""

    def apply(change) -> Bundle:
        copy = shutil.copytree(tiny_bundle, tmp_path / "edited")
        file = copy / "bundle.json"
        manifest = json.loads(file.read_text())
        change(manifest, copy)
        file.write_text(json.dumps(manifest))
        return Bundle.open(copy, verify=False)

    return apply


def drawing(bundle: Path, sampler: str = "ddim", steps: int = 3, scale: float = 2.0) -> Drawing:
    return Asked(PROMPTS, 0, sampler, steps, scale).drawing(Bundle.open(bundle))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_both_sides_draw_the_same_with_every_sampler(stock, tiny_bundle, sampler):
    """From picture to latents of each step: a lost noise, spacing or end would show."""
    settings = drawing(tiny_bundle, sampler)
    drawn = stock.draw("a red apple", 7, settings)
    latents: list[np.ndarray] = []
    ours = Pipeline.load(tiny_bundle, 1).generate(
        "a red apple",
        seed=7,
        num_inference_steps=3,
        guidance_scale=2.0,
        sampler=sampler,
        callback=lambda k, t, values: latents.append(values),
    )
    assert psnr(drawn.image, np.asarray(ours.images[0])) > 45
    assert len(drawn.latents) == 3 and [probe.timestep for probe in drawn.probes] == sorted(
        (probe.timestep for probe in drawn.probes), reverse=True
    )
    for theirs, own in zip(drawn.latents, latents, strict=True):
        np.testing.assert_allclose(own, theirs, atol=2e-3)


def test_the_original_is_what_diffusers_loads_and_draws_by_itself(stock, tiny_folder, tiny_bundle):
    plain = StableDiffusionPipeline.from_pretrained(tiny_folder, local_files_only=True)
    plain.set_progress_bar_config(disable=True)
    noise = torch.from_numpy(Pipeline.load(tiny_bundle, 1).noise(7)).permute(0, 3, 1, 2)
    picture = plain("a red apple", latents=noise, num_inference_steps=3, guidance_scale=2.0).images[0]
    different = stock.draw("a red apple", 7, drawing(tiny_bundle)).image != np.asarray(picture)
    assert different.mean() < 1e-3  # of the last bit


def test_probes_are_the_networks_own_predictions(stock, tiny_bundle):
    """With guidance and without, when the unconditional prediction has to be asked for."""
    both = [stock.draw("a red apple", 7, drawing(tiny_bundle, scale=scale)).probes[0] for scale in (2.0, 1.0)]
    for probe in both:
        sample = torch.from_numpy(probe.latents).permute(0, 3, 1, 2)
        states = torch.cat([stock.encode(""), stock.encode("a red apple")])
        expected = stock.pipeline.unet(sample.expand(2, -1, -1, -1), probe.timestep, states).sample
        np.testing.assert_allclose(probe.predictions, expected.detach().permute(0, 2, 3, 1), atol=1e-5)
    np.testing.assert_allclose(both[0].predictions, both[1].predictions, atol=1e-5)


def test_likeness_by_hand():
    grey = np.full((16, 16, 3), 100, np.uint8)
    assert psnr(grey, grey) == EQUAL and ssim(grey, grey) == 1
    assert psnr(grey, grey + 10) == pytest.approx(20 * np.log10(255 / 10))  # its mean square error is 100
    # flat pictures: (2 a b + c1) / (a^2 + b^2 + c1)
    assert ssim(grey, grey + 10) == pytest.approx((2 * 11000 + 6.5025) / (10000 + 12100 + 6.5025))
    one = np.stack([np.zeros((2, 2, 1)), np.array([[[1.0], [-1.0]], [[1.0], [-1.0]]])])
    assert guidance_delta(np.stack([one, one]), np.stack([one, 2 * one])) == pytest.approx(np.sqrt(2.5))
    assert guidance_delta(np.zeros_like(one)[None], one[None]) is None


def test_ssim_is_torchmetrics():
    from torchmetrics.functional.image import structural_similarity_index_measure

    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (40, 32, 3), dtype=np.uint8)
    b = np.clip(a + rng.normal(0, 30, a.shape), 0, 255).astype(np.uint8)
    x, y = (torch.from_numpy(v.astype(np.float64)).permute(2, 0, 1)[None] for v in (a, b))
    a, b = (np.pad(v, ((5, 5), (5, 5), (0, 0)), mode="reflect") for v in (a, b))  # as it does with borders
    assert ssim(a, b) == pytest.approx(float(structural_similarity_index_measure(x, y, data_range=255.0)), abs=1e-6)


def test_the_command(pocketfusion, tiny_folder, tiny_bundle, judge, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(["a red apple", "", "a dog left of a <b>tree</b>", "more"]))
    out = tmp_path / "report.html"
    code, printed, _ = pocketfusion(
        *("compare", tiny_folder, tiny_bundle, "--prompts", tmp_path / "prompts.txt", "--count", 2, "--out", out),
        *("--steps", 2, "--guidance", 3, "--seed", 5, "--judge", judge, "--min-psnr", 30, "--threads", 1),
    )
    assert code == 0 and "worst is" in printed and "our judge" in printed
    result = json.loads(out.with_suffix(".json").read_text())
    (one,) = result["bundles"]
    assert one["passed"] and one["exported_from"] == "this folder" and one["num_inference_steps"] == 2
    assert one["guidance_delta"] == pytest.approx(1, abs=1e-2)
    levels = [pair["psnr_db"] for pair in one["pairs"]]
    assert levels == sorted(levels) and one["psnr_db"]["worst"] == pytest.approx(levels[0], abs=0.01)
    assert {pair["seed"] for pair in one["pairs"]} == {5, 6}
    assert set(one["pairs"][0]["scores"]) == {"CLIP score by our judge"} and len(one["latents_sqnr_db"]) == 2
    page = out.read_text()
    assert page.count("data:image/png;base64,") == 6 and "&lt;b&gt;tree" in page and "<b>tree" not in page
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", page) and "url(" not in page and "@import" not in page
    assert all(re.findall(r'<img alt="[^"]+"', page)) and 'name="viewport"' in page


def test_below_the_threshold_the_code_is_one_and_the_prompt_is_named(pocketfusion, tiny_folder, tiny_bundle, tmp_path):
    """A bundle of weights that are not the folder's."""
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    from safetensors.torch import load_file, save_file

    file = next((other / "unet").glob("*.safetensors"))
    torch.manual_seed(0)
    weights = {key: value + 0.2 * torch.randn_like(value) for key, value in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    out = tmp_path / "report.html"
    code, printed, _ = pocketfusion(
        *("compare", other, tiny_bundle, "--count", 2, "--steps", 2, "--out", out, "--min-psnr", 40, "--threads", 1)
    )
    assert code == 1 and "2 of 2 prompts are below 40 dB, the worst 'a " in printed
    assert "was exported from another folder" in printed
    assert "not every pair reaches" in out.read_text()


def test_several_bundles_of_the_same_settings_share_the_original(tiny_folder, tiny_bundle, monkeypatch):
    drawn: list[str] = []
    own = Stock.draw
    monkeypatch.setattr(Stock, "draw", lambda self, prompt, *more: drawn.append(prompt) or own(self, prompt, *more))
    asked = Asked(PROMPTS[:2], num_inference_steps=1)
    outcome = compare(tiny_folder, [tiny_bundle, tiny_bundle], asked, threads=1)
    assert drawn == PROMPTS[:2] and len(outcome.pictures) == 2
    first, second = outcome.comparison.bundles
    assert first.pairs == second.pairs
    assert {pair.prompt: pair.guidance_delta is None for pair in first.pairs} == {"a red apple": False, "": True}


def of_another_text(manifest, copy):
    words = json.loads((copy / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["red"], vocabulary["dog"] = vocabulary["dog"], vocabulary["red"]
    (copy / "tokenizer.json").write_text(json.dumps(words))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m, _: m["scheduler"].update(prediction_type="epsilon"),
            "prediction_type is epsilon, the folder's v_pred",
        ),
        (lambda m, _: m["scheduler"].update(beta_end=0.02), "beta_end is 0.02, the folder's 0.012"),
        (of_another_text, "tokenizer reads the prompts as other tokens"),
    ],
)
def test_another_models_bundle_is_refused(stock, edited, change, message):
    with pytest.raises(PocketfusionError, match=f"is another model's bundle: its {message}"):
        check_match(stock, edited(change), PROMPTS)


def test_another_text_encoder_or_latents_are_refused(stock, tiny_bundle, monkeypatch):
    bundle = Bundle.open(tiny_bundle)
    check_match(stock, bundle, PROMPTS)
    monkeypatch.setattr(Pipeline, "encode", lambda self, text: np.ones((1, 32, 32), np.float32))
    with pytest.raises(PocketfusionError, match="text encoder gives other states"):
        check_match(stock, bundle, PROMPTS)
    monkeypatch.setattr(Stock, "pixels", 4)
    with pytest.raises(PocketfusionError, match="decoder makes 8 pixels of a latent, the folder's 4"):
        check_match(stock, bundle, PROMPTS)
    bundle.manifest.latents.channels = 16
    with pytest.raises(PocketfusionError, match="latents have 16 channels, the folder's 4"):
        check_match(stock, bundle, PROMPTS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--out", "report.txt"), "give it a name that ends in .html"),
        (("--out", "missing/report.html"), "does not exist"),
        (("--out", "r.html", "--prompts", "nothing.txt"), "nothing.txt cannot be opened"),
        (("--out", "r.html", "--count", "0"), "--count 0 is out of range"),
        (("--out", "r.html", "--seed", "-1"), "--seed -1 is out of range"),
        (("--out", "r.html", "--sampler", "magic"), "the sampler 'magic' is not known"),
        (("--out", "r.html", "--steps", "0"), "the number of steps is 0"),
        (("--out", "r.html", "--threads", "0"), "the number of threads is 0"),
        (("--out", "r.html", "--clip", "nothing"), "there is no CLIP model at nothing"),
    ],
)
def test_wrong_use_is_two_and_writes_nothing(
    pocketfusion, tiny_folder, tiny_bundle, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    code, _, said = pocketfusion("compare", tiny_folder, tiny_bundle, *arguments)
    assert code == 2 and message in said and "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_prompts_are_lines_or_json_lines(tmp_path, monkeypatch):
    file = tmp_path / "prompts"
    file.write_text("a red apple\r\n\n  ein grünes Herz \n", encoding="utf-8-sig")
    assert read_prompts(str(file)) == ["a red apple", "ein grünes Herz"] and read_prompts(str(file), 1) == [
        "a red apple"
    ]
    file.write_text('{"prompt": "a\\nb", "id": 3}\n"c"\n')
    assert read_prompts(str(file)) == ["a\nb", "c"]
    assert read_prompts(None) == list(BUILT_IN) and len(set(BUILT_IN)) == len(BUILT_IN)
    for content, message in ((b"\n \n", "has no prompts"), (b'"a"\n{}', "line 2 holds no prompt"), (b"\xff", "UTF-8")):
        file.write_bytes(content)
        with pytest.raises(PocketfusionError, match=message):
            read_prompts(str(file))

    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"from a pipe")))
    assert read_prompts("-") == ["from a pipe"]
