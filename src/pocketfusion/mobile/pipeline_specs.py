"""What the manifest says of a pipeline, read from its configs: nothing about a model's sizes is assumed.

So is what an architecture costs on any device: parameters and multiply-adds, counted on shapes alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pocketfusion.errors import PocketfusionError
from pocketfusion.mobile.wrappers import StablePipeline, TimeEmbeddingAt
from pocketfusion.models.elastic.architecture import Architecture
from pocketfusion.models.elastic_unet import ElasticUNet
from pocketfusion.models.noise_schedule import ddim_scheduler
from pocketfusion.runtime.specs import (
    ImageSpec,
    LatentSpec,
    SamplerName,
    SchedulerSpec,
    TensorSpec,
    TokenizerSpec,
)

Samples = dict[str, torch.Tensor]
#: diffusers' class of each sampler; of two samplers with one class, the second is the first with an option.
CLASSES: dict[SamplerName, str] = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "dpmpp-2m": "DPMSolverMultistepScheduler",
    "dpmpp-2m-karras": "DPMSolverMultistepScheduler",
    "lcm": "LCMScheduler",
    "tcd": "TCDScheduler",
}
#: The options of those classes as the runtime has them.
_OPTIONS = {
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "solver_type": "midpoint",
    "lower_order_final": True,
    "euler_at_final": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "lambda_min_clipped": -math.inf,
    "interpolation_type": "linear",
    "timestep_type": "discrete",
    "sigma_min": None,
    "sigma_max": None,
    "original_inference_steps": 50,
    "timestep_scaling": 10.0,
}


def latent_spec(pipeline: StablePipeline) -> LatentSpec:
    """Shape of the latents that the UNet was made for."""
    config = pipeline.unet.config
    height, width = (config.sample_size,) * 2 if isinstance(config.sample_size, int) else config.sample_size
    return LatentSpec.made(channels=config.in_channels, height=height, width=width)


def image_spec(pipeline: StablePipeline) -> ImageSpec:
    """Size of the pictures: the latents' times the autoencoder's factor."""
    latents, factor = latent_spec(pipeline), 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    return ImageSpec.made(height=latents.height * factor, width=latents.width * factor)


def tokenizer_spec(pipeline: StablePipeline) -> TokenizerSpec:
    """The prompt's fixed length and padding. Raises PocketfusionError without a padding token."""
    tokenizer = pipeline.tokenizer
    if tokenizer.pad_token is None:
        raise PocketfusionError("the folder's tokenizer has no padding token: set pad_token in tokenizer_config.json")
    length = min(tokenizer.model_max_length, pipeline.text_encoder.config.max_position_embeddings)
    return TokenizerSpec.made(max_length=length, pad_token=tokenizer.pad_token, pad_token_id=tokenizer.pad_token_id)


def sampler_of(scheduler: Any) -> SamplerName:
    """The sampler that a folder's scheduler class names; DDIM for classes and options that the runtime lacks."""
    said = scheduler.config
    own = type(scheduler).__name__
    name: SamplerName = next((name for name, kind in CLASSES.items() if kind == own), "ddim")
    if any(said.get(key, value) != value for key, value in _OPTIONS.items()):
        return "ddim"
    if said.get("use_karras_sigmas"):
        return "dpmpp-2m-karras" if name == "dpmpp-2m" else "ddim"
    return name


def scheduler_spec(pipeline: StablePipeline) -> SchedulerSpec:
    """The noise schedule as the bundle's sampler reads it, by the folder's class, and else as DDIM does.

    Raises PocketfusionError for schedules the runtime does not draw.
    """
    said, config = pipeline.scheduler.config, dict(ddim_scheduler(pipeline.scheduler).config)
    if sampler_of(pipeline.scheduler) not in ("ddim", "lcm", "tcd"):  # LCM and TCD know no spacing
        config |= {key: said[key] for key in ("timestep_spacing", "final_sigmas_type") if key in said}
    known = {
        "beta_schedule": ("linear", "scaled_linear"),
        "prediction_type": ("epsilon", "v_prediction"),
        "timestep_spacing": ("leading", "trailing", "linspace"),
    }
    for key, values in known.items():
        if config[key] not in values:
            raise PocketfusionError(
                f"the folder's scheduler has {key} {config[key]!r}: the runtime knows {' and '.join(values)}"
            )
    for key in ("rescale_betas_zero_snr", "thresholding", "clip_sample", "trained_betas"):
        if config[key] is not None and config[key] is not False:
            raise PocketfusionError(f"the folder's scheduler sets {key}, which the runtime does not know: turn it off")
    return SchedulerSpec.made(**{name: config[name] for name in SchedulerSpec.model_fields if name in config})


def samples(
    pipeline: StablePipeline, batch: int, time_embedding: TimeEmbeddingAt = "inside", scheduler_step: bool = False
) -> dict[str, Samples]:
    """Sample inputs of the three networks by the bundle's names; `batch` is the UNet's (the others take 1).

    `time_embedding` and `scheduler_step` are those of the wrapped UNet.
    """
    latents, length = latent_spec(pipeline), tokenizer_spec(pipeline).max_length
    shape = (latents.height, latents.width, latents.channels)
    width = pipeline.text_encoder.config.hidden_size
    generator = torch.Generator().manual_seed(0)
    embedding = pipeline.unet.config.time_cond_proj_dim
    timestep = torch.full((batch,), 500.0)
    if time_embedding == "inside":
        time = {"timestep": timestep}
    else:
        time = {"timestep_embedding": pipeline.unet.time_proj(timestep)}
    return {
        "text_encoder": {
            "input_ids": torch.zeros(1, length, dtype=torch.int32),
            "attention_mask": torch.ones(1, length, dtype=torch.int32),
        },
        "unet": {
            "sample": torch.randn(1 if scheduler_step else batch, *shape, generator=generator),
            **time,
            "encoder_hidden_states": torch.randn(batch, length, width, generator=generator),
            **({"timestep_cond": torch.zeros(batch, embedding)} if embedding else {}),
            **({"step_coefficients": torch.tensor([[4.0, 1.0, -0.1]])} if scheduler_step else {}),
        },
        "decoder": {"latents": torch.randn(1, *shape, generator=generator)},
    }


def tensor_specs(tensors: Samples) -> list[TensorSpec]:
    """The manifest's entries for named tensors."""
    kinds: dict[torch.dtype, Any] = {torch.float32: "float32", torch.int32: "int32"}
    return [TensorSpec.made(name=name, shape=list(x.shape), dtype=kinds[x.dtype]) for name, x in tensors.items()]


@torch.no_grad()
def multiply_adds(network: nn.Module, inputs: Samples) -> int:
    """Multiply-adds of one call: matrix products and convolutions, by torch's flop counter."""
    # The maths form of attention, because the counter does not know the CPU's fused one.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        network(**inputs)
    return counter.get_total_flops() // 2


class Cost(NamedTuple):
    """Of one UNet call at batch 1; multiply-adds are those of matrix products (attention's too) and convolutions."""

    parameters: int
    multiply_adds: int


def unet_cost(config: Mapping[str, Any], architecture: Architecture, tokens: int) -> Cost:
    """`config`'s base with `architecture`, at its own latent size with text states of `tokens` tokens.

    Raises PocketfusionError if the base is not SD-family or the architecture cannot run on it.
    """
    plain = {key: value for key, value in config.items() if not key.startswith("_") and key != "architecture"}
    with torch.device("meta"):
        unet = ElasticUNet(**plain, architecture=architecture.model_dump(mode="json"))
        size = unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        inputs = {
            "sample": torch.zeros(1, unet.config.in_channels, height, width),
            "timestep": torch.zeros(1),
            "encoder_hidden_states": torch.zeros(1, tokens, unet.config.cross_attention_dim),
        }
        return Cost(sum(p.numel() for p in unet.parameters()), multiply_adds(unet, inputs))
