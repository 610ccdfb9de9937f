"""Checkpoints in one file: each becomes the folder that it was written of, or is refused by its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from ldm import ldm_state, leftovers, miniature, save
from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import read_provenance
from pocketfusion.info import describe
from pocketfusion.models.bring.importer import Changes, import_file
from pocketfusion.models.loading import load_pipeline
from pocketfusion.models.sd_configs import CONFIGS

PARTS = ("unet", "vae", "text_encoder")


@pytest.fixture(scope="session")
def sd1() -> Any:
    """Read only."""
    return miniature("sd1")


@pytest.fixture(scope="session")
def sd2() -> Any:
    """Read only."""
    return miniature("sd2", seed=1)


@pytest.fixture(scope="session")
def sd1_file(once: Callable, sd1: Any) -> Path:
    return once("sd1-file", lambda root: save(ldm_state(sd1), root / "tiny_v1.safetensors")) / "tiny_v1.safetensors"


def weights(network: Any) -> dict[str, torch.Tensor]:
    return {name.removeprefix("text_model."): value for name, value in network.state_dict().items()}


def assert_same(model: Any, pipeline: StableDiffusionPipeline, dtype: torch.dtype = torch.float32) -> None:
    for part in PARTS:
        wanted, found = weights(getattr(model, part)), weights(getattr(pipeline, part))
        assert wanted.keys() == found.keys()
        for name, value in wanted.items():
            assert torch.equal(value.to(dtype).float(), found[name].float()), (part, name)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("sd1", torch.float32), ("sd2", torch.float32), ("sd1", torch.float16), ("sd2", torch.bfloat16)],
)
def test_a_pipeline_comes_back_whole(family: str, dtype: torch.dtype, tmp_path: Path, request: Any) -> None:
    model = request.getfixturevalue(family)
    state = {name: value.to(dtype) for name, value in (ldm_state(model) | leftovers()).items()}
    file = save(state, tmp_path / "model.safetensors", {"modelspec.prediction_type": "v", "format": "pt"})
    found = import_file(file, tmp_path / "out")
    pipeline = load_pipeline(tmp_path / "out")
    assert_same(model, pipeline, dtype)
    assert describe(tmp_path / "out")["problems"] == []
    assert (found.family, found.prediction_type) == (family.replace("sd", "SD-") + ".x", "v_prediction")
    assert found.unused == ["somebody.elses"] and found.leftovers["noise schedule"] == 2
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    for part in PARTS:
        own, read = getattr(model, part).config, getattr(pipeline, part).config
        same = ["attention_head_dim", "num_attention_heads", "hidden_act", "sample_size", "cross_attention_dim"]
        for key in [key for key in same if hasattr(own, key)]:
            mine, theirs = getattr(own, key), getattr(read, key)
            assert (list(mine) if isinstance(mine, (list, tuple)) else mine) == (
                list(theirs) if isinstance(theirs, (list, tuple)) else theirs
            ), (part, key)
    if dtype == torch.float32:  # stock diffusers reads the same off the file: it is in the original layout
        torch.manual_seed(0)
        stock = StableDiffusionPipeline.from_single_file(
            str(file), config=str(tmp_path / "out"), local_files_only=True, safety_checker=None
        )
        stock_parts = ("unet", "vae") if family == "sd2" else PARTS  # it knows a 24th layer of OpenCLIP's, no third
        for part in stock_parts:
            for name, value in weights(getattr(stock, part)).items():
                assert torch.equal(value, weights(getattr(model, part))[name])


def header(changes: dict[str, Any], file: Path, metadata: dict[str, str] | None = None) -> Path:
    """A file with tensors of the names and shapes given, all zero, in fp16."""
    return save({name: torch.zeros(shape, dtype=torch.float16) for name, shape in changes.items()}, file, metadata)


IN, OUT_ = "model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.out.2.weight"
LORA = "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({"conditioner.embedders.1.model.ln_final.weight": (1,)}, "is of SDXL.*second text encoder"),
        ({"conditioner.embedders.0.model.ln_final.weight": (1,), IN: (32, 4, 3, 3)}, "is of SDXL's refiner"),
        ({"model.diffusion_model.input_blocks.4.1.transformer_blocks.1.norm1.weight": (1,)}, "is of SDXL.*in a row"),
        ({"model.diffusion_model.joint_blocks.0.x": (1,)}, "is of Stable Diffusion 3"),
        ({"double_blocks.0.img_attn.norm.key_norm.scale": (1,)}, "is of Flux"),
        ({"model.diffusion_model.label_emb.0.0.weight": (1,)}, "is of unCLIP"),
        ({IN: (32, 9, 3, 3), OUT_: (4, 32, 3, 3)}, "a model for inpainting.*takes 9 channels and gives 4"),
        ({IN: (32, 8, 3, 3), OUT_: (4, 32, 3, 3)}, "a model for InstructPix2Pix.*takes 8 channels"),
        ({IN: (32, 5, 3, 3), OUT_: (4, 32, 3, 3)}, "depth-to-image.*takes 5 channels"),
        ({LORA: (1,)}, "is a LoRA adapter, not a model .*--lora"),
        ({"unet.down_blocks.0.attentions.0.to_q.lora_A.weight": (1,)}, "is a LoRA adapter"),
        ({"lora_unet_x.hada_w1_a": (1,)}, "is a LoRA adapter"),
        ({"emb_params": (2, 768)}, "is a textual inversion, not a model .*--embedding"),
        ({"<cat-toy>": (768,)}, "is a textual inversion"),
        ({"control_model.time_embed.0.weight": (1,)}, "is a ControlNet"),
        ({"down_blocks.0.motion_modules.0.x": (1,)}, "motion module"),
        ({"first_stage_model.decoder.conv_in.weight": (1,)}, "an autoencoder .VAE. alone.*--vae"),
        ({"decoder.conv_in.weight": (1,)}, "an autoencoder .VAE. alone"),
        ({"down_blocks.0.resnets.0.conv1.weight": (1,)}, "a UNet alone, out of a model folder"),
        ({"text_model.final_layer_norm.weight": (1,)}, "a text encoder alone"),
        ({"model_ema.diffusion_modelout2weight": (1,)}, "averaged weights .model_ema. alone"),
        ({"x": (1,)}, "is no Stable Diffusion checkpoint: it has no model.diffusion_model.*begins with x"),
        ({IN: (32, 4, 3, 3), OUT_: (4, 32, 3, 3)}, "attends to no text"),
        ({IN: (32, 4, 3, 3), OUT_: (4, 32, 3, 3),
          "model.diffusion_model.input_blocks.1.1.proj_in.weight": (32, 32)}, "has no text encoder"),
    ],
)  # fmt: skip
def test_other_files_are_refused_by_name(tensors: dict, match: str, tmp_path: Path) -> None:
    file = header(tensors, tmp_path / "file.safetensors")
    with pytest.raises(PocketfusionError, match=match):
        import_file(file, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file.safetensors"]


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("model.ckpt", b"PK\x03\x04 and more", "is pickled .a torch or zip archive. and is never read"),
        ("model.ckpt", b"\x80\x02}q\x00", "is pickled and is never read"),
        ("model.safetensors", b"PK\x03\x04 a renamed one", "is pickled"),
        ("model.pt", b"anything else", "is pickled, by its name"),
        ("model.gguf", b"GGUF\x03\x00\x00\x00", "is GGUF"),
        ("model.safetensors", b"<!DOCTYPE html><html>", "is a web page"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer"),
        ("model.safetensors", b"", "truncated or not a safetensors file"),
        ("model.safetensors", (1 << 40).to_bytes(8, "little") + b"{}", "truncated or not a safetensors file"),
        ("model.safetensors", (2).to_bytes(8, "little") + b"{}", "is no Stable Diffusion checkpoint"),
    ],
)
def test_what_is_no_safetensors_file_is_told(name: str, content: bytes, match: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PocketfusionError, match=match):
        import_file(tmp_path / name, tmp_path / "out")


def cut(file: Path, state: dict[str, torch.Tensor]) -> None:
    save(state, file)
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 1000)


def lie(file: Path, state: dict[str, torch.Tensor]) -> None:
    """The header says another shape than its bytes have."""
    save(state, file)
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    said = json.loads(content[8 : 8 + length])
    said[IN]["shape"][0] *= 2
    text = json.dumps(said).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def without(name: str) -> Callable:
    return lambda file, state: save({key: value for key, value in state.items() if key != name}, file)


def changed(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable:
    return lambda file, state: save(state | {name: value(state[name])}, file)


def added(name: str) -> Callable:
    return lambda file, state: save(state | {name: torch.zeros(2)}, file)


MIDDLE = "model.diffusion_model.middle_block.0.in_layers.2.weight"
TOKENS = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (cut, "is truncated: it has"),
        (lie, "damaged header .*of shape"),
        (without(MIDDLE), "lacks the weight unet mid_block.resnets.0.conv1.weight"),
        (without("first_stage_model.decoder.mid.attn_1.k.bias"), "lacks the weight vae decoder.mid_block"),
        (without("cond_stage_model.transformer.text_model.final_layer_norm.bias"), "lacks the weight text_encoder"),
        (changed(MIDDLE, lambda value: value[:, :5]), r"unet mid_block.resnets.0.conv1.weight is \[96, 5, 3, 3\]"),
        (changed(MIDDLE, lambda value: value * float("nan")), "mid_block.resnets.0.conv1.weight holds NaN"),
        (changed(TOKENS, lambda value: value[:49000]), "embeddings of 49,000 tokens and CLIP's vocabulary 49,408"),
        (changed(MIDDLE, lambda value: value.to(torch.int8)), "is quantised .*middle_block.0.in_layers.*is I8"),
        (added("model.diffusion_model.middle_block.0.extra.weight"),
         "is of another architecture: its UNet has model.diffusion_model.middle_block.0.extra.weight"),
        (lambda file, state: save({key: one for key, one in state.items() if "first_stage" not in key}, file),
         "has no autoencoder .first_stage_model.: give one with --vae"),
        (lambda file, state: save(state | {"alphas_cumprod": torch.linspace(1, 0.5, 1000)}, file),
         "another noise schedule than Stable Diffusion's: its alphas_cumprod has 1000 steps that end at 0.5"),
    ],
)  # fmt: skip
def test_damaged_checkpoints_are_refused_by_the_tensor(damage: Callable, match: str, sd1: Any, tmp_path: Path) -> None:
    damage(tmp_path / "model.safetensors", ldm_state(sd1))
    with pytest.raises(PocketfusionError, match=match):
        import_file(tmp_path / "model.safetensors", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_disk_that_is_too_small_is_told_before(sd1_file: Path, tmp_path: Path, monkeypatch: Any) -> None:

    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**6))
    with pytest.raises(PocketfusionError, match=r"the import needs about \d+ MB of disk for .* and 1 MB are free"):
        import_file(sd1_file, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_averaged_weights_are_taken_where_the_file_has_both(sd1: Any, tmp_path: Path) -> None:
    file = save(ldm_state(sd1, ema=0.5), tmp_path / "both.safetensors")
    found = import_file(file, tmp_path / "averaged")
    import_file(file, tmp_path / "trained", Changes(ema=False))
    averaged, trained = (load_pipeline(tmp_path / name).unet.state_dict() for name in ("averaged", "trained"))
    for name, value in sd1.unet.state_dict().items():
        assert torch.equal(averaged[name], value * 0.5) and torch.equal(trained[name], value)
    assert "averaged (EMA)" in found.weights and found.unused_count == 0
    some = ldm_state(sd1, ema=0.5)
    del some["model_ema.diffusion_modelout2weight"]
    found = import_file(save(some, tmp_path / "some.safetensors"), tmp_path / "some")
    assert any("model_ema) are left out: they are not whole" in note for note in found.notes)
    assert torch.equal(load_pipeline(tmp_path / "some").unet.conv_in.weight, sd1.unet.conv_in.weight)


def test_names_of_older_files_and_8_bit_floats_are_read(sd1: Any, tmp_path: Path) -> None:
    """SD-1 files of 2022 lack `text_model.` in the text encoder's names."""
    state = {name.replace("transformer.text_model.", "transformer."): one for name, one in ldm_state(sd1).items()}
    state = {name: one.to(torch.float8_e4m3fn) if "diffusion_model" in name else one for name, one in state.items()}
    import_file(save(state, tmp_path / "old.safetensors"), tmp_path / "out")
    pipeline = load_pipeline(tmp_path / "out")
    for name, value in sd1.unet.state_dict().items():
        assert torch.equal(value.to(torch.float8_e4m3fn).float(), pipeline.unet.state_dict()[name])
    text = weights(pipeline.text_encoder)
    assert all(torch.equal(value, text[name]) for name, value in weights(sd1.text_encoder).items())


def test_the_derived_configurations_are_the_published_ones() -> None:
    """Of the true sizes, by shapes alone."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from ldm import clip_text, ldm_unet, ldm_vae, open_clip_text
    from pocketfusion.models.bring.configs import text_config, unet_config, vae_config
    from pocketfusion.recognise import Checkpoint

    for name, config in CONFIGS.items():
        with torch.device("meta"):
            unet, vae = UNet2DConditionModel(**config["unet"]), AutoencoderKL(**config["vae"])
            text = CLIPTextModel(CLIPTextConfig(**config["text_encoder"]))
            state = {f"model.diffusion_model.{key}": one for key, one in ldm_unet(unet).items()}
            state |= {f"first_stage_model.{key}": one for key, one in ldm_vae(vae).items()}
            state |= (open_clip_text if name == "sd-2.1" else clip_text)(text)
        checkpoint = Checkpoint(Path("x"), {key: {"shape": list(one.shape)} for key, one in state.items()}, {})
        for derived, part in ((unet_config(checkpoint, 64), "unet"), (vae_config(checkpoint, 64), "vae"),
                              (text_config(checkpoint), "text_encoder")):  # fmt: skip
            assert {key: derived[key] for key in config[part]} == config[part]


@pytest.mark.parametrize(
    ("metadata", "extra", "asked", "wanted"),
    [
        ({}, (), "epsilon", ("epsilon", "asked for", False)),
        ({"modelspec.prediction_type": "epsilon"}, (), "v_prediction", ("v_prediction", "asked for", False)),
        ({"modelspec.prediction_type": "epsilon"}, (), None, ("epsilon", "modelspec.prediction_type", False)),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, (), None, ("v_prediction", "architecture", False)),
        ({"modelspec.architecture": "stable-diffusion-v2-512"}, (), None, ("epsilon", "architecture", False)),
        ({"ss_v_parameterization": "True"}, (), None, ("v_prediction", "ss_v_parameterization", False)),
        ({}, ("v_pred", "ztsnr"), None, ("v_prediction", "marker v_pred", True)),
        ({"ss_zero_terminal_snr": "True"}, (), "v_prediction", ("v_prediction", "asked for", True)),
    ],
)
def test_what_an_sd2_file_predicts_is_known_by_what_it_says(
    metadata: dict, extra: tuple, asked: Any, wanted: tuple, tmp_path: Path
) -> None:
    from pocketfusion.models.bring.prediction import scheduler, stated_prediction
    from pocketfusion.recognise import recognise

    names = {IN: (32, 4, 3, 3), OUT_: (4, 32, 3, 3), "model.diffusion_model.input_blocks.1.1.proj_in.weight": (8, 8),
             "cond_stage_model.model.ln_final.weight": (1,), **dict.fromkeys(extra, (1,))}  # fmt: skip
    found = stated_prediction(recognise(header(names, tmp_path / "x.safetensors", metadata)), asked)
    assert found is not None
    assert (found.kind, found.zero_snr) == (wanted[0], wanted[2]) and wanted[1] in found.why
    config = scheduler(found).config
    assert config.prediction_type == wanted[0] and config.get("rescale_betas_zero_snr", False) == wanted[2]


def test_what_an_sd2_file_predicts_is_else_measured(sd2: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """On the embedded model's own folders, which were trained: the base predicts v."""
    from pocketfusion.models.bring import importer, prediction

    root = Path(__file__).parents[2] / "models" / "emoji"
    assert prediction.answer_to_noise(root / "base" / "unet") < prediction.V_BELOW
    file = save(ldm_state(sd2), tmp_path / "model.safetensors")
    for correlation, kind in ((0.95, "epsilon"), (0.2, "v_prediction")):
        monkeypatch.setattr(importer, "answer_to_noise", lambda folder, value=correlation: value)
        found = import_file(file, tmp_path / "out", overwrite=True)
        assert found.prediction_type == kind and f"correlates {correlation}" in found.prediction_why
        assert found.picture_size == (512 if kind == "epsilon" else 768)
    monkeypatch.setattr(importer, "answer_to_noise", lambda folder: 0.7)
    with pytest.raises(PocketfusionError, match="correlates 0.70 with it.*give --prediction-type"):
        import_file(file, tmp_path / "new")


def test_the_folder_says_where_it_came_from(sd1_file: Path, tmp_path: Path) -> None:
    import_file(sd1_file, tmp_path / "out")
    provenance = read_provenance(tmp_path / "out")
    assert provenance is not None and provenance.stage == "import"
    from hashlib import sha256

    digest = sha256(sd1_file.read_bytes()).hexdigest()
    assert provenance.parents == {"file": digest} and provenance.settings["source"]["sha256"] == digest
    licence = (tmp_path / "out" / "licences" / "checkpoint-tiny-v1.txt").read_text()
    assert "SPDX-License-Identifier: LicenseRef-unknown" in licence
