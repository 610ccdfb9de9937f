"""What people bring: each kind of folder and file, built, and what is to come of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import StableDiffusionPipeline
from menagerie import BETAS, autoencoder, pipeline, save, scheduler, text_encoder, tiny_autoencoder, unet
from safetensors.torch import load_file, save_file

from found import (
    as_linked,
    as_old_layout,
    as_safety_checker_deleted,
    as_sharded,
    as_variant,
    edit,
    with_other_weights_beside,
)
from ldm import ldm_state, leftovers
from ldm import save as save_file_of

#: A bundle's pictures against stock diffusers', PSNR in dB.
LEAST_DB = 60
UNET = "unet/diffusion_pytorch_model.safetensors"
PICTURE = {"modelspec.resolution": "32x32"}


@dataclass(frozen=True)
class Member:
    """`build` fills a new folder and returns the path that a user would give, and the stock pipeline that draws the
    same. `refused`: what the one sentence says, where nothing is drawn."""

    name: str
    build: Callable[[Path], tuple[Path, StableDiffusionPipeline | None]]
    refused: str | None = None
    int8: bool = False  #: exported so too in the quick run
    slow: bool = False  #: only in the slow run


def folder(change: Callable[[Path], None] | None = None, family: str = "sd1", **parts: Callable[[], Any]) -> Callable:
    """A folder of the family with other parts, changed; stock diffusers loads it as it was before."""

    def build(root: Path) -> tuple[Path, StableDiffusionPipeline]:
        made = pipeline(family, **{name: part() for name, part in parts.items()})
        path = save(made, root / "model")
        if change is not None:
            change(path)
        return path, made

    return build


def stock_scheduler(kind: str, **settings: Any) -> Callable[[], Any]:
    return lambda: getattr(diffusers, kind)(**BETAS | settings)


def file(
    family: str = "sd1",
    dtype: torch.dtype = torch.float32,
    more: Callable[[], dict[str, torch.Tensor]] = dict,
    ema: float | None = None,
    **parts: Callable[[], Any],
) -> Callable:
    """The same as one file in the original layout; `ema`: its weights are that multiple of their averages."""

    def build(root: Path) -> tuple[Path, StableDiffusionPipeline]:
        made = pipeline(family, **{name: part() for name, part in parts.items()})
        state = {name: value.to(dtype) for name, value in (ldm_state(made) | more()).items()}
        if ema is not None:
            trained = "model.diffusion_model."
            averages = {
                "model_ema." + name.removeprefix("model.").replace(".", ""): value
                for name, value in state.items()
                if name.startswith(trained)
            }
            state = {n: value * ema if n.startswith(trained) else value for n, value in state.items()} | averages
            state |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
        kind = made.scheduler.config.get("prediction_type", "epsilon")
        said = {"modelspec.prediction_type": "v" if kind == "v_prediction" else "epsilon"}
        return save_file_of(state, root / "model.safetensors", PICTURE | said), made

    return build


def no_checkpoint(tensors: dict[str, tuple[int, ...]], name: str = "model.safetensors") -> Callable:
    """A file of such tensors, all zero."""
    return lambda root: (save_file_of({n: torch.zeros(shape) for n, shape in tensors.items()}, root / name), None)


def pickled(root: Path) -> tuple[Path, None]:
    torch.save({"state_dict": {"x": torch.zeros(1)}}, root / "model.ckpt")
    return root / "model.ckpt", None


def in_bf16(path: Path) -> None:
    for weights in path.rglob("*.safetensors"):
        save_file({key: value.bfloat16() for key, value in load_file(weights).items()}, weights, {"format": "pt"})


def as_bin(path: Path) -> None:
    torch.save({}, path / "unet" / "diffusion_pytorch_model.bin")
    (path / UNET).unlink()


def listed(**parts: Any) -> Callable[[Path], None]:
    return lambda path: edit(path / "model_index.json", **parts)


def as_transformer(pipeline_class: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        edit(path / "model_index.json", _class_name=pipeline_class, transformer=["diffusers", "X"], unet=None)
        shutil.move(path / "unet", path / "transformer")

    return change


def taking(channels: int) -> Callable[[Path], None]:
    return lambda path: edit(path / "unet" / "config.json", in_channels=channels)


def weight(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def changed(path: Path) -> None:
        state = load_file(path / UNET)
        change(state)
        save_file(state, path / UNET, {"format": "pt"})

    return changed


def with_learnt_token(root: Path) -> tuple[Path, StableDiffusionPipeline]:
    """A textual inversion of two vectors, as stock pipelines load and save it."""
    made = pipeline()
    torch.manual_seed(6)
    vectors = (torch.randn(2, 64) * 0.05).bfloat16().half().float()
    save_file({"<cat-toy>": vectors}, root / "token.safetensors")
    made.load_textual_inversion(root / "token.safetensors", token="<cat-toy>")
    return save(made, root / "model"), made


def lcm() -> Any:
    return unet(time_cond_proj_dim=256)


MIDDLE = "mid_block.resnets.0.conv1.weight"
IN, OUT = "model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.out.2.weight"
MEMBERS = (
    Member("SD-1.5 (PNDM)", folder(), int8=True),
    Member("SD-1.4 with a safety checker listed", folder(as_safety_checker_deleted)),
    Member("non-EMA and fp16 weights beside", folder(with_other_weights_beside), slow=True),
    Member("older layout, no tokenizer.json", folder(as_old_layout)),
    Member("SD-2.1-base", folder(family="sd2", scheduler=scheduler)),
    Member("SD-2.1-768 (v)", folder(family="sd2"), int8=True),
    Member("LCM, the scale its input", folder(unet=lcm, scheduler=stock_scheduler("LCMScheduler")), int8=True,
           slow=True),
    Member("LCM, merged adapter", folder(scheduler=stock_scheduler("LCMScheduler")), slow=True),
    Member("SD-Turbo", folder(scheduler=stock_scheduler("EulerDiscreteScheduler", timestep_spacing="trailing")),
           slow=True),
    Member("BK-SDM, no mid block", folder(unet=lambda: unet(mid_block_type=None)), slow=True),
    Member("another VAE (ft-mse)", folder(vae=lambda: autoencoder(9)), slow=True),
    Member("text encoder of fewer layers (clip skip)", folder(text_encoder=lambda: text_encoder(layers=1)), slow=True),
    Member("bf16", folder(in_bf16)),
    Member("only *.fp16.safetensors", folder(as_variant("fp16"))),
    Member("learnt token of two vectors", with_learnt_token, slow=True),
    Member("shards", folder(as_sharded), slow=True),
    Member("the Hub's cache, links", folder(as_linked), slow=True),
    Member("Euler", folder(scheduler=stock_scheduler("EulerDiscreteScheduler", steps_offset=1))),
    Member("Euler ancestral", folder(scheduler=stock_scheduler("EulerAncestralDiscreteScheduler", steps_offset=1)),
           slow=True),
    Member("DPM++ 2M Karras", folder(scheduler=stock_scheduler("DPMSolverMultistepScheduler",
                                                               use_karras_sigmas=True))),
    Member("UniPC", folder(scheduler=stock_scheduler("UniPCMultistepScheduler", steps_offset=1))),
    Member("zero terminal SNR", folder(scheduler=stock_scheduler("DDIMScheduler", clip_sample=False,
                                                                 rescale_betas_zero_snr=True)),
           "sets rescale_betas_zero_snr"),
    Member("trained_betas", folder(scheduler=stock_scheduler("DDIMScheduler", clip_sample=False,
                                                             trained_betas=[0.001] * 1000)), "sets trained_betas"),
    Member("flow matching", folder(scheduler=stock_scheduler("UniPCMultistepScheduler",
                                                             prediction_type="flow_prediction")), "flow matching"),
    Member("TAESD", folder(vae=tiny_autoencoder), slow=True),
    Member("an autoencoder of another class",
           folder(lambda path: edit(path / "vae/config.json", _class_name="AutoencoderOobleck")),
           "AutoencoderOobleck"),
    Member("inpainting", folder(taking(9)), "a model for inpainting"),
    Member("InstructPix2Pix", folder(taking(8)), "a model for InstructPix2Pix"),
    Member("only .bin", folder(as_bin), "is pickled and is never read"),
    Member("no model_index.json", folder(lambda path: (path / "model_index.json").unlink()),
           "has no model_index.json"),
    Member("a weight missing", folder(weight(lambda state: state.pop(MIDDLE))), f"lacks the weight {MIDDLE}"),
    Member("one NaN", folder(weight(lambda state: state[MIDDLE].view(-1)[7:8].fill_(torch.nan))),
           f"the weight {MIDDLE} holds NaN"),
    Member("SDXL", folder(listed(text_encoder_2=["transformers", "X"])), "of SDXL.*second text encoder"),
    Member("SD 3", folder(as_transformer("StableDiffusion3Pipeline")), "of Stable Diffusion 3"),
    Member("SANA", folder(as_transformer("SanaPipeline")), "of SANA"),
    Member("file: SD-1.5, fp32", file(), slow=True),
    Member("file: SD-1.5, fp16", file(dtype=torch.float16)),
    Member("file: SD-1.5, bf16, with training's leftovers", file(dtype=torch.bfloat16, more=leftovers), slow=True),
    Member("file: SD-1.5 with averages", file(ema=2), slow=True),
    Member("file: SD-2.1-768 (v), fp16", file("sd2", torch.float16), slow=True),
    Member("file: with another VAE baked in", file(vae=lambda: autoencoder(9)), slow=True),
    Member("file: LoRA", no_checkpoint({"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": (1,)}),
           "is a LoRA adapter"),
    Member("file: .ckpt", pickled, "is pickled"),
    Member("file: inpainting", no_checkpoint({IN: (32, 9, 3, 3), OUT: (4, 32, 3, 3)}), "a model for inpainting"),
    Member("file: SDXL", no_checkpoint({"conditioner.embedders.1.model.ln_final.weight": (1,), IN: (32, 4, 3, 3)}),
           "of SDXL.*second text encoder"),
    Member("file: SD 3", no_checkpoint({"model.diffusion_model.joint_blocks.0.x": (1,)}), "of Stable Diffusion 3"),
    Member("file: Flux", no_checkpoint({"double_blocks.0.img_attn.norm.key_norm.scale": (1,)}), "of Flux"),
)  # fmt: skip
