"""The parts of a bundle's manifest: files, tensors, networks, latents, schedule; strict pydantic models."""

from __future__ import annotations

import math
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, TypeVar, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from pocketfusion.errors import PocketfusionError

#: What a manifest may say is bounded far above what the family needs (SD's pictures have 1024 pixels, its prompts 77
#: tokens) and far below what would fill a machine's memory.
Positive = Annotated[int, Field(gt=0, le=2**14)]
Count = Annotated[int, Field(ge=0, le=10**16)]
Text = Annotated[str, Field(max_length=2000)]
_MAX_ELEMENTS = 2**28  #: of a network's input or output: 1 GB of float32
#: Of a schedule's last alpha^2, and of a beta: the samplers divide by alpha and by sigma. (SD's: 0.0047 and 0.00085.)
_LEAST = 1e-9
Weights = Literal[
    "float32", "float16", "int8", "int8-dynamic", "int4-dynamic", "palette6", "palette4", "int4-block", "mixed"
]
SamplerName = Literal["ddim", "euler", "euler-ancestral", "dpmpp-2m", "dpmpp-2m-karras", "lcm", "tcd"]
SAMPLERS: tuple[SamplerName, ...] = get_args(SamplerName)
#: Samplers that look at the UNet's own prediction again in the next step, so that a step in its graph is not theirs.
MULTISTEP: tuple[SamplerName, ...] = ("dpmpp-2m", "dpmpp-2m-karras")
ORIGINAL_STEPS = 50  #: of the grid that LCM and TCD draw from: diffusers' default, which published models keep


class Strict(BaseModel):
    """A model that refuses unknown keys, NaN and infinity."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @classmethod
    def made(cls: type[Part], **values: Any) -> Part:
        """One of `values`; raises PocketfusionError for what a reader would refuse."""
        try:
            return cls(**values)
        except ValidationError as error:
            raise PocketfusionError(
                f"the bundle's manifest would not be valid ({first_fault(error)}): change that"
            ) from None


Part = TypeVar("Part", bound=Strict)


def first_fault(error: ValidationError) -> str:
    """Where a model's values are wrong first, and how."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])[:200]
    what = first["msg"].removeprefix("Value error, ")
    return f"{where + ': ' if where else ''}{what}"


class BundleFile(Strict):
    """One file: its path inside the bundle (forward slashes), its SHA-256 and its size in bytes."""

    path: str = Field(max_length=1000)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size: Count

    @model_validator(mode="after")
    def _path_is_inside(self) -> BundleFile:
        path = PurePosixPath(self.path)
        if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in self.path or ":" in self.path:
            raise ValueError(f"the path {self.path!r} leaves the bundle")
        if not self.path.isprintable() or any(len(part.encode()) > 255 for part in path.parts):
            raise ValueError(f"the path {self.path[:80]!r} is none that a file can have everywhere")
        return self


class TensorSpec(Strict):
    """A network's input or output: its name, fixed shape (NHWC) and type."""

    name: Text
    shape: list[Positive] = Field(min_length=1, max_length=4)
    dtype: Literal["float32", "int32"]

    @model_validator(mode="after")
    def _fits_into_memory(self) -> TensorSpec:
        if math.prod(self.shape) > _MAX_ELEMENTS:
            raise ValueError(f"the tensor {self.name!r} has {math.prod(self.shape):,} elements")
        return self


class Network(Strict):
    """What one network's file computes and how near it is to the PyTorch network that it was made from.

    `macs` are the multiply-adds of one call at batch 1; `sqnr_db` is the signal-to-noise ratio against
    PyTorch; `guidance_delta` (UNet only) is std(conditional - unconditional), exported over original, and with
    embedded guidance the same of two guidance scales if that is further from 1. `weights` `int8` and `float16` are
    computed in float32, the `-dynamic` ones by integer kernels with activations rounded on the fly (CPU), `mixed` is a
    choice for each layer. Of runtimes that compute in fp16, `fp16_sqnr_db` and `fp16_guidance_delta` are the figures
    with each operation's result rounded so. `gpu_precision` is what the GPU has to compute in: fp16, its fast one,
    unless it says fp32.
    """

    inputs: list[TensorSpec] = Field(min_length=1, max_length=8)
    outputs: list[TensorSpec] = Field(min_length=1, max_length=1)
    parameters: Count
    macs: Count
    weights: Weights
    sqnr_db: float | None = None
    guidance_delta: float | None = None
    fp16_sqnr_db: float | None = None
    fp16_guidance_delta: float | None = None
    gpu_precision: Literal["fp32"] | None = None

    def input(self, name: str) -> TensorSpec | None:
        """The input called `name`, None if the network has none."""
        return next((tensor for tensor in self.inputs if tensor.name == name), None)

    @property
    def batch(self) -> int:
        """Predictions of one call: the UNet's rows of text, else the first input's first extent."""
        return (self.input("encoder_hidden_states") or self.inputs[0]).shape[0]


class Networks(Strict):
    """The three networks of a bundle."""

    text_encoder: Network
    unet: Network
    decoder: Network


class CoreMLSpec(Strict):
    """What a bundle for Core ML says besides: the oldest iOS that loads it; each network's packages, folders in the
    bundle, in the order of their calls; their layout. In `apple`, that of Apple's Swift package StableDiffusion
    (docs/coreml.md), the packages take other tensors than `networks` says."""

    ios: Literal[17, 18]
    layout: Literal["bundle", "apple"] = "bundle"
    packages: dict[Literal["text_encoder", "unet", "decoder"], list[Text]]

    @model_validator(mode="after")
    def _packages_are_there(self) -> CoreMLSpec:
        if len(self.packages) != 3 or not all(1 <= len(found) <= 2 for found in self.packages.values()):
            raise ValueError("packages has not one or two of each network")
        return self


class OnnxSpec(Strict):
    """What a bundle for ONNX runtimes says besides: the operations' version, and the files' layout. In `diffusers`,
    that of its `OnnxStableDiffusionPipeline` (docs/runtimes.md), they take other tensors than `networks` says."""

    opset: int = Field(ge=13, le=100)
    layout: Literal["bundle", "diffusers"] = "bundle"


class TokenizerSpec(Strict):
    """How prompts are cut and padded: always to `max_length` tokens."""

    max_length: Positive
    pad_token: Text
    pad_token_id: int = Field(ge=0, lt=2**31)


class LatentSpec(Strict):
    """Shape of the sampler's latents: [height, width, channels]."""

    channels: Positive
    height: Positive
    width: Positive


class ImageSpec(Strict):
    """Size of the pictures in pixels."""

    height: Positive
    width: Positive


class TimeEmbedding(Strict):
    """How the runtime computes the UNet's input `timestep_embedding` [B, dim], with the names of diffusers'
    `get_timestep_embedding`: inside the graph, fp16 sines of angles up to 1000 are off by 10 % and more."""

    dim: int = Field(ge=4, le=2**14)  #: half of it stays above `downscale_freq_shift`
    flip_sin_to_cos: bool = True
    downscale_freq_shift: float = Field(default=0.0, ge=0, le=1)


class SchedulerSpec(Strict):
    """The noise schedule, with the names of diffusers' schedulers.

    `set_alpha_to_one` is where DDIM ends, `final_sigmas_type` where Euler and DPM-Solver do; `eta` is TCD's share of
    fresh noise (the paper's gamma).
    """

    num_train_timesteps: int = Field(gt=0, le=100_000)
    beta_start: float = Field(ge=_LEAST, lt=1)
    beta_end: float = Field(ge=_LEAST, lt=1)
    beta_schedule: Literal["linear", "scaled_linear"]
    prediction_type: Literal["epsilon", "v_prediction"]
    timestep_spacing: Literal["leading", "trailing", "linspace"]
    steps_offset: int = Field(default=0, ge=0, le=100_000)
    set_alpha_to_one: bool = True
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    eta: float = Field(default=0.3, ge=0, le=1)

    def alphas_cumprod(self) -> npt.NDArray[np.float64]:
        """alpha^2 by timestep, falling, [num_train_timesteps]."""
        n = self.num_train_timesteps
        if self.beta_schedule == "linear":
            betas = np.linspace(self.beta_start, self.beta_end, n)
        else:
            betas = np.linspace(self.beta_start**0.5, self.beta_end**0.5, n) ** 2
        return np.cumprod(1.0 - betas).astype(np.float64)

    @model_validator(mode="after")
    def _samplers_can_compute_it(self) -> SchedulerSpec:
        if not (last := float(self.alphas_cumprod()[-1])) >= _LEAST:
            raise ValueError(
                f"the betas leave alpha^2 = {last:.1g} at the last timestep: at least {_LEAST:g} is drawn"
            )
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the keys that older readers refuse where they say nothing new."""
        values: dict[str, Any] = handler(self)
        if self.final_sigmas_type == "zero":
            del values["final_sigmas_type"]
        if self.eta == SchedulerSpec.model_fields["eta"].default:
            del values["eta"]
        return values


def most_steps(sampler: SamplerName, spec: SchedulerSpec) -> int:
    """The largest number of steps that the sampler has timesteps for."""
    if sampler in ("lcm", "tcd"):
        return min(ORIGINAL_STEPS, spec.num_train_timesteps)
    return spec.num_train_timesteps - (sampler == "dpmpp-2m")  # which leaves the last of one more step out


class Defaults(Strict):
    """Settings that hold when a caller gives none."""

    num_inference_steps: int = Field(gt=0, le=100_000)
    guidance_scale: float = Field(ge=-1e4, le=1e4)


class Licence(Strict):
    """One part of the bundle, the licence that it is under and the attribution that this asks for."""

    what: Text
    spdx: Text
    attribution: str = Field(default="", max_length=100_000)


Array = npt.NDArray[np.float32]
_Coefficient = Annotated[float, Field(ge=-1e4, le=1e4)]
_Colour = Annotated[list[_Coefficient], Field(min_length=3, max_length=3)]


class LinearPreview(Strict):
    """red, green and blue in the decoder's range [-1, 1]: the sampler's latents [H, W, C] times `matrix` [C, 3], plus
    `bias` [3], clipped.

    `psnr_db` and `r2` (of 1: the share of the colours' variance that it explains) are of two drawn pictures that it
    was not fitted on, against the decoder's averaged over the pixels of each position.
    """

    matrix: list[_Colour] = Field(min_length=1, max_length=2**14)
    bias: _Colour
    psnr_db: float
    r2: float = Field(le=1)

    def colours(self, latents: Array) -> Array:
        """[..., C] → [..., 3], in [-1, 1]."""
        return np.clip(latents @ np.array(self.matrix, np.float32) + np.array(self.bias, np.float32), -1, 1)

    def image(self, latents: Array, size: tuple[int, int]) -> Image.Image:
        """The picture of latents [1, H, W, C], scaled up to `size`, width and height in pixels."""
        bytes_ = np.round((self.colours(latents[0]) / 2 + 0.5) * 255).astype(np.uint8)
        return Image.fromarray(bytes_).resize(size, Image.Resampling.BILINEAR)
