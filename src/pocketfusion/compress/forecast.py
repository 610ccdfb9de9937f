"""What a chain will take: samples, parameters, memory, disk and time, from its sizes and a short measurement here.

Sizes are counted on networks without weights; times are those of a training step of each network, measured for a
moment, or of a narrower one where it is too large for that. Rough: within a factor of two.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import nn

from pocketfusion.artefact import check_space
from pocketfusion.compress.chain import Chain, Stage
from pocketfusion.compress.overview import duration, size, standings
from pocketfusion.compress.records import Records
from pocketfusion.compress.runner import Span, planned
from pocketfusion.errors import PocketfusionError
from pocketfusion.mobile.outlook import Outlook, prepare
from pocketfusion.recipe import SECTIONS, Recipe
from pocketfusion.train.memory.micro_batch import parts_of

_MEASURABLE = 60e6  #: parameters up to which a network is timed as it is
_MOMENT = 2.0  #: seconds that a network is timed for
_SMALL = 2e8  #: bytes of activations up to which several samples are timed at once
_CHECKPOINT, _KEPT = 16, 3  #: bytes a parameter of weights, EMA and moments; two are kept while a third is written
_TRAINED = 20  #: bytes a parameter in memory: those and the gradient
_PROCESS = 1.2e9  #: what python with its libraries takes
_PICTURES, _CAPTIONS = 12_000, 4  #: of the emoji data, before they are made; captions of a picture
_MINILM = 91e6
_ACTIONS, _HALF = 70, 30  #: that a round of a search evaluates, and that halve SD-1.5's pattern
_STEPS = 8  #: of sampling, where a folder says it that is not made yet


@dataclass(frozen=True)
class Forecast:
    """One stage: what will be done, and what that takes (bytes, seconds); None where nothing is known."""

    stage: Stage
    action: str
    samples: int = 0
    parameters: int = 0
    memory: float = 0.0
    disk: float = 0.0
    seconds: float | None = 0.0


@dataclass(frozen=True)
class Cost:
    """A network: parameters, bytes of activations a sample, seconds of a training step a sample (forward a third)."""

    parameters: int
    activations: float
    seconds: float

    @property
    def forward(self) -> float:
        return self.seconds / 3


class Networks:
    """The recipe's networks, counted on the meta device and, if `timed`, measured."""

    def __init__(self, recipe: Recipe, timed: bool):
        self.recipe, self.timed = recipe, timed
        autoencoder = recipe.autoencoder.config
        self.side = recipe.data.size // 2 ** (len(autoencoder.get("block_out_channels", (64,))) - 1)
        self.channels = autoencoder.get("latent_channels", 4)
        self.width = recipe.teacher.unet.get("cross_attention_dim", 768)

    @cached_property
    def unet(self) -> Cost:
        """One prediction of the base."""
        from diffusers import UNet2DConditionModel

        def inputs(batch: int) -> tuple[torch.Tensor, ...]:
            states = torch.zeros(batch, self.recipe.text.max_length, self.width)
            return torch.zeros(batch, self.channels, self.side, self.side), torch.full((batch,), 500), states

        return self._cost(UNet2DConditionModel, self.recipe.teacher.unet, inputs)

    @cached_property
    def autoencoder(self) -> Cost:
        """Encoding and decoding one picture as it is trained on."""
        from diffusers import AutoencoderKL

        side = self.recipe.autoencoder.crop_size or self.recipe.data.size
        return self._cost(
            AutoencoderKL, self.recipe.autoencoder.config, lambda batch: (torch.zeros(batch, 3, side, side),)
        )

    @property
    def decoded(self) -> Cost:
        """Decoding one whole picture: a little over half of the autoencoder."""
        whole = (self.recipe.data.size / (self.recipe.autoencoder.crop_size or self.recipe.data.size)) ** 2
        one = self.autoencoder
        return Cost(one.parameters * 3 // 5, 0.6 * whole * one.activations, 0.6 * whole * one.seconds)

    @cached_property
    def judge(self) -> Cost:
        """A picture of the judge."""
        from pocketfusion.models.dual_encoder import JudgeModel

        size, judge = self.recipe.data.size, self.recipe.judge
        config = {"image_size": size, "widths": judge.widths, "embed_dim": judge.embed_dim, "text_width": self.width}

        def inputs(batch: int) -> tuple[torch.Tensor, ...]:
            return torch.zeros(batch, 3, size, size), torch.zeros(batch, self.width)

        return self._cost(JudgeModel, config, inputs)

    def _cost(self, kind: Any, config: Mapping[str, Any], inputs: Any) -> Cost:
        try:
            with torch.device("meta"):
                network = kind(**config)
                activations = _activations(network, inputs(1))
        except (TypeError, ValueError, RuntimeError) as error:
            raise PocketfusionError(f"a network of the recipe cannot be made ({str(error).splitlines()[0]})") from None
        parameters = sum(p.numel() for p in network.parameters())
        if not self.timed:
            return Cost(parameters, activations, 0.0)
        scale = 1.0
        if parameters > _MEASURABLE:  # narrower, in what group norms and heads divide
            channels = [max(64, size // 256 * 64) for size in config["block_out_channels"]]
            scale = (sum(config["block_out_channels"]) / sum(channels)) ** 2
            config = {**config, "block_out_channels": channels}
        batch = 8 if activations < _SMALL else 1
        return Cost(parameters, activations, scale * _seconds(kind(**config), inputs, batch))


def _activations(network: nn.Module, inputs: tuple[torch.Tensor, ...]) -> float:
    """Bytes of all layers' outputs, fp32: what training keeps of a sample."""
    total = 0

    def add(module: nn.Module, given: Any, output: Any) -> None:
        nonlocal total
        total += 4 * output.numel() if isinstance(output, torch.Tensor) else 0

    handles = [module.register_forward_hook(add) for module in network.modules() if not list(module.children())]
    with torch.no_grad():
        network(*inputs)
    for handle in handles:
        handle.remove()
    return total


def _seconds(network: nn.Module, inputs: Any, batch: int) -> float:
    """Seconds of forward and backward a sample, bf16: the fastest call after the first, within a moment."""
    given, seconds, began = inputs(batch), list[float](), time.perf_counter()
    while len(seconds) < 2 or time.perf_counter() - began < _MOMENT:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            found = network(*given)
            found = found[0] if isinstance(found, tuple) else found.sample
        found.float().square().mean().backward()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:]) / batch


def forecast(chain: Chain, out: Path, *, timed: bool = True) -> list[Forecast]:
    """What each stage will take; `timed` False counts sizes only."""
    whole = all(getattr(chain.recipe, section) is not None for section in SECTIONS)
    networks = Networks(chain.recipe, timed) if whole else None  # a recipe without training describes none
    share = {one.stage.name: 1 - one.done / one.total if one.total else 1.0 for one in standings(chain, out)}
    found = []
    for stage, action in planned(chain, Records(out, frozen=True)):
        if action in ("skip", "given"):
            found.append(Forecast(stage, action))
            continue
        left = share[stage.name] if action == "go on" else 1.0
        found.append(_forecast(chain, stage, action, networks, left, out))
    return found


def _forecast(chain: Chain, stage: Stage, action: str, networks: Networks | None, left: float, out: Path) -> Forecast:
    if stage.kind == "export" and (found := _exported(chain, stage, out)) is not None:
        return Forecast(
            stage, action, memory=found.memory, disk=found.disk, seconds=found.seconds + found.gate_seconds
        )
    if networks is None:
        return Forecast(stage, action, memory=_PROCESS, disk=1e6, seconds=None)
    train, network = stage.train, _network(stage, networks)
    samples = train.steps * train.batch_size if train else 0
    memory = _PROCESS
    if train is not None:
        micro = train.batch_size // parts_of(train, 1)
        memory += _TRAINED * network.parameters + micro * network.activations
    seconds = _time(chain, stage, networks)
    return Forecast(
        stage,
        action,
        samples,
        network.parameters,
        memory,
        _disk(chain, stage, networks),
        None if seconds is None else left * seconds,
    )


def _exported(chain: Chain, stage: Stage, out: Path) -> Outlook | None:
    """What an export will take, where the folder that it is of is there already."""
    (name,) = stage.inputs["folder"]
    folder = chain[name].given or out / name
    place = next((chain[one].given or out / one for one in stage.inputs.get("recipe", ())), None)
    recipe = None if place is None else place if place.is_file() else place / "weights.yaml"
    if not (folder / "model_index.json").is_file() or (recipe is not None and not recipe.is_file()):
        return None
    options: Any = stage.options
    return prepare(folder, None, options.given(recipe), options.device)


def _network(stage: Stage, networks: Networks) -> Cost:
    """The network that a stage is about."""
    if stage.kind in ("autoencoder",):
        return networks.autoencoder
    if stage.kind in ("judge", "loss-judge"):
        return networks.judge
    if stage.kind == "distill-decoder":
        return networks.decoded
    return Cost(0, 0, 0) if stage.is_a.makes in ("data", "result") else networks.unet


def _time(chain: Chain, stage: Stage, networks: Networks) -> float | None:
    """Seconds; None for what is not measured."""
    unet, train, options, settings = networks.unet, stage.train, stage.options, stage.settings
    samples = train.steps * train.batch_size if train else 0
    guided = 2 * unet.forward  # a step with and without the caption
    kind: Any = settings or options
    match stage.kind:
        case "autoencoder" | "judge" | "loss-judge":
            return samples * _network(stage, networks).seconds
        case "base" | "to-v" | "elastic":
            return samples * unet.seconds
        case "recover":
            return samples * (unet.seconds + unet.forward)
        case "distill-steps":
            own = 1 + kind.guidance_probability + (kind.original_share if kind.original_weight else 0)
            return samples * (own * unet.seconds + kind.teacher_steps / kind.steps * guided)
        case "distill-guidance":
            return samples * (unet.seconds + guided)
        case "distill-consistency":
            return samples * (unet.seconds + guided + unet.forward)
        case "distill-decoder":
            steps = kind.num_inference_steps or _STEPS  # the sampler's own, if the recipe does not say
            drawn = (kind.samples + kind.held_out) * (steps * guided + networks.decoded.forward)
            return drawn + samples * networks.decoded.seconds / 4
        case "evolve":
            rounds = _rounds(kind)
            drawn = rounds * _ACTIONS * kind.samples * kind.steps * guided
            assert chain.recipe.elastic is not None
            return drawn + rounds * kind.train_steps * chain.recipe.elastic.train.batch_size * unet.seconds
        case "evaluate":
            drawn_in = sum(int(one.partition("@")[2] or _STEPS) for one in stage.inputs["systems"])
            return drawn_in * len(kind.guidance) * kind.samples * len(kind.sets) * guided
    return None


def _rounds(search: Any) -> int:
    """Rounds that a search may take to half the latency."""
    return min(search.rounds, 1 + _HALF // search.group)


def _disk(chain: Chain, stage: Stage, networks: Networks) -> float:
    """Bytes that a stage adds."""
    recipe, side, options = chain.recipe, networks.side, stage.options
    kind: Any = stage.settings or options
    data = next((one for one in chain.stages if one.kind == "data"), None)
    extra: Any = data.options if data is not None and data.given is None else None
    count = 72 if extra and extra.source == "shapes" else _PICTURES + (extra.scenes if extra else 0)
    pixels = 3 * recipe.data.size**2
    folder = 2 * (networks.unet.parameters + networks.autoencoder.parameters) + _text(recipe)
    total = _CHECKPOINT * _KEPT * _network(stage, networks).parameters if stage.train else 0.0
    match stage.kind:
        case "data":
            total += count * pixels
        case "autoencoder":
            total += 4 * networks.autoencoder.parameters
        case "judge" | "loss-judge":
            total += 2 * networks.judge.parameters
        case "distill-decoder":
            drawn = kind.samples + kind.held_out
            total += folder + 2 * drawn * (networks.channels * side**2 + (pixels if kind.cache_targets else 0))
        case "evolve":
            total += folder + _rounds(kind) * (4 + _KEPT * _CHECKPOINT) * networks.unet.parameters
        case "evaluate":
            total += len(stage.inputs["systems"]) * len(kind.guidance) * kind.samples * len(kind.sets) * pixels
        case "export":
            total += 3 * (2 * folder)
        case "quantize" | "check" | "bench" | "profile":
            total += 1e6
        case _:
            total += folder
    first = next((one for one in chain.stages if one.is_a.makes == "model" and one.given is None and one.train), None)
    if first is stage:  # the latents of both mirrorings, means and deviations, and the captions' states; fp16
        latents = 8 * networks.channels * side**2
        captions = _CAPTIONS if recipe.text.cache_states else 0
        total += count * (latents + 2 * captions * recipe.text.max_length * networks.width)
    return total


def _text(recipe: Recipe) -> float:
    """Bytes of the text encoder."""
    folder = Path(recipe.text.source)
    if recipe.text.source == "minilm" or not folder.is_dir():
        return _MINILM
    return float(sum(file.stat().st_size for file in (folder / "text_encoder").rglob("*.safetensors")))


def check_disk(chain: Chain, out: Path, span: Span | None = None) -> None:
    """Raises PocketfusionError if what is still to be made (of `span`) will not fit where `out` is."""
    rows = forecast(chain, out, timed=False)
    needed = sum(one.disk for one in (rows[span.first : span.last + 1] if span else rows))
    check_space(out, needed, "the chain")


def table(chain: Chain, rows: list[Forecast]) -> Table:
    """The plan as a table, with its sums."""
    shown = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        show_footer=True,
        caption_justify="left",
    )
    needed = sum(row.disk for row in rows)
    seconds = sum(row.seconds or 0 for row in rows)
    peak = max((row.memory for row in rows), default=0.0)
    unmeasured = [row.stage.name for row in rows if row.seconds is None]
    threads = torch.get_num_threads()
    shown.caption = f"\ntimes as measured now on {threads} CPU thread{'s' if threads > 1 else ''}" + (
        f", without those of {', '.join(unmeasured)}" if unmeasured else ""
    )
    footers = ("in all", "", "", "", size(peak), size(needed), duration(seconds))
    names = ("stage", "will", "samples", "parameters", "memory", "disk", "time")
    for name, footer in zip(names, footers, strict=True):
        shown.add_column(name, footer, justify="left" if name in names[:2] else "right", no_wrap=True)
    for row in rows:
        if row.action in ("skip", "given"):
            shown.add_row(row.stage.name, "done" if row.action == "skip" else "given")
            continue
        time = "unknown" if row.seconds is None else duration(row.seconds)
        parameters = f"{row.parameters / 1e6:,.1f} M" if row.parameters else ""
        samples = f"{row.samples:,}" if row.samples else ""
        shown.add_row(row.stage.name, row.action, samples, parameters, size(row.memory), size(row.disk), time)
    return shown
