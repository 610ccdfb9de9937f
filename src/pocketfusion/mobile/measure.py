"""An exported network's figures against PyTorch: SQNR, guidance delta, size, parameters, multiply-adds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from pocketfusion.mobile import gate, specs
from pocketfusion.mobile.inputs import GateInputs
from pocketfusion.mobile.rewrites.passes import on_meta
from pocketfusion.mobile.unet_form import UNetForm, joined
from pocketfusion.runtime.specs import TensorSpec

#: Runs a network's file on each of some inputs; the output called so of all, stacked.
Run = Callable[[list[dict[str, np.ndarray]], str], np.ndarray]


@dataclass(frozen=True)
class NetworkReport:
    """One network's row of the report.

    `sqnr_db` is over all gate inputs together (text encoder: at the prompts' tokens), `padding_sqnr_db` the text
    encoder's at the padding; `chain_sqnr_db` and `guidance_delta` are the UNet's, fed by the exported text encoder.
    `fp16_sqnr_db` and `fp16_guidance_delta` are of runtimes whose files compute in fp16: with each operation's result
    rounded so, where the others are in float32 arithmetic.
    """

    name: str
    weights: str
    size: int
    parameters: int
    macs: int
    sqnr_db: float
    padding_sqnr_db: float | None = None
    chain_sqnr_db: float | None = None
    guidance_delta: float | None = None
    fp16_sqnr_db: float | None = None
    fp16_guidance_delta: float | None = None


@dataclass(frozen=True)
class Described:
    """What is known of a network before it is converted: its tensors and sizes."""

    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    parameters: int
    macs: int


@torch.no_grad()
def describe(module: nn.Module, inputs: specs.Samples, plain: nn.Module, one: specs.Samples) -> Described:
    """Of `module`, that is converted with `inputs`; the multiply-adds are of the `plain` one on `one` sample. Nothing
    is computed but shapes."""
    shapes, shape = ({name: value.to("meta") for name, value in samples.items()} for samples in (inputs, one))
    return Described(
        specs.tensor_specs(inputs),
        specs.tensor_specs(on_meta(module)(**shapes)),
        sum(p.numel() for p in plain.parameters()),
        specs.multiply_adds(on_meta(plain), shape),
    )


def run_file(
    run: Run,
    network: str,
    reference: GateInputs,
    form: UNetForm | None = None,
    unet: Any = None,
    embeds: np.ndarray | None = None,
) -> np.ndarray:
    """The outputs of the file that `run` runs on the gate's inputs; with `embeds`, the UNet attends to these instead
    of PyTorch's.

    `form` is that of a UNet's file, `unet` the network that it was made from.
    """
    inputs = reference.inputs[network]
    output = {"text_encoder": "prompt_embeds", "unet": "noise_pred", "decoder": "image"}[network]
    if form is None:
        return run(inputs, output)
    if embeds is not None:
        states = [np.concatenate([embeds[prompt] for prompt in prompts]) for prompts in reference.prompts]
        inputs = [one | {"encoder_hidden_states": s} for one, s in zip(inputs, states, strict=True)]
    calls = [form.calls(one, unet.time_proj) for one in inputs]
    outputs = run([call for part in calls for call in part], form.output)
    return joined(outputs, [len(part) for part in calls])


def measure(
    network: str,
    label: str,
    forms: Mapping[str, str],
    run: Run,
    size: int,
    described: Described,
    unet: Any,
    measured: np.ndarray,
    reference: GateInputs,
    embeds: np.ndarray | None,
    form: UNetForm | None = None,
) -> NetworkReport:
    """The network's figures; raises PocketfusionError if one misses its gate.

    `label` names its weights in the report, `size` is its files'; `forms` has the coarsest form of it and of the
    networks before it, which set the gates.
    """
    expected, kind = reference.outputs[network], forms[network]
    coarser = max((forms[name] for name in ("text_encoder", "unet") if name in forms), key=gate.FORMS.index)
    padding = chain = delta = None
    if network == "text_encoder":
        tokens = np.stack([one["attention_mask"] for one in reference.inputs[network]]).astype(bool)
        sqnr = gate.sqnr(expected[tokens], measured[tokens])
        if not tokens.all():
            padding = gate.sqnr(expected[~tokens], measured[~tokens])
            gate.check_sqnr("text encoder's padding", kind, padding, gate.MIN_PADDING_SQNR)
    else:
        sqnr = gate.sqnr(expected, measured)
    gate.check_sqnr(network.replace("_", " "), kind, sqnr)
    if network == "unet":
        fed = run_file(run, network, reference, form, unet, embeds)
        chain = gate.sqnr(expected, fed)
        delta = gate.guidance_delta(reference.by_step(expected), reference.by_step(fed))
        if delta is not None:
            gate.check_guidance(coarser, delta)
        gate.check_sqnr("unet, fed by the exported text encoder,", coarser, chain)
    return NetworkReport(
        name=network,
        weights=label,
        size=size,
        parameters=described.parameters,
        macs=described.macs,
        sqnr_db=round(sqnr, 2),
        padding_sqnr_db=None if padding is None else round(padding, 2),
        chain_sqnr_db=None if chain is None else round(chain, 2),
        guidance_delta=None if delta is None else round(delta, 5),
    )
