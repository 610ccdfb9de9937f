"""A checkpoint file or a folder as published → a model folder with provenance, and what was found in it."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import diffusers

from pocketfusion.artefact import atomic_folder, check_new, check_space, sha256_file, write_json
from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import (
    LicenceNote,
    Provenance,
    check_folder,
    folder_hash,
    machine,
    read_json,
    write_licences,
    write_provenance,
)
from pocketfusion.models.bring.clip_words import clip_merges, clip_tokenizer
from pocketfusion.models.bring.configs import vae_factor
from pocketfusion.models.bring.conversion import write_text_encoder, write_unet, write_vae
from pocketfusion.models.bring.parts import add_tokens, put_vae, skip_layers
from pocketfusion.models.bring.prediction import (
    EPSILON_ABOVE,
    Prediction,
    PredictionType,
    answer_to_noise,
    measured_prediction,
    scheduler,
    stated_prediction,
)
from pocketfusion.models.writing import copy_folder, load_text_encoder_in_fp32
from pocketfusion.recognise import EMA, LEFTOVERS, VAE, Checkpoint, recognise, short
from pocketfusion.safetensors_header import read_safetensors_header

_NAMED = 8  #: unused tensors that a report names
_SMALL = 32 << 20  #: bytes of disk for what is written beside the weights


@dataclass(frozen=True)
class Changes:
    """What of a checkpoint is to be other than the file has it."""

    prediction_type: PredictionType | None = None
    ema: bool = True  #: take the moving average of the UNet's weights where the file has it beside them
    clip_skip: int = 1  #: layers of the text encoder from the last, as in web interfaces: 1 takes all, 2 all but one
    vae: Path | None = None
    embeddings: tuple[Path, ...] = ()


@dataclass
class Found:
    """What a checkpoint turned out to be; JSON-ready."""

    family: str
    prediction_type: str
    prediction_why: str
    zero_snr: bool
    picture_size: int
    unet: str
    text_encoder: str
    vae: str
    weights: str  #: which of the UNet's: the averaged ones, or those that the file has
    leftovers: dict[str, int] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    unused_count: int = 0
    notes: list[str] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)  #: learnt ones that were added


def check_apart(source: Path, out: Path, overwrite: bool) -> None:
    """Raises PocketfusionError if `out` cannot be written, or `source` would be replaced with it."""
    check_new(out, overwrite)
    if source.resolve().is_relative_to(out.resolve()):
        raise PocketfusionError(f"{source} lies in {out}, which is replaced whole: choose another output path")


def import_file(
    file: Path,
    out: Path,
    changes: Changes | None = None,
    *,
    overwrite: bool = False,
    origin: Mapping[str, Any] | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Found:
    """Writes the checkpoint in `file` as a model folder at `out`, its weights in the file's own types.

    `origin`: where the file came from, for the provenance. Raises PocketfusionError if it is no checkpoint of SD-1 or
    SD-2, is damaged or incomplete, says too little, or the disk is too small; `out` is then as it was.
    """
    changes = changes or Changes()
    check_apart(file, out, overwrite)
    checkpoint = recognise(file)
    clip_merges()  # before anything long: the package may be missing
    size = sum(one["data_offsets"][1] - one["data_offsets"][0] for one in checkpoint.tensors.values())
    check_space(out, 1.02 * size + _SMALL, "the import")
    if changes.vae is None and f"{VAE}decoder.conv_in.weight" not in checkpoint.tensors:
        raise PocketfusionError(f"{file} has no autoencoder (first_stage_model): give one with --vae")
    on_stage("hashing the file")
    digest = sha256_file(file)
    with atomic_folder(out, overwrite=overwrite) as partial:
        found = _write_parts(checkpoint, partial, changes, on_stage)
        _change_parts(partial, changes, found, on_stage)
        write_licences(partial, [_licence(checkpoint)])
        write_provenance(
            partial,
            Provenance(
                stage="import",
                settings={
                    "source": {"file": file.name, "bytes": file.stat().st_size, "sha256": digest, **(origin or {})},
                    "metadata": {key: value[:500] for key, value in sorted(checkpoint.metadata.items())[:50]},
                    **_settings(changes),
                },
                parents={"file": digest},
                machine=machine(),
                results=asdict(found),
            ),
        )
    return found


def import_folder(
    source: Path,
    out: Path,
    changes: Changes,
    *,
    overwrite: bool = False,
    origin: Mapping[str, Any] | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Found:
    """Writes the model folder `source` with `changes` at `out`; raises PocketfusionError as `import_file` does."""
    check_apart(source, out, overwrite)
    check_folder(source)
    size = sum(file.stat().st_size for file in source.rglob("*") if file.is_file())
    check_space(out, 1.02 * size + _SMALL, "the import")
    on_stage("hashing the folder")
    digest = folder_hash(source)
    unet, vae, text, sampler = (
        read_json(source / part / f"{'scheduler_' * (part == 'scheduler')}config.json")
        for part in ("unet", "vae", "text_encoder", "scheduler")
    )
    kind = changes.prediction_type or sampler.get("prediction_type", "epsilon")
    found = Found(
        family="SD-2.x" if unet.get("use_linear_projection") else "SD-1.x",
        prediction_type=kind,
        prediction_why="asked for" if changes.prediction_type else "the folder's scheduler",
        zero_snr=bool(sampler.get("rescale_betas_zero_snr")),
        picture_size=int(unet.get("sample_size") or 0) * 2 ** (len(vae.get("block_out_channels", [0])) - 1),
        unet=_unet(unet),
        text_encoder=f"{text.get('num_hidden_layers')} layers of {text.get('hidden_size')}",
        vae="the folder's",
        weights="",
    )
    with atomic_folder(out, overwrite=overwrite) as partial:
        on_stage("copying the folder")
        copy_folder(source, partial)
        file = partial / "scheduler" / "scheduler_config.json"
        write_json(file, read_json(file) | {"prediction_type": kind})
        found.weights = _types(partial)
        _change_parts(partial, changes, found, on_stage)
        if not (partial / "licences").is_dir():
            said = re.search(r"^license:\s*([\w.+-]+)\s*$", _card(source), re.M)
            licence = f"LicenseRef-{said[1]}" if said else "LicenseRef-unknown"
            name = str((origin or {}).get("repository", source.name))
            write_licences(partial, [LicenceNote(f"Checkpoint {name}", licence, f"the authors of {name}")])
        write_provenance(
            partial,
            Provenance(
                stage="import",
                settings={"source": {"folder": source.name, **(origin or {})}, **_settings(changes)},
                parents={"source": digest},
                machine=machine(),
                results=asdict(found),
            ),
        )
    return found


def _card(folder: Path) -> str:
    """The model card's text; "" if there is none that can be read."""
    try:
        return (folder / "README.md").read_text(encoding="utf-8")[:10_000]
    except (OSError, ValueError):
        return ""


def _change_parts(folder: Path, changes: Changes, found: Found, on_stage: Callable[[str], None]) -> None:
    if changes.vae is not None:
        on_stage("the autoencoder")
        found.vae = put_vae(folder, changes.vae)
    if changes.clip_skip != 1:
        left = skip_layers(folder, changes.clip_skip)
        found.notes.append(f"clip-skip {changes.clip_skip}: {left} layers of the text encoder are left")
    if changes.embeddings:
        found.tokens = add_tokens(folder, changes.embeddings)


def _write_parts(checkpoint: Checkpoint, folder: Path, changes: Changes, on_stage: Callable[[str], None]) -> Found:
    prediction = stated_prediction(checkpoint, changes.prediction_type)
    averages = checkpoint.ema if changes.ema else {}
    on_stage("the UNet")
    used = write_unet(checkpoint, folder / "unet", _latent_size(checkpoint, prediction), averages)
    on_stage("what the UNet predicts")
    correlation = answer_to_noise(folder / "unet")
    notes = []
    if prediction is None:
        prediction = measured_prediction(checkpoint, correlation)
        config = folder / "unet" / "config.json"
        write_json(config, read_json(config) | {"sample_size": _latent_size(checkpoint, prediction)})
    elif (prediction.kind == "epsilon") != (correlation > EPSILON_ABOVE):
        notes.append(
            f"the UNet's answer to noise correlates {correlation:.2f} with it, which is unlike {prediction.kind}: if "
            "pictures come out as noise, give --prediction-type"
        )
    on_stage("the text encoder")
    used |= write_text_encoder(checkpoint, folder / "text_encoder")
    if checkpoint.names(VAE):  # also where another takes its place, whose latents it tells
        on_stage("the autoencoder")
        try:
            used |= write_vae(checkpoint, folder / "vae", _latent_size(checkpoint, prediction))
        except PocketfusionError as error:
            if changes.vae is None:
                raise
            shutil.rmtree(folder / "vae", ignore_errors=True)
            used |= set(checkpoint.names(VAE))
            notes.append(f"the file's own autoencoder is unsound, so that --vae is not held against it: {error}")
    text = read_json(folder / "text_encoder" / "config.json")
    pad = "!" if checkpoint.linear else "<|endoftext|>"
    clip_tokenizer(text["max_position_embeddings"], pad).save_pretrained(folder / "tokenizer")
    sampler = scheduler(prediction)
    sampler.save_pretrained(folder / "scheduler")
    write_json(folder / "model_index.json", _index(type(sampler).__name__))
    load_text_encoder_in_fp32(folder)
    if checkpoint.names(EMA) and not averages:
        notes.append(
            "the averaged weights (model_ema) are left out: " + ("they are not whole" if changes.ema else "asked for")
        )
    return _found(checkpoint, folder, prediction, averages, used, notes)


def _latent_size(checkpoint: Checkpoint, prediction: Prediction | None) -> int:
    """The UNet's `sample_size`: as the metadata's resolution says, else 96 for SD-2 of v and 64 for all others."""
    said = re.fullmatch(r"(\d{1,5})x(\d{1,5})", checkpoint.metadata.get("modelspec.resolution", ""))
    factor = vae_factor(checkpoint)
    if said and said[1] == said[2] and int(said[1]) % factor == 0 and int(said[1]):
        return int(said[1]) // factor
    return 96 if checkpoint.linear and prediction is not None and prediction.kind == "v_prediction" else 64


def _index(sampler: str) -> dict[str, Any]:
    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", sampler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _found(
    checkpoint: Checkpoint,
    folder: Path,
    prediction: Prediction,
    averages: Mapping[str, str],
    used: set[str],
    notes: Sequence[str],
) -> Found:
    unet, text = (read_json(folder / part / "config.json") for part in ("unet", "text_encoder"))
    left, unused = Counter[str](), list[str]()
    for name in checkpoint.tensors:
        if name in used:
            continue
        kind: str | None = next((kind for kind, known in LEFTOVERS.items() if re.fullmatch(known, name)), None)
        if kind is None and re.search(r"\.(resblocks|layers)\.\d+\.", name):
            kind = "text encoder's layers that the model does not use"
        if kind is None:
            unused.append(short(name))
        else:
            left[kind] += 1
    total = len(checkpoint.ema)
    weights = "the averaged (EMA) of the file's two" if averages else "the file's only ones"
    if total and not averages:
        weights = "the trained of the file's two, not the averaged (EMA)"
    vae = "replaced"
    if (folder / "vae" / "config.json").is_file():
        config = read_json(folder / "vae" / "config.json")
        vae = f"the file's: {config['latent_channels']} latent channels at 1/{vae_factor(checkpoint)}"
        if said := checkpoint.metadata.get("ss_vae_name"):
            vae += f" ({short(said)}, says its metadata)"
    return Found(
        family=checkpoint.family,
        prediction_type=prediction.kind,
        prediction_why=prediction.why,
        zero_snr=prediction.zero_snr,
        picture_size=unet["sample_size"] * vae_factor(checkpoint),
        unet=_unet(unet),
        text_encoder=f"{'OpenCLIP' if checkpoint.open_clip else 'CLIP'}, {text['num_hidden_layers']} layers of "
        f"{text['hidden_size']}, {text['max_position_embeddings']} tokens",
        vae=vae,
        weights=f"{weights}; {_types(folder)}",
        leftovers=dict(left),
        unused=unused[:_NAMED],
        unused_count=len(unused),
        notes=list(notes),
    )


def _unet(config: Mapping[str, Any]) -> str:
    """A UNet's config in a line."""
    widths = "/".join(map(str, config.get("block_out_channels", [])))
    layers, width = config.get("layers_per_block"), config.get("cross_attention_dim")
    return f"widths {widths}, layers_per_block {layers}, text of width {width}"


def _types(folder: Path) -> str:
    """What types the written weights have: one for all, or by part."""
    found = {}
    for part in ("unet", "vae", "text_encoder"):
        for file in (folder / part).glob("*.safetensors"):
            types = {one["dtype"] for one in read_safetensors_header(file)[0].values()}
            found[part] = "/".join(sorted(types))
    if len(set(found.values())) == 1:
        return next(iter(found.values()))
    return ", ".join(f"{part} {types}" for part, types in found.items())


def _settings(changes: Changes) -> dict[str, Any]:
    return {
        "prediction_type": changes.prediction_type,
        "ema": changes.ema,
        "clip_skip": changes.clip_skip,
        "vae": str(changes.vae) if changes.vae else None,
        "embeddings": [str(file) for file in changes.embeddings],
    }


def _licence(checkpoint: Checkpoint) -> LicenceNote:
    said = checkpoint.metadata
    title = short(said.get("modelspec.title", "")) or checkpoint.file.stem
    licence = "LicenseRef-" + (re.sub(r"[^\w.+-]+", "-", said.get("modelspec.license", ""), flags=re.A) or "unknown")
    author = short(said.get("modelspec.author", "")) or "unknown: the file names neither author nor licence"
    return LicenceNote(f"Checkpoint {title}", licence, author)
