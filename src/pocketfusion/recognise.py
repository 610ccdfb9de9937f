"""What a file is, by its first bytes and the names and shapes in its safetensors header; no weight is read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pocketfusion.errors import PocketfusionError
from pocketfusion.safetensors_header import read_safetensors

#: What a UNet takes beside the latents, by the channels of its input beyond those of its output.
OTHER_INPUTS = {5: "inpainting", 4: "InstructPix2Pix", 3: "upscaling", 1: "depth-to-image"}
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
EMA = "model_ema."
#: How a file begins that is none of safetensors, and what it is then.
_BEGINNINGS = {
    b"PK\x03\x04": "pickled (a torch or zip archive) and is never read: convert it to safetensors first",
    b"\x80": "pickled and is never read: convert it to safetensors first",
    b"GGUF": "GGUF, quantised for another runtime: take the safetensors that it was made of",
    b"version https://git-lfs": "a git-lfs pointer, not the file itself: run git lfs pull there",
    b"<": "a web page, not a checkpoint: download the file itself",
}
#: What SD-1's text encoder has in files of the time before its names had `text_model.`
_OLD_CLIP = ("embeddings.", "encoder.", "final_layer_norm.")
#: Of other kinds of files: what a tensor's name holds, what the file is, and what to do with it. The first that fits.
_OTHER_FILES = (
    (r"lora|hada_w|lokr_w|oft_blocks|dora_scale", "a LoRA adapter, not a model", "give it to export with --lora"),
    (r"^(emb_params|string_to_param|clip_[lg]|<[^.]*>)$", "a textual inversion, not a model", "give it to import with "
     "--embedding"),
    (r"^(control_model\.|input_hint_block|controlnet_)", "a ControlNet, not a model", "it cannot be used"),
    (r"motion_modules", "a motion module (AnimateDiff), not a model", "it cannot be used"),
)  # fmt: skip
#: Of other families: what a tensor's name holds, the family, and how it is told.
_OTHER_FAMILIES = (
    (r"joint_blocks\.", "Stable Diffusion 3", "its network is a transformer (joint_blocks)"),
    (r"double_(blocks|layers|stream)", "Flux", "its network is a transformer (double_blocks)"),
    (r"^conditioner\.embedders\.1\.", "SDXL", "it has a second text encoder (conditioner.embedders.1)"),
    (r"^conditioner\.embedders\.0\.model\.", "SDXL's refiner", "its text encoder is OpenCLIP's bigG"),
    (r"^model\.diffusion_model\.input_blocks\.\d+\.1\.transformer_blocks\.1\.", "SDXL", "its UNet has several "
     "transformer blocks in a row"),
    (r"^(model\.diffusion_model\.)?label_emb\.", "unCLIP", "its UNet takes a picture's embedding (label_emb)"),
    (r"^clip_txt_mapper|\.channelwise\.", "Stable Cascade", "its stages are named as Cascade's"),
    (r"^(model\.diffusion_model\.)?((single_)?transformer_blocks|blocks|layers)\.0\.|patchify|caption_projection",
     "another family", "its network is a transformer"),
)  # fmt: skip
#: One part of a model alone: the names that are in it alone, and what the file is.
_PARTS = (
    (r"^(first_stage_model\.)?(encoder|decoder)\.", "an autoencoder (VAE) alone, not a model", "give it to import "
     "with --vae"),
    (r"^(down_blocks|up_blocks|mid_block)\.", "a UNet alone, out of a model folder", "give the whole folder"),
    (r"^\d+\.(conv\.\d+\.)?(weight|bias)$", "a tiny autoencoder (TAESD) alone, not a model", "give it to export with "
     "--vae"),
    (r"^(text_model|encoder\.layers|transformer\.resblocks)\.", "a text encoder alone, not a model", "give a whole "
     "checkpoint"),
)  # fmt: skip
_READABLE = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
#: What training and other tools leave in a checkpoint, beside the networks.
LEFTOVERS = {
    "noise schedule": r"(betas|alphas_\w+|sqrt_\w+|log_one_minus\w+|posterior_\w+|lvlb_weights|logvar|scale_factor)",
    "EMA's counters": r"model_ema\.(decay|num_updates)",
    "EMA weights": r"model_ema\..+",
    "autoencoder's training loss": r"first_stage_model\.(loss|discriminator|model_ema)\b.*",
    "text encoder's head and buffers": r"cond_stage_model\..*(logit_scale|text_projection|position_ids|attn_mask).*",
    "optimizer": r"(optimizer|lr_scheduler|callbacks|global_step|epoch).*",
    "markers": r"(v_pred|ztsnr|edm_\w+)",
}


@dataclass(frozen=True)
class Checkpoint:
    """A single file of Stable Diffusion 1 or 2: its tensors (name → dtype, shape, data_offsets) and metadata.

    `sources`: the name that a tensor has in the file, where that is not the original layout's, its name here.
    """

    file: Path
    tensors: dict[str, dict[str, Any]]
    metadata: dict[str, str]
    sources: dict[str, str] = field(default_factory=dict)

    def shape(self, name: str) -> list[int]:
        """A tensor's shape; raises PocketfusionError if the file lacks it."""
        if name not in self.tensors:
            raise PocketfusionError(f"{self.file} lacks the weight {short(name)}: restore it from its source")
        return list(self.tensors[name]["shape"])

    def names(self, prefix: str) -> list[str]:
        """The tensors whose names begin with `prefix`, in the file's order."""
        return [name for name in self.tensors if name.startswith(prefix)]

    @cached_property
    def linear(self) -> bool:
        """Whether the transformers' projections are linear layers, as SD-2's are, and no 1×1 convolutions."""
        name = next(name for name in self.names(UNET) if name.endswith(".1.proj_in.weight"))
        return len(self.shape(name)) == 2

    @cached_property
    def open_clip(self) -> bool:
        """Whether the text encoder has OpenCLIP's names, as SD-2's has."""
        return bool(self.names(OPEN_CLIP))

    @property
    def family(self) -> str:
        """SD-1.x or SD-2.x: what the UNet's projections are."""
        return "SD-2.x" if self.linear else "SD-1.x"

    @cached_property
    def ema(self) -> dict[str, str]:
        """Name of a UNet's weight → of its moving average; empty unless every one has it, in the same shape."""
        found = {}
        for name in self.names(UNET):
            average = EMA + name.removeprefix("model.").replace(".", "")
            if average not in self.tensors or self.shape(average) != self.shape(name):
                return {}
            found[name] = average
        return found

    def dtype(self, names: Iterable[str]) -> str:
        """The type (safetensors' name) that most of these tensors' values have."""
        found: Counter[str] = Counter()
        for name in names:
            begin, end = self.tensors[name]["data_offsets"]
            found[self.tensors[name]["dtype"]] += end - begin
        return found.most_common(1)[0][0]


def recognise(file: Path) -> Checkpoint:
    """The checkpoint in `file`; raises PocketfusionError with the name of whatever else it is."""
    _check_beginning(file)
    metadata, tensors, _ = read_safetensors(file)
    reason = _refusal(tensors)
    if reason:
        raise PocketfusionError(f"{file} {reason}")
    for name, tensor in tensors.items():
        if tensor["dtype"] not in _READABLE and name.startswith((UNET, VAE)):
            raise PocketfusionError(
                f"{file} is quantised ({short(name)} is {tensor['dtype']}): take the fp16 or fp32 file it was made of"
            )
    old = [name for name in tensors if name.startswith(tuple(f"{CLIP}{part}" for part in _OLD_CLIP))]
    sources = {f"{CLIP}text_model.{name.removeprefix(CLIP)}": name for name in old}
    renamed = {name: tensors.pop(source) for name, source in sources.items()}
    return Checkpoint(file, tensors | renamed, metadata, sources)


def recognise_vae(file: Path) -> Checkpoint:
    """The autoencoder in `file`, alone or in a checkpoint; raises PocketfusionError if it holds none."""
    _check_beginning(file)
    metadata, tensors, _ = read_safetensors(file)
    names = list(tensors)
    for pattern, what, _cure in _OTHER_FILES:
        if (found := _first(pattern, names)) is not None:
            raise PocketfusionError(f"{file} is {what} ({short(found)}), where --vae takes an autoencoder")
    if _first(r"^(encoder\.down_blocks|decoder\.up_blocks)\.", names) is not None:
        raise PocketfusionError(
            f"{file} is an autoencoder in diffusers' layout without its config.json: give the folder that holds both"
        )
    if any(name.startswith(VAE) for name in names):
        return Checkpoint(file, {name: one for name, one in tensors.items() if name.startswith(VAE)}, metadata)
    if "decoder.conv_in.weight" not in tensors:
        raise PocketfusionError(f"{file} holds no autoencoder of Stable Diffusion's layout (decoder.conv_in)")
    named = {f"{VAE}{name}": one for name, one in tensors.items()}
    return Checkpoint(file, named, metadata, {name: name.removeprefix(VAE) for name in named})


def what_file(file: Path) -> str:
    """Why a file is no model folder, and what to do with it."""
    try:
        recognise(file)
    except PocketfusionError as error:
        return str(error)
    return f"{file} is a checkpoint file, not a model folder: make one of it with pocketfusion import {file} OUT"


def _check_beginning(file: Path) -> None:
    if not file.exists():
        raise PocketfusionError(f"there is no checkpoint at {file}: check the path")
    if not file.is_file():
        raise PocketfusionError(f"{file} is no regular file: give the path of a checkpoint")
    if file.name in ("model_index.json", "bundle.json"):
        raise PocketfusionError(f"{file} is a file, not a model folder or bundle: give the folder, {file.parent}")
    with file.open("rb") as opened:
        start = opened.read(64)
    if start.lstrip()[:1] in (b"{", b"[") and start[8:9] != b"{":
        raise PocketfusionError(f"{file} is JSON, not a checkpoint: give a .safetensors file")
    for beginning, what in _BEGINNINGS.items():
        # a safetensors header of a length whose first byte is one of these is told by the brace behind the length
        if start.startswith(beginning) and start[8:9] != b"{":
            raise PocketfusionError(f"{file} is {what}")
    if file.suffix.lower() in PICKLED and start[8:9] != b"{":
        raise PocketfusionError(f"{file} is pickled, by its name, and is never read: convert it to safetensors first")


def _refusal(tensors: dict[str, dict[str, Any]]) -> str:
    """Why these tensors are no checkpoint of SD-1 or SD-2; "" if they are one."""
    names = list(tensors)
    for pattern, what, cure in _OTHER_FILES:
        if (found := _first(pattern, names)) is not None:
            return f"is {what} ({short(found)}): {cure}"
    for pattern, family, why in _OTHER_FAMILIES:
        if _first(pattern, names) is not None:
            return f"is of {family}, which is not supported: {why}; checkpoints of Stable Diffusion 1 and 2 are"
    first = tensors.get(f"{UNET}input_blocks.0.0.weight")
    if first is None:
        for pattern, what, cure in _PARTS:
            if (found := _first(pattern, names)) is not None:
                return f"is {what} ({short(found)}): {cure}"
        if any(name.startswith(EMA) for name in names):
            return "has averaged weights (model_ema) alone: take the file with model.diffusion_model"
        shown = f" (it begins with {short(names[0])})" if names else ""
        return f"is no Stable Diffusion checkpoint: it has no {UNET}input_blocks.0.0.weight{shown}"
    last = tensors.get(f"{UNET}out.2.weight")
    if last is None or len(first["shape"]) != 4 or len(last["shape"]) != 4:
        return "is no Stable Diffusion checkpoint: its UNet has no first and last convolution"
    taken, given = first["shape"][1], last["shape"][0]
    if taken != given:
        other = OTHER_INPUTS.get(taken - given)
        return (
            f"is {f'a model for {other}' if other else 'of another family'}, which is not supported: its UNet takes "
            f"{taken} channels and gives {given}"
        )
    if not any(name.endswith(".1.proj_in.weight") for name in names):
        return "is no Stable Diffusion checkpoint: its UNet attends to no text"
    if not any(name.startswith((CLIP, OPEN_CLIP)) for name in names):
        return "has no text encoder (cond_stage_model): take the whole checkpoint, not a file pruned of it"
    return ""


def _first(pattern: str, names: Iterable[str]) -> str | None:
    compiled = re.compile(pattern)
    return next((name for name in names if compiled.search(name)), None)


def short(text: str) -> str:
    """A name out of a file, fit for a terminal."""
    return ascii(text if len(text) <= 120 else f"{text[:117]}...")[1:-1]
