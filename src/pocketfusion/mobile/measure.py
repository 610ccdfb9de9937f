"""An exported network's figures against PyTorch: SQNR, guidance delta, size, parameters, multiply-adds.

The inputs are real prompts, and the latents that the PyTorch model meets while drawing them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from pocketfusion.mobile import gate, pipeline_specs
from pocketfusion.mobile.rewrites.passes import on_meta
from pocketfusion.mobile.wrappers import StablePipeline, UNetForm, joined
from pocketfusion.models.guided import guidance_embedding
from pocketfusion.models.noise_schedule import ddim_scheduler
from pocketfusion.models.sampling import Guidance
from pocketfusion.runtime.specs import TensorSpec

PROMPTS = (
    "",
    "a red apple, noto style",
    "grinning face with big eyes",
    "a dog left of a tree on a yellow background",
    "a castle at night",
)
STEPS = 5  #: of each sampling
_SEEDS = (0, 1)


@dataclass(frozen=True)
class GateInputs:
    """Per network: one dict of inputs per run, and PyTorch's outputs stacked [N, ...]. All NHWC numpy."""

    inputs: dict[str, list[dict[str, np.ndarray]]]
    outputs: dict[str, np.ndarray]
    #: indices of the prompts of each UNet run, one for each row of its batch; 0 is the empty one
    prompts: list[list[int]]
    #: predictions of one step: with the empty prompt, with a prompt, and (embedded guidance) with it at another scale
    rows: int

    def by_step(self, predictions: np.ndarray) -> np.ndarray:
        """The UNet's outputs [N, B, H, W, C] as [steps, rows, H, W, C]."""
        return predictions.reshape(-1, self.rows, *predictions.shape[2:])


def tokenize(pipeline: StablePipeline, max_length: int) -> list[dict[str, np.ndarray]]:
    """The prompts as the text encoder's inputs, int32 [1, max_length] each."""
    runs = []
    for prompt in PROMPTS:
        tokens = pipeline.tokenizer(
            prompt, padding="max_length", max_length=max_length, truncation=True, return_tensors="np"
        )
        runs.append({name: tokens[name].astype(np.int32) for name in ("input_ids", "attention_mask")})
    return runs


@torch.no_grad()
def reference_runs(
    pipeline: StablePipeline,
    networks: dict[str, nn.Module],
    max_length: int,
    guidance_scale: float,
    guidance: Guidance = "classifier-free",
    steps: int = STEPS,
) -> GateInputs:
    """Runs the PyTorch networks: every prompt, then a short guided DDIM sampling per seed, each with its own prompt.

    The latents at every step are the UNet's inputs (batch 2: empty prompt, prompt; batch 1, one call after the other,
    with embedded or folded guidance), the last ones the decoder's.
    """

    def call(name: str, inputs: dict[str, np.ndarray]) -> np.ndarray:
        (output,) = networks[name](**{key: torch.from_numpy(value) for key, value in inputs.items()}).values()
        return output.numpy()

    texts = tokenize(pipeline, max_length)
    embeds = [call("text_encoder", one) for one in texts]
    config = pipeline.unet.config
    height, width = (config.sample_size,) * 2 if isinstance(config.sample_size, int) else config.sample_size
    scheduler = ddim_scheduler(pipeline.scheduler)
    runs: dict[str, list[dict[str, np.ndarray]]] = {"text_encoder": texts, "unet": [], "decoder": []}
    outputs: dict[str, list[np.ndarray]] = {"text_encoder": embeds, "unet": [], "decoder": []}
    prompts: list[list[int]] = []
    # of each row: if it has a prompt, and its scale; scale 1 is compared with 2, as with itself there is no difference
    rows = [(False, guidance_scale), (True, guidance_scale)]
    if guidance == "embedded":
        rows.append((True, 1.0 if guidance_scale != 1 else 2.0))
    for seed in _SEEDS:
        index = 1 + seed
        scheduler.set_timesteps(steps)
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(1, height, width, config.in_channels, generator=generator)
        for t in scheduler.timesteps:
            predictions = []
            for part in [rows] if guidance == "classifier-free" else [[row] for row in rows]:
                texted = [index if prompted else 0 for prompted, _ in part]
                one = {
                    "sample": z.repeat(len(part), 1, 1, 1).numpy(),
                    "timestep": np.full(len(part), float(t), np.float32),
                    "encoder_hidden_states": np.concatenate([embeds[i] for i in texted]),
                }
                if guidance == "embedded":
                    scales = torch.tensor([scale for _, scale in part])
                    one["timestep_cond"] = guidance_embedding(scales, config.time_cond_proj_dim).numpy()
                predictions.append(call("unet", one))
                runs["unet"].append(one)
                prompts.append(texted)
            outputs["unet"] += predictions
            uncond, cond, *_ = torch.from_numpy(np.concatenate(predictions)).split(1)
            scale = max(guidance_scale, 1.0)  # at and below 1 there is no guidance, as in diffusers
            guided = uncond + scale * (cond - uncond) if guidance == "classifier-free" else cond
            z = scheduler.step(guided, t, z).prev_sample
        runs["decoder"].append({"latents": z.numpy()})
        outputs["decoder"].append(call("decoder", runs["decoder"][-1]))
    return GateInputs(runs, {name: np.stack(values) for name, values in outputs.items()}, prompts, len(rows))


@torch.no_grad()
def tiled(reference: GateInputs, decoder: nn.Module, tile: int) -> GateInputs:
    """The same inputs for a decoder of `tile` x `tile` latents: the first corner of the last latents of each run."""
    calls = [{"latents": one["latents"][:, :tile, :tile].copy()} for one in reference.inputs["decoder"]]
    images = np.stack([decoder(latents=torch.from_numpy(one["latents"]))["image"].numpy() for one in calls])
    return replace(
        reference,
        inputs={**reference.inputs, "decoder": calls},
        outputs={**reference.outputs, "decoder": images},
    )


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
def describe(
    module: nn.Module, inputs: pipeline_specs.Samples, plain: nn.Module, one: pipeline_specs.Samples
) -> Described:
    """Of `module`, that is converted with `inputs`; the multiply-adds are of the `plain` one on `one` sample. Nothing
    is computed but shapes."""
    shapes, shape = ({name: value.to("meta") for name, value in samples.items()} for samples in (inputs, one))
    return Described(
        pipeline_specs.tensor_specs(inputs),
        pipeline_specs.tensor_specs(on_meta(module)(**shapes)),
        sum(p.numel() for p in plain.parameters()),
        pipeline_specs.multiply_adds(on_meta(plain), shape),
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
