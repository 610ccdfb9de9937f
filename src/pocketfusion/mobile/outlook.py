"""What an export will take and give, before any work: sizes of its files, time, memory, disk, expected quality.

Sizes are the tensors' arithmetic on networks without weights, rewritten as they will be. Times and memory are measured
coefficients times the networks' layers, bytes and multiply-adds, the latter by a short measurement here. Of a model
nothing but its configs is read. docs/export.md has what the coefficients come from, and how near they are.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pocketfusion.artefact import check_space
from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import check_folder
from pocketfusion.mobile import pipeline_specs
from pocketfusion.mobile.devices import TargetName, check_files, options_for
from pocketfusion.mobile.export_settings import ExportSettings
from pocketfusion.mobile.flatbuffer import short_path
from pocketfusion.mobile.quantization.packing import storable
from pocketfusion.mobile.quantization.weight_forms import KEPT, NetworkRecipe, for_target
from pocketfusion.mobile.rewrites import rewrite
from pocketfusion.mobile.wrappers import unet_form, wrap
from pocketfusion.models.guided import guidance_of
from pocketfusion.models.learnt_tokens import teach
from pocketfusion.models.loading import assemble, empty_part
from pocketfusion.models.tiny_autoencoder import check_vae, load_decoder
from pocketfusion.quiet import quiet
from pocketfusion.runtime.manifest import NETWORKS
from pocketfusion.runtime.memory import available_memory

#: Bytes of a stored weight, by form.
_BYTES: dict[str, float] = {
    **{"float32": 4, "float16": 2, "int8": 1, "int8-dynamic": 1, "int4-dynamic": 0.5},
    **{"palette6": 0.75, "palette4": 0.5, "int4-block": 0.5 + 2 / 32},
}
_UNUSED = ("pooler.",)  # BERT's, which is in no exported network
_SCALE = 12  #: bytes of a channel's scale and its zero point, in forms of integers
_GRAPH = 600  #: bytes of the graph (operations, tensors, their names) for each module of a network
_TIGHT = 0.8  #: of the estimate: with less memory than that no export is begun


#: SQNR in dB against PyTorch that the gate found for the embedded model's networks (trained), by target and form.
MEASURED: dict[tuple[TargetName, str], dict[str, float]] = {
    ("litert-gpu", "int8"): {"text_encoder": 30.0, "unet": 44.3, "decoder": 54.2},
    ("litert-cpu", "float16"): {"text_encoder": 67.1},
    ("litert-cpu", "int8-dynamic"): {"unet": 32.9},
}
#: Seconds of a core: a module (tracing, lowering, and the file's operations), a GB of float32 weights, the libraries.
_MODULE, _GB, _IMPORTS = 0.09, 20.0, 6.0
#: Bytes at the peak: of Python and its libraries; of each of the weights' in float32, where the gate computes in
#: integers, and where LiteRT holds them unpacked and packed.
_PROCESS, _INTEGER, _FLOAT = 0.9e9, 2.25, 3.4


@dataclass(frozen=True)
class NetworkOutlook:
    """A network's file: the form of its weights, its bytes, parameters, multiply-adds of one call at batch 1, and the
    SQNR in dB to expect (None where the form was not measured). `modules`, `fp32`: what it is converted from, and
    bytes of that in float32."""

    name: str
    weights: str
    size: int
    parameters: int
    macs: int
    sqnr_db: float | None
    modules: int
    fp32: int


@dataclass(frozen=True)
class Outlook:
    """An export that has not begun: what it makes and what it takes, in bytes and seconds of free cores: `seconds` in
    all, `gate_seconds` of them PyTorch's and LiteRT's comparison. `options` are `export`'s."""

    options: Mapping[str, Any]
    settings: ExportSettings
    picture: tuple[int, int]
    batch: int  #: of a UNet's call
    calls: int  #: of a guided step
    networks: list[NetworkOutlook]
    seconds: float
    gate_seconds: float
    memory: int
    disk: int

    @property
    def size(self) -> int:
        """The networks' files together."""
        return sum(network.size for network in self.networks)

    def as_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        taken = {
            name: getattr(self, name)
            for name in ("picture", "batch", "calls", "seconds", "gate_seconds", "memory", "disk", "size")
        }
        return {"settings": self.settings.chosen(), "networks": [asdict(one) for one in self.networks], **taken}

    def check(self, out: Path) -> None:
        """Raises PocketfusionError if the machine has too little memory, or the disk of `out` too little room."""
        check_space(out, self.disk, "the export")
        if (memory := available_memory()) < _TIGHT * self.memory:
            raise PocketfusionError(
                f"the export needs about {self.memory / 1e9:.1f} GB of memory and {memory / 1e9:.1f} GB are free: end "
                "other programs, export where there is more, or choose a smaller UNet (pocketfusion architecture "
                "--help, pocketfusion prune --help)"
            )


def prepare(
    folder: Path, out: Path | None, given: Mapping[str, Any], device: str | None = None, overwrite: bool = False
) -> Outlook:
    """Checks an export and says what it will take, without reading a weight.

    `given`: `ExportSettings`' fields that were asked for; None was not. `device`: the row of `devices.DEVICES` that
    gives the others. Without `out`, where it goes is not looked at. Raises PocketfusionError for whatever can be
    refused before any work.
    """
    check_folder(folder)
    with quiet():
        pipeline = assemble(folder, empty_part)
        if given.get("vae") is not None:
            check_vae(given["vae"], folder)
            pipeline.register_modules(vae=load_decoder(given["vae"]).to("meta"))
    ExportSettings(size=given.get("size")).resize(pipeline)
    options = options_for(device, pipeline, given)
    settings = ExportSettings(**options)
    settings.check(folder, out, overwrite)
    for file in settings.embedding:
        teach(pipeline.tokenizer, pipeline.text_encoder.config.hidden_size, file)
    steps = settings.defaults(folder, settings.sampling(folder)).num_inference_steps
    settings.drawn_with(folder, pipeline, steps)  # a sampler that cannot draw the model is refused
    settings.resize(pipeline)
    found = _outlook(folder, pipeline, settings, options)
    check_files(settings.made_for, {network.name: network.size for network in found.networks})
    return found


def _outlook(folder: Path, pipeline: Any, settings: ExportSettings, options: Mapping[str, Any]) -> Outlook:
    kinds, networks, one = settings.kinds(), wrap(pipeline), pipeline_specs.samples(pipeline, batch=1)
    rows = []
    for name in NETWORKS:
        shape = {key: value.to("meta") for key, value in one[name].items()}
        macs = pipeline_specs.multiply_adds(networks[name], shape)
        rows.append(_network(name, networks[name], kinds[name], settings, macs))
    # the gate's prompts, steps and pictures, in PyTorch, in the file, and of the UNet fed by the text encoder's file
    text, unet, decoder = (row.macs for row in rows)
    tiled = settings.decoder_tile is not None
    gate = 12 * text + (12 * settings.gate_steps + 3) * unet + (7 if tiled else 5) * decoder
    weights, largest = sum(row.fp32 for row in rows), max(row.fp32 for row in rows)
    integer = settings.target == "litert-cpu" and all(row.weights.endswith("dynamic") for row in rows[1:])
    image, sampling = pipeline_specs.image_spec(pipeline), settings.sampling(folder)
    guidance = guidance_of(pipeline.unet, sampling.guidance)
    once = (
        settings.defaults(folder, sampling).guidance_scale <= 1 and not settings.scheduler_step
    )  # as `export` has it
    form = unet_form(guidance, settings.target, settings.two_calls or once, settings.scheduler_step)
    gate_seconds = gate / _multiply_adds_a_second()
    return Outlook(
        options=options,
        settings=settings,
        picture=(image.height, image.width),
        batch=form.batch,
        calls=2 if guidance == "classifier-free" and form.batch == 1 and not once else 1,
        networks=rows,
        seconds=_IMPORTS + _MODULE * sum(row.modules for row in rows) + _GB * weights / 1e9 + gate_seconds,
        gate_seconds=gate_seconds,
        memory=round(_PROCESS + (_INTEGER if integer else _FLOAT) * weights),
        disk=round(weights + sum(row.size for row in rows) + 1.5 * largest),
    )


def _network(
    name: str, network: nn.Module, kind: str | NetworkRecipe, settings: ExportSettings, macs: int
) -> NetworkOutlook:
    rewritten, _ = rewrite(network, settings.device)
    size = fp32 = 0.0
    seen = set[int]()
    forms: dict[str, int] = {}
    for path, module in rewritten.named_modules():
        layer = short_path(path)
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or layer.startswith(_UNUSED):
                continue
            seen.add(id(parameter))
            fp32 += 4 * parameter.numel()
            if parameter.ndim < 2 or key != "weight":
                size += (2 if settings.target == "coreml" and kind != "float32" else 4) * parameter.numel()
                continue
            operation = "EMBEDDING_LOOKUP" if isinstance(module, nn.Embedding) else "CONV_2D"
            form = _form(layer, operation, kind, settings.target)
            forms[form] = forms.get(form, 0) + parameter.numel()
            scales = _SCALE * parameter.shape[0] if _BYTES[form] <= 1 else 0
            size += _BYTES[form] * parameter.numel() + scales
    modules = sum(1 for _ in rewritten.modules())
    plain = sum(p.numel() for p in network.parameters())
    label = kind if isinstance(kind, str) else "mixed" if len(forms) > 1 else next(iter(forms), "float32")
    expected = MEASURED.get((settings.target, label), {}).get(name)
    return NetworkOutlook(name, label, round(size + _GRAPH * modules), plain, macs, expected, modules, round(fp32))


def _form(layer: str, operation: str, kind: str | NetworkRecipe, target: TargetName) -> str:
    """The form of a layer, as `quantize` chooses it, but that outliers, which the values would show, stay float16."""
    if isinstance(kind, NetworkRecipe):
        chosen = next((rule.weights for rule in kind.rules if rule.takes(layer)), kind.default)
    elif kind not in ("float32", "float16") and KEPT.fullmatch(layer) and operation != "EMBEDDING_LOOKUP":
        chosen = "float16"
    else:
        chosen = kind  # type: ignore[assignment]  # one of FORMS, checked by the settings
    if target in ("coreml", "onnx"):  # which have every form for every operation
        return chosen
    return storable(for_target(chosen, target, operation), operation)


def _multiply_adds_a_second() -> float:
    """Of a convolution as UNets have them, in float32 on PyTorch's threads; of their processor time, so that what else
    runs here does not count."""
    convolution, x = nn.Conv2d(320, 320, 3, padding=1), torch.zeros(1, 320, 32, 32)
    seconds = []
    with torch.inference_mode():
        for _ in range(4):
            began = time.process_time()
            convolution(x)
            seconds.append((time.process_time() - began) / torch.get_num_threads())
    return 9 * 320 * 320 * 32 * 32 / max(min(seconds[1:]), 1e-4)
