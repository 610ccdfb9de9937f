"""A folder's scheduler class names the bundle's sampler, with its own class's defaults."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest

from pocketfusion.errors import PocketfusionError
from pocketfusion.mobile import export as module
from pocketfusion.mobile.export import export
from pocketfusion.mobile.pipeline_specs import sampler_of, scheduler_spec
from pocketfusion.models.sampling import Sampling, write_sampling
from pocketfusion.runtime.manifest import Bundle
from pocketfusion.runtime.pipeline import Pipeline

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def made(kind: str, folder: Path, **settings: Any) -> Any:
    """diffusers' scheduler of that class as a folder's file gives it."""
    cls = getattr(diffusers, kind)
    cls(**SD, **settings).save_pretrained(folder)
    return cls.from_pretrained(folder)


@pytest.mark.parametrize(
    ("kind", "settings", "sampler"),
    [
        ("DDIMScheduler", {}, "ddim"),
        ("PNDMScheduler", {"skip_prk_steps": True}, "ddim"),
        ("UniPCMultistepScheduler", {}, "ddim"),
        ("EulerDiscreteScheduler", {}, "euler"),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, "ddim"),
        ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}, "ddim"),
        ("EulerAncestralDiscreteScheduler", {}, "euler-ancestral"),
        ("DPMSolverMultistepScheduler", {}, "dpmpp-2m"),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, "dpmpp-2m-karras"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "ddim"),
        ("DPMSolverMultistepScheduler", {"solver_order": 3}, "ddim"),
        ("DPMSolverMultistepScheduler", {"lambda_min_clipped": -5.1}, "ddim"),
        ("LCMScheduler", {}, "lcm"),
        ("LCMScheduler", {"original_inference_steps": 100}, "ddim"),
        ("TCDScheduler", {}, "tcd"),
    ],
)
def test_sampler_of_a_scheduler_class(tmp_path: Path, kind: str, settings: dict[str, Any], sampler: str) -> None:
    assert sampler_of(made(kind, tmp_path, **settings)) == sampler


def test_spec_has_the_classes_own_defaults(tmp_path: Path) -> None:
    def spec(kind: str, **settings: Any) -> dict[str, Any]:
        pipeline: Any = SimpleNamespace(scheduler=made(kind, tmp_path, **settings))
        return scheduler_spec(pipeline).model_dump()

    euler = spec("EulerDiscreteScheduler", final_sigmas_type="sigma_min", prediction_type="v_prediction")
    assert euler["timestep_spacing"] == "linspace" and euler["steps_offset"] == 0
    assert euler["final_sigmas_type"] == "sigma_min" and euler["prediction_type"] == "v_prediction"
    assert spec("DPMSolverMultistepScheduler", steps_offset=1)["steps_offset"] == 1
    assert spec("LCMScheduler")["timestep_spacing"] == "trailing"  # for DDIM: LCM's own timesteps are by no spacing
    assert spec("UniPCMultistepScheduler")["timestep_spacing"] == "leading"  # DDIM's own
    with pytest.raises(PocketfusionError, match="sets clip_sample"):
        spec("DDIMScheduler")
    with pytest.raises(PocketfusionError, match="sets thresholding"):
        spec("DPMSolverMultistepScheduler", thresholding=True)


@pytest.fixture
def same_files(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`export` copies the tiny bundle's networks instead of converting the same ones again."""

    def copy(wrapped: Any, samples: Any, file: Path, settings: Any) -> None:
        shutil.copyfile(tiny_bundle / f"{file.name.partition('-')[0]}.tflite", file)

    monkeypatch.setattr(module, "_convert_network", copy)


def use(folder: Path, kind: str, **settings: Any) -> None:
    """Gives the folder a scheduler of another class, as diffusers saves it."""
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipeline.scheduler = getattr(diffusers, kind)(**SD, prediction_type="v_prediction", **settings)
    pipeline.save_pretrained(folder)


def test_the_bundle_draws_with_the_folders_sampler(same_files: None, tiny_folder_copy: Path, tmp_path: Path) -> None:
    use(tiny_folder_copy, "EulerAncestralDiscreteScheduler", steps_offset=1)
    report = export(tiny_folder_copy, tmp_path / "b", num_inference_steps=3)
    manifest = Bundle.open(tmp_path / "b").manifest
    assert report.sampler == manifest.sampler == "euler-ancestral" and manifest.samplers is None
    pipeline = Pipeline.load(tmp_path / "b", 1)
    own, ddim, named = (pipeline.generate("cat", seed=1, sampler=name) for name in (None, "ddim", "euler-ancestral"))
    assert (own.sampler, ddim.sampler) == ("euler-ancestral", "ddim")
    pictures = [np.asarray(result.images[0]) for result in (own, ddim, named)]
    assert (pictures[0] == pictures[2]).all() and (pictures[0] != pictures[1]).any()


def test_a_student_is_drawn_with_ddim_alone(same_files: None, tiny_folder_copy: Path, tmp_path: Path) -> None:
    write_sampling(tiny_folder_copy, Sampling(num_inference_steps=2, guidance_scale=2))
    export(tiny_folder_copy, tmp_path / "b")
    assert Bundle.open(tmp_path / "b").manifest.samplers == ["ddim"]
    with pytest.raises(PocketfusionError, match="timesteps that this bundle's UNet was not taught: choose ddim$"):
        Pipeline.load(tmp_path / "b", 1).generate("cat", sampler="euler")


@pytest.mark.parametrize(
    ("kind", "options", "match"),
    [
        ("DPMSolverMultistepScheduler", {"scheduler_step": True}, "has dpmpp-2m: leave --scheduler-step out"),
        ("LCMScheduler", {"num_inference_steps": 51}, "number of steps is 51: choose 1 to 50 with lcm"),
    ],
)
def test_refused_before_any_conversion(
    tiny_folder_copy: Path, tmp_path: Path, kind: str, options: dict[str, Any], match: str
) -> None:
    use(tiny_folder_copy, kind)
    with pytest.raises(PocketfusionError, match=match):
        export(tiny_folder_copy, tmp_path / "b", **options)
    assert not (tmp_path / "b").exists()
