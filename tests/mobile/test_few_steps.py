"""LCM and Turbo folders and few-step adapters: what `export` makes of them, against stock diffusers step by step."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from adapters import ATTENTION, merged, module, random_layers, save_kohya, save_lora_linear, save_peft
from diffusers import LatentConsistencyModelPipeline
from typer.testing import CliRunner

from pocketfusion.errors import PocketfusionError
from pocketfusion.mobile.export import ExportReport, export
from pocketfusion.mobile.export_settings import ExportSettings
from pocketfusion.models.loading import load_pipeline
from pocketfusion.models.sampling import Sampling, write_sampling
from pocketfusion.runtime.denoise import NoiseStream
from pocketfusion.runtime.manifest import Bundle
from pocketfusion.runtime.pipeline import Pipeline

PROMPT = "a red apple"
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "epsilon"}
#: As the published folders have them: LCM_Dreamshaper_v7's, sd-turbo's and SD 1.5's.
LCM = BETAS | {"clip_sample": False, "original_inference_steps": 50, "set_alpha_to_one": True, "steps_offset": 0}
TURBO = BETAS | {"timestep_spacing": "trailing", "steps_offset": 1, "final_sigmas_type": "zero"}
PNDM = BETAS | {"skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1}
LAYERS = (f"{ATTENTION}.to_q", f"{ATTENTION}.to_out.0", "unet.up_blocks.1.resnets.0.conv1")


def found(source: Path, path: Path, kind: str, settings: dict[str, Any], family: str = "StableDiffusion") -> Path:
    """A copy of the folder as one finds it: another scheduler's file, nothing that this project adds."""
    shutil.copytree(source, path)
    (path / "sampling.json").unlink()
    getattr(diffusers, kind)(**settings).save_pretrained(path / "scheduler")
    index = json.loads((path / "model_index.json").read_text())
    index |= {"_class_name": f"{family}Pipeline", "scheduler": ["diffusers", kind]}
    (path / "model_index.json").write_text(json.dumps(index))
    return path


def stock(pipeline: Any, patch: pytest.MonkeyPatch, **settings: Any) -> list[np.ndarray]:
    """The latents after every step of a stock pipeline that is given the runtime's noise of seed 3, NHWC."""
    stream, after = NoiseStream(3, 8, 8, 4), []
    library = __import__(type(pipeline.scheduler).__module__, fromlist=["randn_tensor"])

    def noise(*_: Any, **__: Any) -> torch.Tensor:
        return torch.from_numpy(stream.draw()[None]).permute(0, 3, 1, 2)

    patch.setattr(library, "randn_tensor", noise, raising=False)

    def keep(_: Any, step: int, t: Any, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        scale, scheduler = 1.0, pipeline.scheduler
        if "Euler" in type(scheduler).__name__:  # its latents have x_0 at weight 1, but the last ones
            scale = float(scheduler.sigmas[step + 1] ** 2 + 1) ** 0.5
        after.append(values["latents"].permute(0, 2, 3, 1).numpy() / scale)
        return values

    pipeline.set_progress_bar_config(disable=True)
    pipeline(PROMPT, latents=noise(), output_type="latent", callback_on_step_end=keep, **settings)
    return after


def ours(bundle: Path, **settings: Any) -> list[np.ndarray]:
    """The latents after every step of the bundle, drawn as it says itself but for `settings`."""
    seen: list[np.ndarray] = []
    pipeline = Pipeline.load(bundle, num_threads=1)
    pipeline.generate(PROMPT, seed=3, callback=lambda k, t, z: seen.append(z.copy()), **settings)
    pipeline.close()
    return seen


def check(seen: list[np.ndarray], expected: list[np.ndarray]) -> None:
    assert len(seen) == len(expected)
    for one, other in zip(seen, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4 * np.abs(other).max())


def test_an_lcm_folder_is_drawn_as_its_stock_pipeline_does(
    guided: dict, tmp_path: Path, converted: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LCM's own form: the guidance scale is an input of the UNet, at diffusers' 8.5, in 4 steps of LCM's sampler."""
    folder = found(guided["embedded"][0], tmp_path / "lcm", "LCMScheduler", LCM, "LatentConsistencyModel")
    converted("embedded")
    export(folder, tmp_path / "b")
    manifest = Bundle.open(tmp_path / "b").manifest
    assert (manifest.sampler, manifest.guidance, manifest.guidance_range) == ("lcm", "embedded", None)
    assert manifest.defaults.model_dump() == {"num_inference_steps": 4, "guidance_scale": 8.5}
    parts = load_pipeline(folder).components | {"requires_safety_checker": False}
    pipeline = LatentConsistencyModelPipeline(**parts)
    default = ours(tmp_path / "b")
    check(default, stock(pipeline, monkeypatch))
    for steps, scale in ((1, 8.5), (8, 1.0)):
        seen = ours(tmp_path / "b", num_inference_steps=steps, guidance_scale=scale)
        check(seen, stock(pipeline, monkeypatch, num_inference_steps=steps, guidance_scale=scale))
    unguided = ours(tmp_path / "b", guidance_scale=1.0)
    assert np.abs(unguided[-1] - default[-1]).max() > 0.01 * np.abs(default[-1]).max()  # the scale is heard


def test_a_turbo_folder_is_drawn_as_the_stock_pipeline_does(
    guided: dict, tmp_path: Path, converted: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = found(guided["folded"][0], tmp_path / "turbo", "EulerDiscreteScheduler", TURBO)
    converted("folded")
    export(folder, tmp_path / "b")
    manifest = Bundle.open(tmp_path / "b").manifest
    assert (manifest.sampler, manifest.guidance, manifest.networks.unet.batch) == ("euler", "classifier-free", 1)
    assert manifest.defaults.model_dump() == {"num_inference_steps": 1, "guidance_scale": 0.0}
    pipeline = load_pipeline(folder)
    check(ours(tmp_path / "b"), stock(pipeline, monkeypatch, num_inference_steps=1, guidance_scale=0.0))
    seen = ours(tmp_path / "b", num_inference_steps=4)
    check(seen, stock(pipeline, monkeypatch, num_inference_steps=4, guidance_scale=0.0))
    others = ours(tmp_path / "b", num_inference_steps=4, guidance_scale=3.0)  # which it can still be asked for
    check(others, stock(pipeline, monkeypatch, num_inference_steps=4, guidance_scale=3.0))


@pytest.mark.parametrize(
    ("method", "save", "kind", "given"),
    [
        ("lcm", save_kohya, "LCMScheduler", {}),
        ("hyper", save_peft, "DDIMScheduler", {}),
        ("tcd", save_lora_linear, "TCDScheduler", {"eta": 0.3}),
        ("lightning", save_kohya, "EulerDiscreteScheduler", {}),
    ],
)
def test_a_merged_adapter_is_drawn_with_its_methods_settings(
    guided: dict, tmp_path: Path, converted: Callable, monkeypatch: pytest.MonkeyPatch, method: str, save: Callable,
    kind: str, given: dict[str, Any],
) -> None:  # fmt: skip
    """The base is the guided folder's UNet without the adapter, which brings back the one that was converted; stock
    diffusers draws that by its model cards' words: `from_config` with `trailing` spacing, guidance 0, 4 steps."""
    base = found(guided["folded"][0], tmp_path / "base", "PNDMScheduler", PNDM)
    whole = load_pipeline(guided["folded"][0])
    pipeline = load_pipeline(base)
    layers = random_layers(pipeline, LAYERS, alpha=4.0 if save is save_kohya else None)  # the others keep none
    for name, weight in merged(pipeline, layers, scale=-1.0).items():
        module(pipeline, name).weight.data.copy_(weight)
    pipeline.unet.save_pretrained(base / "unet")
    converted("folded")
    report = export(base, tmp_path / "b", few_steps=method, lora=((save(layers, tmp_path / "a.safetensors"), 1.0),))
    manifest = Bundle.open(tmp_path / "b").manifest
    assert manifest.defaults.model_dump() == {"num_inference_steps": 4, "guidance_scale": 1.0}
    assert (report.sampler, report.num_inference_steps, report.guidance_scale) == (manifest.sampler, 4, 1.0)
    assert manifest.networks.unet.batch == 1 and manifest.provenance["few_steps"] == method
    cls = getattr(diffusers, kind)
    said = pipeline.scheduler.config
    # SD 1.5's own file says so; `from_config` would fill in that DDIM clips
    whole.scheduler = cls.from_config(said, timestep_spacing="trailing", clip_sample=False)
    expected = stock(whole, monkeypatch, num_inference_steps=4, guidance_scale=0, **given)
    check(ours(tmp_path / "b"), expected)


@pytest.fixture(scope="module")
def plain(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny folder with SD 1.5's scheduler."""
    folder = shutil.copytree(tiny_folder, tmp_path_factory.mktemp("plain") / "model")
    write_sampling(folder, Sampling(num_inference_steps=1, guidance_scale=1))
    return found(folder, folder.with_name("found"), "PNDMScheduler", PNDM)


def drawn(folder: Path, **options: Any) -> tuple[Any, ...]:
    """Sampler, spacing, eta, steps and guidance of an export with these options; nothing is converted."""
    settings = ExportSettings(**options)
    defaults = settings.defaults(folder, settings.sampling(folder))
    sampler, spec = settings.drawn_with(folder, load_pipeline(folder), defaults.num_inference_steps)
    return sampler, spec.timestep_spacing, spec.eta, *defaults.model_dump().values()


def adapter(name: str) -> tuple[tuple[Path, float], ...]:
    return ((Path(f"{name}.safetensors"), 1.0),)


def test_a_methods_settings(plain: Path) -> None:
    assert drawn(plain) == ("ddim", "leading", 0.3, 25, 4.0)
    assert drawn(plain, few_steps="lcm") == ("lcm", "trailing", 0.3, 4, 1.0)
    assert drawn(plain, few_steps="lightning") == ("euler", "trailing", 0.3, 4, 1.0)
    eight = adapter("Hyper-SD15-8steps-CFG-lora")
    assert drawn(plain, few_steps="hyper", lora=eight) == ("ddim", "trailing", 0.3, 8, 5.0)
    assert drawn(plain, few_steps="hyper", lora=eight, guidance_scale=7.5) == ("ddim", "trailing", 0.3, 8, 7.5)
    assert drawn(plain, few_steps="hyper", sampler="tcd") == ("tcd", "trailing", 1.0, 4, 1.0)
    assert drawn(plain, few_steps="tcd", eta=0.8, num_inference_steps=6) == ("tcd", "trailing", 0.8, 6, 1.0)


def test_a_sampler_by_name_keeps_the_folders_schedule(plain: Path) -> None:
    assert drawn(plain, sampler="dpmpp-2m-karras") == ("dpmpp-2m-karras", "leading", 0.3, 25, 4.0)
    assert drawn(plain, sampler="tcd", eta=0.0, num_inference_steps=5) == ("tcd", "leading", 0.0, 5, 4.0)


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("Hyper-SD15-2steps-lora", 2),
        ("sd15_lightning_8step_lora", 8),
        ("tcd 1-step", 1),
        ("style-2000steps", 4),
        ("style_25_steps", 4),
        ("footsteps", 4),
        ("0steps", 4),
    ],
)
def test_an_adapters_name_says_its_steps(plain: Path, name: str, steps: int) -> None:
    settings = ExportSettings(few_steps="hyper", lora=adapter(name))
    assert settings.sampling(plain).num_inference_steps == steps


def refused(folder: Path, out: Path, match: str, **options: Any) -> None:
    with pytest.raises(PocketfusionError, match=match):
        export(folder, out, **options)
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"few_steps": "lmc"}, "--few-steps has no 'lmc': choose lcm, hyper, tcd, lightning$"),
        ({"sampler": "dpm-2m"}, "--sampler has no 'dpm-2m': choose ddim, "),
        (
            {"few_steps": "lcm", "sampler": "euler"},
            "lcm is drawn with lcm and --sampler is euler: leave --sampler out",
        ),
        ({"few_steps": "hyper", "sampler": "euler"}, "hyper is drawn with ddim or tcd and --sampler is euler"),
        ({"few_steps": "lcm", "guidance_scale": 7.5}, "--guidance is 7.5, but adapters of lcm .* above 2: leave"),
        ({"few_steps": "lcm", "num_inference_steps": 51}, "number of steps is 51: choose 1 to 50 with lcm"),
        ({"few_steps": "lcm", "eta": 0.5}, "eta is 0.5, but the sampler is lcm: it is of tcd"),
        ({"few_steps": "tcd", "eta": 1.5}, "eta is 1.5: choose 0"),
        ({"sampler": "lcm"}, "number of steps is 60: choose 1 to 50 with lcm"),
        ({"sampler": "dpmpp-2m", "scheduler_step": True}, "--sampler is dpmpp-2m: leave --scheduler-step out"),
    ],
)
def test_refused_before_any_conversion(plain: Path, tmp_path: Path, options: dict[str, Any], match: str) -> None:
    steps = {"num_inference_steps": 60} if options == {"sampler": "lcm"} else {}
    refused(plain, tmp_path / "b", match, **options, **steps)


def test_two_adapters_of_different_steps_are_refused(plain: Path) -> None:
    settings = ExportSettings(few_steps="hyper", lora=(*adapter("a-4steps"), *adapter("b-8steps")))
    with pytest.raises(PocketfusionError, match="names say 4 and 8 steps: give one of them alone"):
        settings.sampling(plain)


def test_folders_that_have_few_steps_of_their_own(guided: dict, tmp_path: Path, tiny_folder_copy: Path) -> None:
    write_sampling(tiny_folder_copy, Sampling(num_inference_steps=8, guidance_scale=2))
    refused(tiny_folder_copy, tmp_path / "b", "was distilled to 8 steps of its own.*leave", few_steps="lightning")
    refused(tiny_folder_copy, tmp_path / "b", "--sampler is euler, but .* its own DDIM steps alone", sampler="euler")
    folder = found(guided["embedded"][0], tmp_path / "lcm", "LCMScheduler", LCM)
    refused(folder, tmp_path / "b", "guidance scale as an input.* in 4 steps as it is: leave", few_steps="lcm")


def test_an_adapter_of_another_base_is_refused(plain: Path, tmp_path: Path) -> None:
    layers = random_layers(load_pipeline(plain), (f"{ATTENTION}.to_q",))
    up = layers[f"{ATTENTION}.to_q"].up.repeat(2, 1)
    file = save_kohya({f"{ATTENTION}.to_q": layers[f"{ATTENTION}.to_q"]._replace(up=up)}, tmp_path / "x.safetensors")
    refused(plain, tmp_path / "b", "is a LoRA of another base", few_steps="lcm", lora=((file, 1.0),))


def test_the_command(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pocketfusion.cli import app, export_commands
    from pocketfusion.mobile import export as exporter
    from pocketfusion.mobile import outlook

    def prepare(folder: Path, out: Path, given: dict[str, Any], *rest: Any) -> Any:
        return SimpleNamespace(options=given, settings=None, check=lambda out: None)

    def export(folder: Path, out: Path, **options: Any) -> ExportReport:
        asked.update(options)
        return ExportReport(str(out), 1, [], 1, sampler="tcd", num_inference_steps=1, guidance_scale=1.0)

    asked: dict[str, Any] = {}
    monkeypatch.setattr(outlook, "prepare", prepare)
    monkeypatch.setattr(exporter, "export", export)
    for name in ("show", "show_next"):
        monkeypatch.setattr(export_commands, name, lambda *rest: None)
    given = ("--few-steps", "hyper", "--sampler", "tcd", "--eta", "0.9", "--lora", "x.safetensors")
    result = CliRunner().invoke(app, ["export", str(plain), str(tmp_path / "b"), *given])
    assert result.exit_code == 0, result.output
    assert "sampler tcd, 1 step, guidance 1;" in " ".join(result.output.split())
    assert (asked["few_steps"], asked["sampler"], asked["eta"]) == ("hyper", "tcd", 0.9)
