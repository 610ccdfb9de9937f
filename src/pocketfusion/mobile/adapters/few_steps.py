"""Few-step adapters by the name of their method: the sampler, steps and guidance that each was distilled for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pocketfusion.errors import PocketfusionError
from pocketfusion.models.sampling import Sampling, read_sampling
from pocketfusion.runtime.samplers.sampler import with_eta
from pocketfusion.runtime.specs import SAMPLERS, SamplerName, SchedulerSpec

_STEPS = re.compile(r"(?<![0-9])([0-9]{1,2})[-_ ]?steps?(?![a-z])", re.IGNORECASE)
_MOST = 16  #: of what a file's name calls its steps; those of a training are more
_CFG = re.compile(r"(?<![a-z])cfg(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class FewSteps:
    """How a method's published adapters are drawn: all with `trailing` spacing, as they begin at pure noise.

    `samplers`: the first, unless another one is asked for. `guidance_scale`, in diffusers' terms, where 1 and less is
    one call a step: without guidance, or what adapters need that were distilled to be guided, which have CFG in their
    files' names. `most_guidance`: above it pictures break. `eta`: of the method's with the sampler TCD.
    """

    samplers: tuple[SamplerName, ...]
    num_inference_steps: int = 4
    guidance_scale: float = 1.0
    cfg_guidance_scale: float = 1.0
    most_guidance: float = 2.0
    eta: float | None = None


#: LCM-LoRA (arXiv 2311.05556), Hyper-SD (2404.13686), TCD (2402.19159), SDXL-Lightning (2402.13929), with the settings
#: of their authors' model cards; docs/few-steps.md has the table.
FEW_STEPS: Final = {
    "lcm": FewSteps(("lcm",)),
    "hyper": FewSteps(("ddim", "tcd"), cfg_guidance_scale=5.0, most_guidance=8.0, eta=1.0),
    "tcd": FewSteps(("tcd",), eta=0.3),
    "lightning": FewSteps(("euler", "ddim")),
}


def check_names(few_steps: str | None, sampler: str | None, guidance_scale: float | None) -> None:
    """Raises PocketfusionError for a name that is none, and for what the method's adapters are not drawn with."""
    for option, name, known in (("--sampler", sampler, SAMPLERS), ("--few-steps", few_steps, FEW_STEPS)):
        if name is not None and name not in known:
            raise PocketfusionError(f"{option} has no {name[:80]!a}: choose {', '.join(known)}")
    if few_steps is None:
        return
    method = FEW_STEPS[few_steps]
    if sampler is not None and sampler not in method.samplers:
        raise PocketfusionError(
            f"--few-steps {few_steps} is drawn with {' or '.join(method.samplers)} and --sampler is {sampler}: leave "
            "--sampler out"
        )
    if guidance_scale is not None and guidance_scale > method.most_guidance:
        raise PocketfusionError(
            f"--guidance is {guidance_scale:g}, but adapters of {few_steps} have guidance in them and break above "
            f"{method.most_guidance:g}: leave --guidance out"
        )


def few_step_sampling(few_steps: str, adapters: Sequence[Path], folder: Path, known: Sampling) -> Sampling:
    """How `folder`, whose own sampling is `known`, is drawn with the method's `adapters` in it.

    An adapter of N steps has N in its file's name, which counts before the method's own number. Raises
    PocketfusionError for folders that have few steps of their own, and names of different numbers.
    """
    if read_sampling(folder) is not None:
        raise PocketfusionError(
            f"{folder} was distilled to {known.num_inference_steps} steps of its own, as its sampling.json says: "
            "leave --few-steps out, or give the folder that it was made from"
        )
    if known.guidance == "embedded":
        raise PocketfusionError(
            f"{folder} takes the guidance scale as an input, as LCM's own models do, and is drawn in "
            f"{known.num_inference_steps} steps as it is: leave --few-steps out"
        )
    method = FEW_STEPS[few_steps]
    steps = {int(found[1]) for file in adapters if (found := _STEPS.search(file.stem))} & set(range(1, _MOST + 1))
    if len(steps) > 1:
        raise PocketfusionError(
            f"the adapters' names say {' and '.join(map(str, sorted(steps)))} steps: give one of them alone"
        )
    guided = any(_CFG.search(file.stem) for file in adapters)
    return Sampling(
        num_inference_steps=steps.pop() if steps else method.num_inference_steps,
        guidance_scale=method.cfg_guidance_scale if guided else method.guidance_scale,
    )


def chosen_sampler(
    own: SamplerName, spec: SchedulerSpec, few_steps: str | None, sampler: str | None, eta: float | None
) -> tuple[SamplerName, SchedulerSpec]:
    """The bundle's sampler and schedule: those asked for, else the method's, else the folder's `own` and its `spec`.

    Raises PocketfusionError for an eta that is none, or of another sampler.
    """
    method = FEW_STEPS.get(few_steps or "")
    name = next((known for known in SAMPLERS if known == sampler), method.samplers[0] if method else own)
    if method:
        spec = spec.model_copy(update={"timestep_spacing": "trailing"})
        eta = method.eta if eta is None and name == "tcd" else eta
    return name, with_eta(spec, name, eta)
