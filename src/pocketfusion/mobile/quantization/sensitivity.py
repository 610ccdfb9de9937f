"""How much each layer's weights may be rounded: its form changed alone, the network's output compared.

Two figures per layer and form, both noise powers relative to the signal's: of the output, and in a UNet of the
guidance direction (conditional minus unconditional prediction), which is small and multiplied by the guidance
scale. Mixed precision by measured sensitivity is Apple's recipe for Stable Diffusion
(python_coreml_stable_diffusion, mixed-bit compression); the direction is ours.

The network is PyTorch's with simulated quantisation: it computes with the values which packed weights would give
it, and nothing gets smaller (`packing` does that). Weights are rounded by the packer's own function. The dynamic
forms on a CPU round activations too: XNNPACK takes one scale and zero point per row of a matrix product (a token)
and per picture of a convolution; the GPU delegate computes the same forms in floating point.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from pocketfusion.artefact import atomic_file, write_json
from pocketfusion.errors import PocketfusionError
from pocketfusion.mobile.devices import TargetName
from pocketfusion.mobile.gate import guidance_std
from pocketfusion.mobile.measure import GateInputs
from pocketfusion.mobile.quantization.packing import Form, rounded, storable


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


def decibels(noise: float) -> float:
    """SQNR in dB of a noise power over its signal's, at most 200."""
    return min(200.0, -10 * math.log10(noise)) if noise > 0 else 200.0


#: Modules whose weights are quantised, and the operation that each becomes.
_LAYERS: dict[type[nn.Module], str] = {
    nn.Linear: "FULLY_CONNECTED",
    nn.Conv2d: "CONV_2D",
    nn.Embedding: "EMBEDDING_LOOKUP",
}


def quantizable(network: nn.Module) -> dict[str, Any]:
    """The layers of `network` that have a form, by name."""
    return {name: module for name, module in network.named_modules() if type(module) in _LAYERS}


def layer_operation(layer: nn.Module) -> str:
    """The `.tflite` operation that a layer becomes."""
    return _LAYERS[type(layer)]


def rounded_activations(x: torch.Tensor, operation: str) -> torch.Tensor:
    """`x` rounded to 8 bits with a zero point, as XNNPACK's dynamic operators do: per token, or per picture."""
    axes = (-1,) if operation == "FULLY_CONNECTED" else tuple(range(1, x.ndim))
    low, high = x.amin(axes, keepdim=True).clamp(max=0), x.amax(axes, keepdim=True).clamp(min=0)
    scale = ((high - low) / 255).clamp(min=torch.finfo(torch.float32).tiny)
    zero_point = torch.round(-128 - low / scale)
    return (torch.clamp(torch.round(x / scale) + zero_point, -128, 127) - zero_point) * scale


@contextmanager
def simulated(network: nn.Module, forms: Mapping[str, Form], target: TargetName = "litert-cpu") -> Iterator[None]:
    """`network` computes as if its layers named in `forms` had these forms on `target`, while the block runs."""
    layers = quantizable(network)
    with ExitStack() as undo:
        for name, form in forms.items():
            layer = layers[name]
            operation = layer_operation(layer)
            exact = layer.weight.data
            layer.weight.data = torch.from_numpy(rounded(exact.numpy(), storable(form, operation)))
            undo.callback(setattr, layer.weight, "data", exact)
            if form.endswith("dynamic") and target == "litert-cpu" and operation != "EMBEDDING_LOOKUP":
                undo.callback(layer.register_forward_pre_hook(_rounding(operation)).remove)
        yield


def _rounding(operation: str) -> Any:
    return lambda module, inputs: (rounded_activations(inputs[0], operation), *inputs[1:])


#: Above this many dB a layer is unchanged (its weights were stored in float16 already) and is not drawn.
_UNCHANGED = 150.0
_COLOURS: dict[Form, str] = {
    "float16": "#4c9f70",
    "int8": "#3b6fb6",
    "int8-dynamic": "#e08e2b",
    "int4-dynamic": "#b8434e",
}


def draw(sensitivity: Sensitivity, path: Path) -> None:
    """Writes a PNG: for each network its layers in order, and the dB that are left when one is rounded alone."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    networks = {name: layers for name, layers in sensitivity.networks.items() if layers}
    figure, rows = plt.subplots(len(networks), 1, figsize=(11, 3.2 * len(networks)), layout="constrained")
    for axes, (name, layers) in zip([rows] if len(networks) == 1 else rows, networks.items(), strict=True):
        forms = [form for form in _COLOURS if any(form in layer.effects for layer in layers)]
        for form in forms:
            found = [
                (i, decibels(layer.effects[form].worst)) for i, layer in enumerate(layers) if form in layer.effects
            ]
            points = [(i, value) for i, value in found if value < _UNCHANGED]
            if points:
                axes.scatter(*zip(*points, strict=True), s=9, color=_COLOURS[form], label=form)
        axes.set_title(
            f"{name.replace('_', ' ')}: quality left when one layer alone is rounded", loc="left", fontsize=10
        )
        axes.set_ylabel("dB (output or guidance\ndirection, the worse)", fontsize=8)
        axes.set_xlabel("layers, in the order of the network", fontsize=8)
        axes.grid(alpha=0.3, linewidth=0.5)
        axes.tick_params(labelsize=8)
        worst = min(range(len(layers)), key=lambda i: min(decibels(e.worst) for e in layers[i].effects.values()))
        lowest = min(decibels(effect.worst) for effect in layers[worst].effects.values())
        side = "right" if worst > len(layers) / 2 else "left"
        axes.annotate(f"{layers[worst].name}  ", (worst, lowest), fontsize=7, ha=side, va="center")
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    with atomic_file(path) as partial:
        figure.savefig(partial, dpi=130, format="png")
    plt.close(figure)
