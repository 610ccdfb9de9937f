"""What a unit's loss does to a UNet's output, for all units at once, by a first-order estimate.

A unit that goes is a mask of 0 instead of 1 on it, just before the layer that reads it. That layer is linear, so the
block's output is linear in the mask: what a Taylor series of first order leaves out is only what later blocks bend.
For random signs v, the squared derivative of <v, output> by a mask is on average the squared length of the derivative
of the whole output (Hutchinson's estimator), so one backward pass estimates the harm of every unit. Taylor scores of
units are from Molchanov et al. (arXiv 1611.06440), which takes the loss's derivative; the output's, and that of the
guidance direction, which is small and multiplied by the guidance scale, is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from pocketfusion.data.packed import CaptionedImages
from pocketfusion.evaluate.sets import choose_sets
from pocketfusion.models.elastic.units import Units
from pocketfusion.models.elastic_unet import ElasticUNet
from pocketfusion.models.guided import guidance_embedding
from pocketfusion.models.slim_autoencoder import to_tensor

Place = tuple[str, Units]  #: a block's name and one of its parts


_BATCH = 16
#: Steps at which latents are taken where a folder does not say how it is sampled.
_STEPS = 25


@dataclass(frozen=True)
class Calls:
    """Calls of a UNet: latents [N, C, h, w], timesteps [N], states [N, T, D] and the empty prompt's [N, T, D].

    `condition` [N, D]: the embedded guidance scale, of a UNet that takes one. `guided`: whether both prompts are run.
    """

    z_t: torch.Tensor
    timesteps: torch.Tensor
    states: torch.Tensor
    null_states: torch.Tensor
    condition: torch.Tensor | None
    guided: bool

    def parts(self) -> Iterator[Calls]:
        """In batches."""
        for i in torch.arange(len(self.z_t)).split(_BATCH):
            condition = None if self.condition is None else self.condition[i]
            yield Calls(self.z_t[i], self.timesteps[i], self.states[i], self.null_states[i], condition, self.guided)

    def run(self, unet: nn.Module) -> torch.Tensor:
        """Predictions [N, R, C, h, w], R = 2 with guidance: of the empty prompt and of the prompt."""
        if not self.guided:
            return unet(self.z_t, self.timesteps, self.states, timestep_cond=self.condition).sample[:, None]
        both = torch.cat([self.null_states, self.states])
        made = unet(torch.cat([self.z_t] * 2), torch.cat([self.timesteps] * 2), both).sample
        return torch.stack(made.chunk(2), dim=1)


@torch.no_grad()
def real_calls(system: Any, data: CaptionedImages, split: str, count: int, seed: int = 0) -> Calls:
    """Up to `count` pictures of `split`, encoded and noised at the timesteps at which `system` is sampled, in turn.

    `system`: a model folder as `evaluate.generate.ModelFolder` opens it.
    Raises PocketfusionError if the data has no such split.
    """
    chosen = choose_sets(data, [split], count)[0]
    vae, device = system.vae, system.unet.device
    batches = np.array_split(np.arange(len(chosen.indices)), math.ceil(len(chosen.indices) / _BATCH))

    def encode(part: np.ndarray) -> torch.Tensor:
        return vae.encode(to_tensor(data.images[chosen.indices[part]]).to(device)).latent_dist.mean

    x = torch.cat([encode(part) for part in batches]) * vae.config.scaling_factor
    steps = system.sampling.num_inference_steps if system.sampling else _STEPS
    system.scheduler.set_timesteps(steps)
    times = system.scheduler.timesteps[:steps]  # as `sample_latents` takes them
    timesteps = times[torch.arange(len(x)) % len(times)].to(device)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(device)
    states = torch.cat([system.text.encode([chosen.captions[i] for i in part])[0] for part in batches])
    condition = None
    if system.guidance == "embedded":
        scale = system.sampling.guidance_scale if system.sampling else 1.0
        scales = torch.full((len(x),), scale, device=device)
        condition = guidance_embedding(scales, system.unet.config.time_cond_proj_dim)
    return Calls(
        z_t=system.scheduler.add_noise(x, noise, timesteps),
        timesteps=timesteps,
        states=states,
        null_states=system.text.encode([""])[0].expand_as(states),
        condition=condition,
        guided=system.guidance == "classifier-free",
    )


@torch.no_grad()
def predictions(unet: nn.Module, calls: Calls) -> torch.Tensor:
    """[N, R, C, h, w] of all calls."""
    return torch.cat([part.run(unet) for part in calls.parts()])


def noise(found: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
    """Noise power over signal power of the predictions, with guidance of its direction too, and how long that is.

    `guidance_delta`: standard deviation of the direction, found over exact, as `mobile.gate` has it.
    """
    result = {"output": _ratio(found - exact, exact)}
    if exact.shape[1] == 2:
        directions = [values[:, 1] - values[:, 0] for values in (found, exact)]
        result["direction"] = _ratio(directions[0] - directions[1], directions[1])
        result["guidance_delta"] = float(directions[0].std() / directions[1].std())
    return result


def _ratio(error: torch.Tensor, signal: torch.Tensor) -> float:
    return float(error.double().square().sum() / signal.double().square().sum())


def unit_harm(
    unet: ElasticUNet,
    places: Collection[Place],
    calls: Calls,
    *,
    probes: int = 4,
    seed: int = 0,
    done: Callable[[int, int], None] = lambda done, total: None,
) -> dict[Place, torch.Tensor]:
    """[count] of each place: estimated noise of the output plus that of the guidance direction if that unit goes.

    As `noise` states both. `probes`: random vectors a call; the estimate's relative error falls with the root of calls
    times probes.
    """
    exact = predictions(unet, calls)
    scales = [1 / float(exact.double().square().sum()) ** 0.5]
    if calls.guided:
        scales.append(1 / float((exact[:, 1] - exact[:, 0]).double().square().sum()) ** 0.5)
    generator = torch.Generator().manual_seed(seed)
    harm = {place: torch.zeros(place[1].count) for place in places}
    unet.requires_grad_(False)
    finished = 0
    for part in calls.parts():
        rows = len(part.z_t)
        device = part.z_t.device
        masks = {place: torch.ones(rows, place[1].count, device=device, requires_grad=True) for place in places}
        with _masked(unet, masks, 2 if part.guided else 1), torch.enable_grad():
            made = part.run(unet)
            signals = [made, made[:, 1] - made[:, 0]] if part.guided else [made]
            for probe in range(probes):
                total = torch.zeros((), device=made.device)
                for signal, scale in zip(signals, scales, strict=True):
                    signs = torch.randint(0, 2, signal.shape, generator=generator).to(signal) * 2 - 1
                    total = total + scale * (signs * signal).sum()
                grads = torch.autograd.grad(total, list(masks.values()), retain_graph=probe + 1 < probes)
                for place, grad in zip(masks, grads, strict=True):
                    harm[place] += grad.square().sum(0).cpu() / probes
        finished += rows
        done(finished, len(calls.z_t))
    return harm


@contextmanager
def _masked(unet: ElasticUNet, masks: dict[Place, torch.Tensor], copies: int) -> Iterator[None]:
    """While it lasts, every place's units are multiplied by its mask [N, count], the same for `copies` rows of N."""

    def hook(mask: torch.Tensor, size: int) -> Callable[..., Any]:
        def multiply(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            channels = mask.repeat(copies, 1).repeat_interleave(size, dim=1)
            x = inputs[0]
            return (x * (channels[:, :, None, None] if x.ndim == 4 else channels[:, None]), *inputs[1:])

        return multiply

    handles = []
    for (name, units), mask in masks.items():
        reader = unet.block(name).get_submodule(units.reader)
        handles.append(reader.register_forward_pre_hook(hook(mask, units.size)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
