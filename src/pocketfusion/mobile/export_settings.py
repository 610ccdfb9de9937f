"""What an export is asked for, checked before minutes of work."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from pocketfusion.artefact import check_new, sha256_file
from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import check_folder, folder_hash
from pocketfusion.mobile.adapters.few_steps import check_names, chosen_sampler, few_step_sampling
from pocketfusion.mobile.adapters.lora_file import check_lora
from pocketfusion.mobile.devices import TARGETS, DeviceName, Target, TargetName
from pocketfusion.mobile.measure import STEPS
from pocketfusion.mobile.pipeline_specs import sampler_of, scheduler_spec
from pocketfusion.mobile.quantization.weight_forms import NetworkRecipe, WeightRecipe
from pocketfusion.mobile.rewrites import PASSES
from pocketfusion.mobile.target_options import OLDEST, check_forms, check_onnx_options, check_options
from pocketfusion.mobile.wrappers import StablePipeline
from pocketfusion.models.learnt_tokens import read_embedding
from pocketfusion.models.sampling import Sampling, read_sampling, usual_sampling
from pocketfusion.models.tiny_autoencoder import check_vae, vae_hash
from pocketfusion.runtime.manifest import MANIFEST, NETWORKS, Defaults
from pocketfusion.runtime.samplers.sampler import Sampler
from pocketfusion.runtime.specs import MULTISTEP, SamplerName, SchedulerSpec
from pocketfusion.runtime.tiles import check_tile

#: Settings that change nothing in the float32 networks.
_OF_THE_SAMPLING = ("num_inference_steps", "guidance_scale", "sampler", "eta", "few_steps")
_NOT_IN_THE_GRAPH = ("weights", "recipe", *_OF_THE_SAMPLING, "gate_steps", "gpu_fp32", "made_for")


@dataclass(frozen=True)
class ExportSettings:
    """How a folder is exported; the command's options by their names.

    `weights`: per network a form of all its weights, float32 where not given; `recipe`, a weight recipe's file, gives
    each layer's instead. `rewrites`: passes beside the target's own (`mobile.rewrites.PASSES`). `two_calls`:
    classifier-free guidance as two calls of batch 1. `scheduler_step`: the DDIM step in the UNet's graph.
    `decoder_tile`: the decoder takes tiles of so many latents a side. `size`: height and width of the pictures in
    pixels, the folder's where None. `vae`: an autoencoder whose decoder takes the place of the folder's. `lora`:
    adapters to merge, each with its scale. `embedding`: textual inversions to add. `gpu_fp32`: networks that need fp32
    on the GPU, for the manifest (`check` says which). `gate_steps`: sampling steps, for each of two prompts, that the
    gate compares. `made_for`: the device whose settings these are (`devices.options_for`), for the manifest.
    `few_steps`: a method's name, whose settings then are the bundle's (`adapters.few_steps`). `sampler`, and `eta` of
    TCD: the bundle's, in place of the folder's. `ios`: the oldest iOS that loads a Core ML bundle, 17 where None.
    `layout`: `apple` for Core ML files as Apple's Swift package StableDiffusion reads them, `diffusers` for ONNX files
    as its OnnxStableDiffusionPipeline does.
    """

    weights: Mapping[str, str] = field(default_factory=dict)
    recipe: Path | None = None
    target: TargetName = "litert-cpu"
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    few_steps: str | None = None
    sampler: str | None = None
    eta: float | None = None
    rewrites: tuple[str, ...] = ()
    two_calls: bool = False
    scheduler_step: bool = False
    decoder_tile: int | None = None
    size: tuple[int, int] | None = None
    vae: Path | None = None
    lora: tuple[tuple[Path, float], ...] = ()
    embedding: tuple[Path, ...] = ()
    gate_steps: int = STEPS
    gpu_fp32: tuple[str, ...] = ()
    made_for: DeviceName | None = None
    ios: int | None = None
    layout: str = "bundle"

    def check(self, folder: Path, out: Path | None, overwrite: bool) -> None:
        """Raises PocketfusionError for whatever can be refused before anything is loaded; of `out` if it is given."""
        check_forms(self.target, self.weights, self.layout)
        if self.num_inference_steps is not None and not 1 <= self.num_inference_steps <= 1000:
            raise PocketfusionError(f"--steps is {self.num_inference_steps}: choose 1 to 1000")
        unknown = [name for name in self.rewrites if name not in PASSES]
        if unknown:
            raise PocketfusionError(f"--rewrites has {unknown[0]!r}: choose among {', '.join(PASSES)}")
        for network in self.gpu_fp32:
            if network not in NETWORKS:
                raise PocketfusionError(f"--gpu-fp32 has {network!r}: choose among {', '.join(NETWORKS)}")
            if self.target != "litert-gpu":
                raise PocketfusionError(f"--gpu-fp32 is {network!r} and the target {self.target}: it is of litert-gpu")
        if not 1 <= self.gate_steps <= 50:
            raise PocketfusionError(f"--gate-steps is {self.gate_steps}: choose 1 to 50")
        if self.guidance_scale is not None and not np.isfinite(self.guidance_scale):
            raise PocketfusionError(f"--guidance is {self.guidance_scale}: choose a finite number, such as 4")
        check_names(self.few_steps, self.sampler, self.guidance_scale)
        if self.recipe is not None and any(kind != "float32" for kind in self.weights.values()):
            raise PocketfusionError("--recipe and --weights both say how weights are stored: give one of them")
        check_folder(folder)
        check_options(self, folder)
        check_onnx_options(self, folder)
        if out is not None:
            if overwrite and out.is_dir() and not (out / MANIFEST).is_file():
                raise PocketfusionError(
                    f"{out} exists and is not a bundle: it is not replaced, choose another output path"
                )
            check_new(out, overwrite)
        if self.vae is not None:
            check_vae(self.vae, folder)
        for file, scale in self.lora:
            check_lora(file, scale)
        for file in self.embedding:
            read_embedding(file)

    @property
    def device(self) -> Target:
        """The target with the rewrites asked for."""
        target = TARGETS[self.target]
        return target.model_copy(update={"rewrites": (*target.rewrites, *self.rewrites)})

    def chosen(self) -> dict[str, Any]:
        """What the networks' form follows from, as JSON values for the manifest; adapters and recipe apart."""
        said = {
            name: getattr(self, name) for name in ("target", "rewrites", "two_calls", "scheduler_step", "gpu_fp32")
        }
        said |= {name: value for name in ("decoder_tile", "size") if (value := getattr(self, name)) is not None}
        if self.device.runtime == "coreml":
            said |= {"ios": self.ios or OLDEST}
        if len(self.device.layouts) > 1:
            said |= {"layout": self.layout}
        weights = "recipe" if self.recipe else self.kinds()
        found = ({"for": self.made_for} if self.made_for else {}) | said | {"weights": weights}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}

    def kinds(self) -> dict[str, str | NetworkRecipe]:
        """How the weights of each network are stored; raises PocketfusionError if the recipe is damaged."""
        if self.recipe is None:
            return {network: self.weights.get(network, self.device.forms[0]) for network in NETWORKS}
        recipe = WeightRecipe.load(self.recipe)
        if recipe.target != self.target:
            raise PocketfusionError(
                f"{self.recipe} was made for {recipe.target}: export with --target {recipe.target} or make one for "
                f"{self.target}"
            )
        return {network: getattr(recipe, network) for network in NETWORKS}

    def sampling(self, folder: Path) -> Sampling:
        """The folder's own, or that of the few-step method."""
        known = usual_sampling(folder)
        if self.few_steps is None:
            return known
        return few_step_sampling(self.few_steps, [file for file, _ in self.lora], folder, known)

    def drawn_with(self, folder: Path, pipeline: StablePipeline, steps: int) -> tuple[SamplerName, SchedulerSpec]:
        """The bundle's sampler and schedule; raises PocketfusionError for a sampler that cannot draw the model so."""
        student = read_sampling(folder) is not None  # taught the timesteps of its DDIM steps alone
        own = "ddim" if student else sampler_of(pipeline.scheduler)
        sampler, spec = chosen_sampler(own, scheduler_spec(pipeline), self.few_steps, self.sampler, self.eta)
        if student and sampler != "ddim":
            raise PocketfusionError(
                f"--sampler is {sampler}, but {folder} was taught the timesteps of its own DDIM steps alone: leave "
                "--sampler out"
            )
        if self.scheduler_step and sampler in MULTISTEP:
            raise PocketfusionError(
                f"--scheduler-step is of one-step samplers, and {'--sampler is' if self.sampler else f'{folder} has'} "
                f"{sampler}: leave --scheduler-step out"
            )
        Sampler(sampler, spec).set_timesteps(steps)
        return sampler, spec

    def defaults(self, folder: Path, known: Sampling) -> Defaults:
        """Given, else `known`, the folder's; raises PocketfusionError for a scale that is not the folded one."""
        if known.guidance == "folded" and self.guidance_scale not in (None, known.guidance_scale):
            raise PocketfusionError(
                f"--guidance is {self.guidance_scale:g} but {folder} has {known.guidance_scale:g} folded in: "
                "leave --guidance out"
            )
        steps, scale = self.num_inference_steps, self.guidance_scale
        return Defaults.made(
            num_inference_steps=known.num_inference_steps if steps is None else steps,
            guidance_scale=known.guidance_scale if scale is None else scale,
        )

    def resize(self, pipeline: StablePipeline) -> None:
        """Sets the size of the pipeline's latents to that of the pictures asked for.

        Raises PocketfusionError for sizes that the networks cannot halve often enough, and for a tile beyond them.
        """
        unet, vae = pipeline.unet.config, pipeline.vae.config
        factor = 2 ** (len(vae.block_out_channels) - 1)
        step = factor * 2 ** (len(unet.block_out_channels) - 1)
        if self.size is not None:
            for pixels in self.size:
                if pixels < step or pixels % step:
                    near = max(step, step * round(pixels / step))
                    raise PocketfusionError(
                        f"--size has {pixels} pixels: this model's pictures are multiples of {step}, such as {near}"
                    )
            pipeline.unet.register_to_config(sample_size=[pixels // factor for pixels in self.size])
        if self.decoder_tile is not None:
            side = pipeline.unet.config.sample_size
            height, width = (side, side) if isinstance(side, int) else side
            check_tile(self.decoder_tile, height, width)

    def conversion_key(self, folder: Path, network: str) -> str:
        """Names the converted network: another folder, adapter, form or version gives another key."""
        said = {k: v for k, v in asdict(self).items() if k not in _NOT_IN_THE_GRAPH}
        said["vae"] = vae_hash(self.vae) if self.vae else None
        said["lora"] = [(sha256_file(file), scale) for file, scale in self.lora]
        said["embedding"] = [sha256_file(file) for file in self.embedding]
        converter = {"litert": "litert-torch", "coreml": "coremltools", "onnx": "onnxscript"}[self.device.runtime]
        made_by = [version(package) for package in (converter, "torch", "diffusers", "pocketfusion")]
        parts = [folder_hash(folder), network, json.dumps(said, sort_keys=True, default=str), *made_by]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:20]
