"""How much each layer's weights may be rounded: its form changed alone, the network's output compared.

Two figures per layer and form, both noise powers relative to the signal's: of the output, and in a UNet of the
guidance direction (conditional minus unconditional prediction), which is small and multiplied by the guidance scale.
Mixed precision by measured sensitivity is Apple's recipe for Stable Diffusion (python_coreml_stable_diffusion,
mixed-bit compression); the direction is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from pocketfusion.artefact import write_json
from pocketfusion.errors import PocketfusionError
from pocketfusion.mobile.gate import guidance_std
from pocketfusion.mobile.inputs import GateInputs
from pocketfusion.mobile.pack import Form
from pocketfusion.mobile.simulate import layer_operation, quantizable, simulated
from pocketfusion.mobile.targets import TargetName


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Effect(_Strict):
    """Noise powers over signal powers, and the guidance delta (`gate.guidance_delta`), of one form of one layer."""

    noise: float
    direction_noise: float | None = None
    guidance_delta: float | None = None

    @property
    def worst(self) -> float:
        """The larger of the noises."""
        return max(self.noise, self.direction_noise or 0.0)


class Layer(_Strict):
    """A layer: its size and work (multiply-adds of one sample), and what each form of its weight does."""

    name: str
    operation: str
    parameters: int
    channels: int
    macs: int
    effects: dict[Form, Effect]


class Sensitivity(_Strict):
    """The layers of a folder's networks; `model` is the folder's hash, `samples` the network calls compared."""

    format: Literal["pocketfusion-sensitivity"] = "pocketfusion-sensitivity"
    version: Literal[1] = 1
    model: str
    target: TargetName
    samples: int
    networks: dict[str, list[Layer]] = {}

    @classmethod
    def load(cls, path: Path) -> Sensitivity:
        """Reads an analysis; raises PocketfusionError if it is none."""
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise PocketfusionError(f"{path} cannot be read ({error.strerror}): check its path") from None
        except (ValidationError, ValueError):
            raise PocketfusionError(f"{path} is not a sensitivity analysis: remove it to make it anew") from None


class Probe:
    """One network on fixed inputs: what a change of its weights does to its output."""

    def __init__(self, name: str, wrapped: nn.Module, network: nn.Module, reference: GateInputs, samples: int):
        """`wrapped`: the network as exported, which `network`, with diffusers' names, is a part of."""
        calls = reference.inputs[name]
        rows = len(calls) * len(next(iter(calls[0].values()))) // reference.rows if name == "unet" else len(calls)
        count = max(samples, 2) if name == "text_encoder" else samples  # two prompts tell what depends on them
        keep = np.unique(np.linspace(0, rows - 1, min(count, rows)).round().astype(int))
        merged = {key: np.concatenate([call[key] for call in calls]) for key in calls[0]}
        step = reference.rows if name == "unet" else 1
        index = (keep[:, None] * step + np.arange(step)).reshape(-1)
        self.inputs = {key: torch.from_numpy(value[index]) for key, value in merged.items()}
        self.network, self._wrapped, self._step = network, wrapped, step
        mask = self.inputs.get("attention_mask")
        self._tokens = mask.bool().numpy() if mask is not None else None
        self.exact = self._run()

    @torch.no_grad()
    def _run(self) -> np.ndarray:
        (output,) = self._wrapped(**self.inputs).values()
        values = output.numpy()
        if self._tokens is not None:
            return values[self._tokens]  # states at padding are ill-conditioned and have a gate of their own
        return values.reshape(-1, self._step, *values.shape[1:])

    def effect(self, forms: Mapping[str, Form], target: TargetName) -> Effect:
        """What the layers named in `forms` do together."""
        with simulated(self.network, forms, target):
            measured = self._run()
        noise = _power(measured - self.exact) / _power(self.exact)
        if self._step == 1:
            return Effect(noise=noise)
        exact, found = self.exact[:, 1] - self.exact[:, 0], measured[:, 1] - measured[:, 0]
        if not _power(exact):
            return Effect(noise=noise)
        return Effect(
            noise=noise,
            direction_noise=_power(found - exact) / _power(exact),
            guidance_delta=guidance_std(measured) / guidance_std(self.exact),
        )

    @torch.no_grad()
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Output channels and multiply-adds of one sample, by layer."""
        found: dict[str, tuple[int, int]] = {}

        def count(name: str) -> Callable[..., None]:
            def hook(module: Any, inputs: Any, output: torch.Tensor) -> None:
                weight = module.weight
                if isinstance(module, nn.Embedding) and bool((inputs[0] == inputs[0][:1]).all()):
                    return  # the same for every prompt, such as positions: a constant in the exported graph
                each = 0 if isinstance(module, nn.Embedding) else weight[0].numel()
                found[name] = weight.shape[0], output.numel() // self._batch * each

            return hook

        hooks = [layer.register_forward_hook(count(name)) for name, layer in quantizable(self.network).items()]
        self._run()
        for hook in hooks:
            hook.remove()
        return found

    @property
    def _batch(self) -> int:
        return len(next(iter(self.inputs.values())))


def analyse(
    probe: Probe,
    forms: Sequence[Form],
    target: TargetName,
    known: Sequence[Layer] = (),
    done: Callable[[Layer, int, int], None] = lambda layer, index, count: None,
) -> list[Layer]:
    """Every layer of the probe's network with the effect of each of `forms`; `known` ones are not measured again.

    `done(layer, index, count)` is called after each, so that a long analysis can be kept and resumed.
    """
    layers, sizes = quantizable(probe.network), probe.sizes()
    before = {layer.name: layer for layer in known}
    result = []
    for index, (name, module) in enumerate(layers.items()):
        if name not in sizes:  # a layer that does not run in the exported network
            continue
        found = before.get(name)
        missing = [form for form in forms if found is None or form not in found.effects]
        if missing:
            effects = {form: probe.effect({name: form}, target) for form in missing}
            channels, macs = sizes[name]
            found = Layer(
                name=name,
                operation=layer_operation(module),
                parameters=module.weight.numel(),
                channels=channels,
                macs=macs,
                effects={**(found.effects if found else {}), **effects},
            )
        assert found is not None
        result.append(found)
        done(found, index, len(layers))
    return result


def save(sensitivity: Sensitivity, path: Path) -> None:
    """Writes the analysis as JSON, atomically."""
    write_json(path, sensitivity.model_dump(mode="json", exclude_none=True))


def _power(values: np.ndarray) -> float:
    return float(np.mean(np.square(values, dtype=np.float64)))
