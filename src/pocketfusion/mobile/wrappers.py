"""The three networks with the bundle's inputs and outputs: named, fixed shapes, float32 or int32, NHWC.

The decoder may be one of TAESD's class (diffusers' `AutoencoderTiny`). A UNet has several forms; the plain one's calls
are told as calls of such a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from diffusers.models.upsampling import Upsample2D
from torch import nn
from transformers import CLIPTextModel

from pocketfusion.errors import PocketfusionError
from pocketfusion.mobile.rewrites.passes import shared_copy, view
from pocketfusion.models.sampling import Guidance
from pocketfusion.runtime.manifest import TimeEmbedding

#: A `diffusers.StableDiffusionPipeline`: its components are set at run time, where mypy does not see them.
StablePipeline = Any


def nchw(x: torch.Tensor) -> torch.Tensor:
    """[B, H, W, C] -> [B, C, H, W]."""
    return x.permute(0, 3, 1, 2)


def nhwc(x: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] -> [B, H, W, C]."""
    return x.permute(0, 2, 3, 1)


class TextEncoder(nn.Module):
    """`input_ids` int32 [B, T], `attention_mask` int32 [B, T] -> `prompt_embeds` float32 [B, T, D].

    Where the text encoder's config has `use_attention_mask`, the mask reaches it, as in the stock pipeline; otherwise
    (CLIP) the mask is taken and ignored.
    """

    causal: torch.Tensor | None

    def __init__(self, text_encoder: nn.Module):
        super().__init__()
        self.text_encoder = text_encoder
        self.use_mask = bool(getattr(text_encoder.config, "use_attention_mask", False))
        causal = None
        if self.use_mask and isinstance(text_encoder, CLIPTextModel):
            side = text_encoder.config.max_position_embeddings
            causal = torch.full((side, side), -1e4, device=text_encoder.device).triu(1)
        self.register_buffer("causal", causal, persistent=False)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        if not self.use_mask:
            # Adds nothing, but keeps the input in the graph: every bundle has the same signature.
            embeds = self.text_encoder(input_ids)[0] + 0.0 * attention_mask.unsqueeze(-1).float()
            return {"prompt_embeds": embeds}
        # Additive and 4-D already: the library's own mask building lowers to GATHER_ND, which GPUs refuse.
        additive = (1.0 - attention_mask[:, None, None, :].float()) * -1e4
        additive = additive.expand(-1, 1, attention_mask.shape[1], -1)
        if self.causal is not None:  # the library takes such a mask for the whole one
            additive = torch.minimum(additive, self.causal[: additive.shape[3], : additive.shape[3]])
        return {"prompt_embeds": self.text_encoder(input_ids, attention_mask=additive)[0]}


TimeEmbeddingAt = Literal["inside", "outside"]


class UNet(nn.Module):
    """`sample` [B, H, W, C], `timestep` [B], `encoder_hidden_states` [B, T, D] -> `noise_pred` [B, H, W, C].

    With embedded guidance also `timestep_cond` [B, E], the scale's embedding: a GPU delegate in fp16 cannot compute
    sines of thousands, so the runtime does. For the same reason `time_embedding="outside"` takes the sinusoids,
    `timestep_embedding` [B, E'], in place of `timestep`.

    With `scheduler_step` the DDIM step is part of the graph: `step_coefficients` [1, 3] are the guidance scale, a and
    b, `sample` is one picture's [1, H, W, C] whatever B is, and the output is `prev_sample` [1, H, W, C],
    a * sample + b * guided, where guided is uncond + scale * (cond - uncond) of two rows, or the one prediction.
    """

    def __init__(self, unet: nn.Module, time_embedding: TimeEmbeddingAt = "inside", scheduler_step: bool = False):
        super().__init__()
        self.scheduler_step = scheduler_step
        if time_embedding == "outside":
            unet = shared_copy(unet)
            unet.get_time_embed = _given_embedding  # type: ignore[assignment]  # a method's place, in the copy only
        self.unet = unet

    def forward(
        self,
        sample: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep: torch.Tensor | None = None,
        timestep_embedding: torch.Tensor | None = None,
        timestep_cond: torch.Tensor | None = None,
        step_coefficients: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        time = timestep if timestep_embedding is None else timestep_embedding
        rows = encoder_hidden_states.shape[0] if self.scheduler_step else 1
        repeated = sample if rows == 1 else torch.cat([sample] * rows)
        inputs = (nchw(repeated), time, encoder_hidden_states)
        prediction = nhwc(self.unet(*inputs, timestep_cond=timestep_cond, return_dict=False)[0])
        if not self.scheduler_step:
            return {"noise_pred": prediction}
        assert step_coefficients is not None
        scale, a, b = step_coefficients.reshape(1, 1, 1, 3).split(1, dim=3)
        if rows == 2:
            uncond, cond = prediction.split(1)
            prediction = uncond + scale * (cond - uncond)
        return {"prev_sample": a * sample + b * prediction}


def _given_embedding(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """In place of diffusers' `get_time_embed`: what it is given is the embedding."""
    return timestep


class Decoder(nn.Module):
    """`latents` [B, H, W, C], the sampler's, not yet divided by the scaling factor -> `image` [B, 8H, 8W, 3]."""

    def __init__(self, vae: Any):
        super().__init__()
        # The encoder is not part of this network.
        self.post_quant_conv = vae.post_quant_conv
        self.decoder = vae.decoder
        self.scaling_factor = float(vae.config.scaling_factor)

    def forward(self, latents: torch.Tensor) -> dict[str, torch.Tensor]:
        z = nchw(latents / self.scaling_factor)
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        return {"image": nhwc(self.decoder(z))}


def decoder_of(vae: Any) -> nn.Module:
    """The decoder of an `AutoencoderKL` or an `AutoencoderTiny` with the bundle's input and output."""
    return TinyDecoder(vae) if isinstance(vae, AutoencoderTiny) else Decoder(vae)


def wrap(
    pipeline: StablePipeline, time_embedding: TimeEmbeddingAt = "inside", scheduler_step: bool = False
) -> dict[str, nn.Module]:
    """The pipeline's three networks by the bundle's names, the UNet with its options (see `UNet`).

    Raises PocketfusionError for kinds that do not fit.
    """
    unet, vae, text_encoder = pipeline.unet, pipeline.vae, pipeline.text_encoder
    if not isinstance(vae, (AutoencoderKL, AutoencoderTiny)):
        raise PocketfusionError(
            f"the vae is a {type(vae).__name__}: only AutoencoderKL and AutoencoderTiny can be exported"
        )
    if isinstance(pipeline.unet, UNet2DConditionModel):
        if time_embedding == "outside" and unet.config.time_embedding_type != "positional":
            raise PocketfusionError(
                f"the UNet's time embedding is {unet.config.time_embedding_type!r}: only a positional one can be "
                "computed outside the network"
            )
        if unet.config.class_embed_type or unet.config.addition_embed_type:
            raise PocketfusionError(
                "the UNet takes class or added embeddings (SDXL style): only SD 1 and 2 families export"
            )
        width, states = unet.config.cross_attention_dim, text_encoder.config.hidden_size
        if isinstance(width, int) and width != states:
            raise PocketfusionError(
                f"the UNet attends to states of width {width} but the text encoder gives {states}: "
                "the folder mixes models"
            )
    if vae.config.latent_channels != unet.config.in_channels:
        raise PocketfusionError(
            f"the vae has {vae.config.latent_channels} latent channels but the UNet takes {unet.config.in_channels}: "
            "the folder mixes models"
        )
    wrapped = {
        "text_encoder": TextEncoder(text_encoder),
        "unet": UNet(unet, time_embedding, scheduler_step),
        "decoder": decoder_of(vae),
    }
    return {name: network.eval() for name, network in wrapped.items()}


CLAMP = 3.0  #: of the latents: 3 tanh(z / 3)


class TinyDecoder(nn.Module):
    """`latents` [B, H, W, C], the sampler's -> `image` [B, 8H, 8W, 3] in [-1, 1], as `mobile.wrappers.Decoder`.

    Its parameters are the autoencoder's but for the first and last convolution's. Doubling and the convolution behind
    it become diffusers' `Upsample2D`, so that the rewrites for that one hold here.
    """

    def __init__(self, vae: AutoencoderTiny):
        """Raises PocketfusionError for another doubling than TAESD's."""
        super().__init__()
        config = vae.config
        if config.upsampling_scaling_factor != 2 or config.upsample_fn != "nearest":
            raise PocketfusionError(
                f"the AutoencoderTiny scales by {config.upsampling_scaling_factor} ({config.upsample_fn!a}): only "
                "doubling to the nearest can be exported"
            )
        first, *middle, last = vae.decoder.layers
        self.scale = 1 / (CLAMP * float(config.scaling_factor))
        self.conv_in = _scaled(first, CLAMP, 1.0, 0.0)
        layers: list[nn.Module] = []
        for layer in middle:
            if layers and isinstance(layers[-1], nn.Upsample):
                layers[-1] = _upsample(layer)
            else:
                layers.append(layer)
        self.layers = nn.Sequential(*layers)
        self.conv_out = _scaled(last, 2.0, 2.0, -1.0)

    def forward(self, latents: torch.Tensor) -> dict[str, torch.Tensor]:
        z = torch.tanh(latents * self.scale).permute(0, 3, 1, 2)
        return {"image": self.conv_out(self.layers(self.conv_in(z))).permute(0, 2, 3, 1)}


def _scaled(conv: nn.Conv2d, by: float, bias_by: float, plus: float) -> nn.Conv2d:
    """A convolution of `by` times the weights and `bias_by` times the bias `plus` a number."""
    with torch.device("meta"):
        new = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1)
    new.weight = view(conv.weight.detach() * by)
    new.bias = view(conv.bias.detach() * bias_by + plus)  # type: ignore[union-attr]  # TAESD's ends have one
    return new


def _upsample(conv: nn.Module) -> Upsample2D:
    """Nearest-neighbour doubling with the convolution behind it."""
    assert isinstance(conv, nn.Conv2d)
    with torch.device("meta"):
        new = Upsample2D(conv.in_channels, use_conv=True, out_channels=conv.out_channels, bias=False)
    new.conv = conv
    return new


Call = dict[str, np.ndarray]


@dataclass(frozen=True)
class UNetForm:
    """Rows of a call, where the time embedding is computed, and whether the DDIM step is in the graph.

    See `wrappers.UNet` for the tensors. `batch` is 2 with classifier-free guidance in one call, 1 in two calls or
    with guidance embedded or folded.
    """

    batch: int
    time_embedding: TimeEmbeddingAt = "inside"
    scheduler_step: bool = False

    @property
    def output(self) -> str:
        """The name of the file's output."""
        return "prev_sample" if self.scheduler_step else "noise_pred"

    def calls(self, call: Mapping[str, np.ndarray], time_proj: torch.nn.Module) -> list[Call]:
        """Calls of the file whose outputs, one after the other, are the rows of the plain UNet's `call`.

        With the DDIM step in the graph, the coefficients (scale, 0, 1) give back the prediction: of the negative
        prompt with scale 0, of the prompt with scale 1.
        """
        rows = len(call["timestep"])
        inputs = dict(call)
        if self.time_embedding == "outside":
            inputs["timestep_embedding"] = time_proj(torch.from_numpy(inputs.pop("timestep"))).numpy()
        parts = [{key: value[i : i + self.batch] for key, value in inputs.items()} for i in range(0, rows, self.batch)]
        if not self.scheduler_step:
            return parts
        result = []
        for part in parts:
            for scale in range(self.batch) if self.batch == 2 else (1,):
                coefficients = np.array([[scale, 0.0, 1.0]], np.float32)
                result.append({**part, "sample": part["sample"][:1], "step_coefficients": coefficients})
        return result


def unet_form(guidance: Guidance, target: str, two_calls: bool = False, scheduler_step: bool = False) -> UNetForm:
    """The form for `target`: on GPUs the time embedding comes from outside, as fp16 sines are wrong.

    Raises PocketfusionError for a step in the graph whose two predictions are two calls' outputs.
    """
    batch = 2 if guidance == "classifier-free" and not two_calls else 1
    if scheduler_step and two_calls and guidance == "classifier-free":
        raise PocketfusionError(
            "--scheduler-step guides in the UNet's graph, and --two-calls asks for the two predictions one after the "
            "other: leave one of them out"
        )
    return UNetForm(batch, "outside" if target == "litert-gpu" else "inside", scheduler_step)


def time_embedding_spec(unet: Any) -> TimeEmbedding:
    """How the runtime computes `timestep_embedding`, from the UNet's config."""
    config = unet.config
    return TimeEmbedding.made(
        dim=config.block_out_channels[0],
        flip_sin_to_cos=config.flip_sin_to_cos,
        downscale_freq_shift=config.freq_shift,
    )


def joined(outputs: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """The file's outputs [N, ...], `counts` of them for each plain call, as [calls, rows, H, W, C]."""
    result, start = [], 0
    for count in counts:
        result.append(np.concatenate(outputs[start : start + count]))
        start += count
    return np.stack(result)
