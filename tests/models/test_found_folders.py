"""Model folders as people have them: loaded whole as stock diffusers loads them, or refused by a true name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from found import (
    as_linked,
    as_old_layout,
    as_safety_checker_damaged,
    as_safety_checker_deleted,
    as_sharded,
    as_sharded_variant,
    as_variant,
    edit,
    with_other_weights_beside,
)
from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import check_folder, weight_files
from pocketfusion.info import describe
from pocketfusion.mobile.devices import TARGETS
from pocketfusion.mobile.pipeline_specs import scheduler_spec
from pocketfusion.mobile.rewrites import rewrite
from pocketfusion.mobile.wrappers import wrap
from pocketfusion.models.elastic_unet import load_elastic
from pocketfusion.models.guided import guided_prediction
from pocketfusion.models.loading import load_pipeline
from pocketfusion.models.noise_schedule import ddim_scheduler, read_ddim_scheduler
from pocketfusion.models.sampling import Sampling, usual_sampling
from pocketfusion.models.slim_autoencoder import load_vae
from pocketfusion.models.text_encoder import load_text_encoder
from pocketfusion.models.writing import copy_with_unet
from pocketfusion.recipe import TextSettings
from tiny import tiny_pipeline
from tiny_clip import LENGTH, clip_tokenizer, text_config

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="session")
def clip_folder(once: Callable) -> Path:
    """A model folder with CLIP, as SD has it. Read only."""

    def make(root: Path) -> None:
        pipeline = tiny_pipeline()
        torch.manual_seed(3)
        pipeline.register_modules(text_encoder=CLIPTextModel(text_config(32)).eval(), tokenizer=clip_tokenizer())
        pipeline.save_pretrained(root / "model", safe_serialization=True)

    return once("clip-model", make) / "model"


@pytest.fixture(scope="session")
def plain(clip_folder: Path) -> StableDiffusionPipeline:
    """Its pipeline. Read only."""
    return load_pipeline(clip_folder)


@pytest.fixture
def folder(clip_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(clip_folder, tmp_path / "model")


def same_weights(one: StableDiffusionPipeline, other: StableDiffusionPipeline) -> bool:
    return all(
        torch.equal(value, getattr(other, part).state_dict()[key])
        for part in ("unet", "vae", "text_encoder")
        for key, value in getattr(one, part).state_dict().items()
    )


@pytest.mark.parametrize(
    "change",
    [as_safety_checker_deleted, as_safety_checker_damaged, as_variant("fp16"), as_variant("non_ema"),
     with_other_weights_beside, as_sharded, as_old_layout, as_linked],
)  # fmt: skip
def test_it_loads_with_the_same_weights_and_tokens(
    plain: StableDiffusionPipeline, folder: Path, change: Callable
) -> None:
    change(folder)
    loaded = load_pipeline(folder)
    assert same_weights(plain, loaded) and loaded.safety_checker is None
    assert loaded.tokenizer("a red cat").input_ids == plain.tokenizer("a red cat").input_ids
    if change in (as_old_layout, with_other_weights_beside):  # the others' names are told apart by the same function
        described = describe(folder)
        assert described["problems"] == []
        for name, network in described["networks"].items():
            parameters = sum(p.numel() for p in getattr(plain, name).parameters())
            positions = LENGTH if change is as_old_layout and name == "text_encoder" else 0
            assert network["parameters"] == parameters + positions
    assert torch.equal(load_elastic(folder).conv_in.weight, plain.unet.conv_in.weight)
    assert torch.equal(load_vae(folder / "vae").decoder.conv_in.weight, plain.vae.decoder.conv_in.weight)


@pytest.mark.parametrize("change", [as_variant("fp16"), as_sharded_variant])
def test_a_copy_of_a_variant_loads_in_stock_diffusers(
    plain: StableDiffusionPipeline, folder: Path, tmp_path: Path, change: Callable
) -> None:
    """Beside a UNet of the usual name, which a stage writes."""
    change(folder)
    assert same_weights(plain, load_pipeline(folder))
    (tmp_path / "out").mkdir()
    copy_with_unet(folder, tmp_path / "out", load_elastic(folder), torch.float32)
    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "out", safety_checker=None)
    assert same_weights(plain, stock)


@pytest.mark.parametrize(
    ("file", "key"),
    [
        (UNET, "mid_block.attentions.0.proj_in.weight"),
        ("vae/diffusion_pytorch_model.safetensors", "decoder.conv_out.bias"),
        ("text_encoder/model.safetensors", "encoder.layers.1.mlp.fc1.weight"),
        ("text_encoder/model.safetensors", "embeddings.token_embedding.weight"),
    ],
)
def test_a_missing_weight_is_named(folder: Path, file: str, key: str) -> None:
    """The libraries fill it in at random, and what compares with the same folder cannot see it."""
    state = load_file(folder / file)
    del state[key]
    save_file(state, folder / file, {"format": "pt"})
    part = file.partition("/")[0]
    with pytest.raises(PocketfusionError, match=f"{part} lacks the weight {key}"):
        load_pipeline(folder)
    if key.startswith("decoder"):
        assert describe(folder)["problems"] == [f"{folder / part} lacks the weight {key}"]
    loaders = {
        "unet": lambda: load_elastic(folder),
        "vae": lambda: load_vae(folder / "vae"),
        "text_encoder": lambda: load_text_encoder(TextSettings(source=str(folder), max_length=LENGTH)),
    }
    with pytest.raises(PocketfusionError, match=f"lacks the weight {key}"):
        loaders[part]()


@pytest.mark.parametrize(
    ("file", "key"), [("text_encoder/model.safetensors", "encoder.layers.0.mlp.fc1.weight"), (UNET, "conv_in.weight")]
)
def test_a_weight_of_another_shape_is_refused(folder: Path, file: str, key: str) -> None:
    state = load_file(folder / file)
    state[key] = torch.zeros(3, 3)
    save_file(state, folder / file, {"format": "pt"})
    with pytest.raises(PocketfusionError, match=f"{file.partition('/')[0]}.*{key}"):
        load_pipeline(folder)


def test_variants_are_chosen_by_name(tmp_path: Path) -> None:
    names = ["model.safetensors", "model.fp16.safetensors", "model.non_ema.safetensors", "lora.safetensors"]
    wanted: list[tuple[str, str | None]] = [
        ("model.safetensors", None), ("model.fp16.safetensors", "fp16"), ("model.non_ema.safetensors", "non_ema"),
        ("lora.safetensors", None),
    ]  # fmt: skip
    for name in names:
        (tmp_path / name).touch()
    for file, variant in wanted:
        assert weight_files(tmp_path) == ([tmp_path / file], variant)
        (tmp_path / file).unlink()
    for name in ("diffusion_pytorch_model.fp16-00001-of-00002", "diffusion_pytorch_model-00002-of-00002.fp16"):
        (tmp_path / f"{name}.safetensors").touch()
    assert weight_files(tmp_path)[1] == "fp16" and len(weight_files(tmp_path)[0]) == 2


@pytest.mark.parametrize(
    ("pipeline", "parts", "match"),
    [
        ("StableDiffusionXLPipeline", {"text_encoder_2": ["transformers", "X"]}, r"is of SDXL.*text_encoder_2"),
        ("Mine", {"text_encoder_2": ["transformers", "X"]}, r"is of SDXL.*second text encoder"),
        ("StableDiffusion3Pipeline", {"transformer": ["diffusers", "X"], "unet": None,
                                      "text_encoder_2": ["transformers", "X"]}, r"Stable Diffusion 3.*transformer"),
        ("SanaPipeline", {"transformer": ["diffusers", "X"], "unet": None}, r"is of SANA.*transformer"),
        ("StableDiffusionInpaintPipeline", {}, "is of inpainting"),
        ("StableDiffusionInstructPix2PixPipeline", {}, "is of InstructPix2Pix"),
    ],
)  # fmt: skip
def test_other_families_are_refused_by_name(folder: Path, pipeline: str, parts: dict, match: str) -> None:
    edit(folder / "model_index.json", _class_name=pipeline, **parts)
    if "transformer" in parts:
        shutil.rmtree(folder / "unet")
    for refuse in (check_folder, load_pipeline, describe):
        with pytest.raises(PocketfusionError, match=match):
            refuse(folder)


@pytest.mark.parametrize(("channels", "what"), [(9, "inpainting"), (8, "InstructPix2Pix"), (7, "upscaling")])
def test_other_inputs_are_refused_by_name(folder: Path, channels: int, what: str) -> None:
    """Such UNets also come under the plain pipeline's name."""
    edit(folder / "unet" / "config.json", in_channels=channels)
    with pytest.raises(PocketfusionError, match=f"a model for {what}.*takes {channels} channels and gives 4"):
        check_folder(folder)


def test_what_is_no_folder_is_told(folder: Path, tmp_path: Path) -> None:
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1)}, tmp_path / "style.safetensors")
    save_file({"model.diffusion_model.x": torch.zeros(1)}, tmp_path / "sd15.safetensors")
    for file, match in (
        ("style", "is a LoRA adapter, not a model .*--lora"),
        ("sd15", "pocketfusion import|is no Stable Diffusion checkpoint"),
    ):
        for refuse in (check_folder, describe):
            with pytest.raises(PocketfusionError, match=match):
                refuse(tmp_path / f"{file}.safetensors")
    (folder / UNET).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3438167540\n")
    with pytest.raises(PocketfusionError, match="is a git-lfs pointer, .*git lfs pull"):
        check_folder(folder)
    (folder / "model_index.json").unlink()
    for refuse in (check_folder, describe):
        with pytest.raises(PocketfusionError, match="no model_index.json, which names its parts"):
            refuse(folder)


@pytest.mark.parametrize(
    ("part", "entry", "match"),
    [
        ("text_encoder", ["transformers", "CLIPTextModelWithProjection"], "'CLIPTextModelWithProjection': only"),
        ("text_encoder", ["os", "system"], "'system': only"),
        ("tokenizer", ["os", "system"], "names the class 'system', which is not known"),
        ("scheduler", ["os", "path"], "names the class 'path', which is not known"),
        ("tokenizer", "odd", "names the class 'None'"),
    ],
)
def test_only_the_libraries_own_classes_are_loaded(folder: Path, part: str, entry: Any, match: str) -> None:
    edit(folder / "model_index.json", **{part: entry})
    with pytest.raises(PocketfusionError, match=match):
        load_pipeline(folder)


def test_another_autoencoder_or_unet_is_refused(folder: Path) -> None:
    edit(folder / "vae" / "config.json", _class_name="AutoencoderTiny")  # which its weights are not
    with pytest.raises(PocketfusionError, match="vae lacks the weight"):
        load_pipeline(folder)
    edit(folder / "vae" / "config.json", _class_name="AutoencoderKLWan")
    with pytest.raises(PocketfusionError, match="the vae is a 'AutoencoderKLWan'"):
        load_pipeline(folder)
    edit(folder / "unet" / "config.json", _class_name="UNetMotionModel")
    with pytest.raises(PocketfusionError, match="unet is a 'UNetMotionModel'"):
        load_pipeline(folder)


EULER = {"_class_name": "EulerDiscreteScheduler"}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize(
    ("kind", "said", "wanted"),
    [
        ("EulerDiscreteScheduler", {}, {"timestep_spacing": "leading", "clip_sample": False}),
        ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}, {"timestep_spacing": "trailing"}),
        ("EulerDiscreteScheduler", {"set_alpha_to_one": False, "clip_sample": True}, {"set_alpha_to_one": True}),
        ("PNDMScheduler", {"steps_offset": 1}, {"steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}),
        ("DPMSolverMultistepScheduler", {"timestep_spacing": "linspace"}, {"timestep_spacing": "leading"}),
        ("UniPCMultistepScheduler", {"prediction_type": "v_prediction"}, {"prediction_type": "v_prediction"}),
        ("HeunDiscreteScheduler", {}, {"clip_sample": False}),
        ("DDPMScheduler", {"clip_sample": False}, {"clip_sample": False}),
        ("DDPMScheduler", {}, {"clip_sample": True}),  # its own default: the file's class does clip
        ("DDIMScheduler", {}, {"clip_sample": True, "set_alpha_to_one": True}),
        ("LCMScheduler", {"timestep_spacing": "leading"}, {"timestep_spacing": "trailing"}),
        ("PNDMScheduler", {"rescale_betas_zero_snr": True}, {"rescale_betas_zero_snr": True}),
    ],
)
def test_other_samplers_configurations(tmp_path: Path, kind: str, said: dict, wanted: dict) -> None:
    """A key that the file lacks has the default of the file's class; what is another sampler's own is left behind."""
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": kind, **BETAS, **said}))
    loaded = getattr(diffusers, kind).from_pretrained(tmp_path / "scheduler")
    for config in (ddim_scheduler(loaded).config, read_ddim_scheduler(tmp_path).config):
        assert {key: config[key] for key in wanted} == wanted
        assert {key: config[key] for key in BETAS} == BETAS
    if kind == "DDIMScheduler":
        same, stock = ddim_scheduler(loaded).config, DDIMScheduler.from_config(loaded.config).config
        assert {k: v for k, v in same.items() if k[0] != "_"} == {k: v for k, v in stock.items() if k[0] != "_"}


@pytest.mark.parametrize(
    ("kind", "said", "match"),
    [
        ("FlowMatchEulerDiscreteScheduler", {}, "flow matching"),
        ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction"}, "flow matching"),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, "flow matching"),
        ("EDMEulerScheduler", {}, "has no beta_start"),
        ("DDIMScheduler", {"clip_sample": False, "trained_betas": [0.001] * 1000}, "sets trained_betas"),
        ("EulerDiscreteScheduler", {"rescale_betas_zero_snr": True}, "sets rescale_betas_zero_snr"),
        ("DDIMScheduler", {"clip_sample": False, "thresholding": True}, "sets thresholding"),
    ],
)
def test_other_processes_are_refused(tmp_path: Path, kind: str, said: dict, match: str) -> None:
    (tmp_path / "scheduler_config.json").write_text(json.dumps({"_class_name": kind, **said}))
    scheduler = getattr(diffusers, kind).from_pretrained(tmp_path)
    with pytest.raises(PocketfusionError, match=match):
        scheduler_spec(type("Pipeline", (), {"scheduler": scheduler})())


@pytest.mark.parametrize(
    ("scheduler", "embedded", "wanted"),
    [
        ({"_class_name": "LCMScheduler"}, True, (4, 8.5, "embedded")),
        ({"_class_name": "LCMScheduler"}, False, (4, 1.0, "classifier-free")),
        ({**EULER, "timestep_spacing": "trailing"}, False, (1, 0.0, "classifier-free")),
        ({**EULER, "timestep_spacing": "linspace"}, False, (25, 4.0, "classifier-free")),
        ({"_class_name": "PNDMScheduler"}, False, (25, 4.0, "classifier-free")),
    ],
)
def test_few_step_models_have_their_own_defaults(folder: Path, scheduler: dict, embedded: bool, wanted: tuple) -> None:
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({**BETAS, **scheduler}))
    edit(folder / "unet" / "config.json", time_cond_proj_dim=256 if embedded else None)
    steps, scale, guidance = wanted
    said = usual_sampling(folder)
    assert said == Sampling(num_inference_steps=steps, guidance_scale=scale, guidance=guidance)
    (folder / "sampling.json").write_text(json.dumps({"num_inference_steps": 7, "guidance_scale": 2.0}))
    assert usual_sampling(folder).num_inference_steps == 7


@torch.no_grad()
def test_a_padding_mask_is_added_to_clips_causal_one(folder: Path) -> None:
    """With `use_attention_mask` stock diffusers passes the mask; an exported 4-D one must not let words see ahead."""
    edit(folder / "text_encoder" / "config.json", use_attention_mask=True)
    pipeline = load_pipeline(folder)
    tokens = pipeline.tokenizer("a red cat", padding="max_length", return_tensors="pt")
    given = tokens.input_ids.int(), tokens.attention_mask.int()
    ours = wrap(pipeline)["text_encoder"](*given)["prompt_embeds"]
    for target in ("litert-cpu", "litert-gpu"):
        rewritten, _ = rewrite(wrap(pipeline)["text_encoder"], TARGETS[target])
        torch.testing.assert_close(rewritten(*given)["prompt_embeds"], ours, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours, pipeline.encode_prompt("a red cat", "cpu", 1, False)[0], atol=1e-5, rtol=1e-5)
    edit(folder / "text_encoder" / "config.json", use_attention_mask=False)
    plain = load_pipeline(folder)
    unmasked = wrap(plain)["text_encoder"](*given)["prompt_embeds"]
    torch.testing.assert_close(unmasked, plain.encode_prompt("a red cat", "cpu", 1, False)[0], atol=1e-5, rtol=1e-5)
    assert not np.allclose(ours, unmasked, atol=1e-3)


@torch.no_grad()
def test_a_scale_up_to_one_draws_the_prompt_alone(plain: StableDiffusionPipeline) -> None:
    """As in stock diffusers, where 0 is how Turbo is drawn."""
    z, states, null = torch.randn(4, 4, 8, 8), torch.randn(4, 7, 32), torch.randn(7, 32)
    scales = torch.tensor([0.0, 0.5, 1.0, 3.0])
    drawn = guided_prediction(plain.unet, z, torch.tensor(300), states, null, scales)
    alone = plain.unet(z, 300, states).sample
    torch.testing.assert_close(drawn[:3], alone[:3], atol=1e-5, rtol=1e-5)
    empty = plain.unet(z[3:], 300, null[None]).sample
    torch.testing.assert_close(drawn[3:], empty + 3 * (alone[3:] - empty), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("text_encoder", "num_hidden_layers", 10**9),
        ("text_encoder", "hidden_size", 10**9),
        ("unet", "layers_per_block", 10**8),
        ("vae", "block_out_channels", [8, 10**9]),
    ],
)
def test_a_config_of_a_far_larger_network_is_refused_before_that_is_built(folder, part, key, value):
    file = folder / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(PocketfusionError, match=f"says {key} 10+, and the weights beside it are of a smaller"):
        load_pipeline(folder)
