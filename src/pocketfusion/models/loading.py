"""A model folder's parts, each loaded whole or refused: what a file lacks, the libraries fill in at random."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch
import transformers
from diffusers import SchedulerMixin, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import BertModel, CLIPTextModel, PreTrainedModel, PreTrainedTokenizerBase

from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import check_finite, check_folder, read_json, weight_files
from pocketfusion.models.learnt_tokens import spell_out

Network = TypeVar("Network", bound=nn.Module)
_TEXT_ENCODERS: dict[str, type[Any]] = {"CLIPTextModel": CLIPTextModel, "BertModel": BertModel}
_LARGEST = 2**17  #: of a number in a config that is no width: pixels, positions, token ids
_UNUSED = ("pooler.",)  # BERT's, which no prompt state depends on


def load_part(kind: type[Network], folder: Path, **options: Any) -> Network:
    """The network in `folder` (a model folder's `unet/`, say) in fp32; `options` are `from_pretrained`'s.

    Of files in several variants `folder.weight_files` says which is read. Raises PocketfusionError if it does not
    load, lacks a weight, has one of another shape, or one is NaN.
    """
    files, variant = weight_files(folder)
    _check_config(folder, files)
    if issubclass(kind, PreTrainedModel):
        options["ignore_mismatched_sizes"] = True  # they are refused below, by name; diffusers does so itself
    network, said = _loaded(
        lambda: kind.from_pretrained(  # type: ignore[attr-defined]  # diffusers' and transformers' models have it
            folder,
            torch_dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            variant=variant,
            output_loading_info=True,
            **options,
        ),
        folder,
    )
    missing = sorted(key for key in said["missing_keys"] if not key.startswith(_UNUSED))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise PocketfusionError(f"{folder} lacks the weight {missing[0]}{more}: restore it from its source")
    if said["mismatched_keys"]:
        key, *shapes = sorted(said["mismatched_keys"])[0]
        raise PocketfusionError(f"{folder}: the weight {key} is {shapes} in the file and by the config: restore both")
    check_finite(network, str(folder))
    return network


def _check_config(folder: Path, files: list[Path]) -> None:
    """Raises PocketfusionError if `config.json` asks for a far larger network than its weights are: it would be built
    first, for hours or past the memory, and then lack them."""
    from pocketfusion.safetensors_header import read_safetensors_header

    try:
        headers = [read_safetensors_header(file)[0] for file in files]
    except PocketfusionError as error:
        raise PocketfusionError(f"{folder} could not be loaded ({error})") from None
    tensors = sum(map(len, headers))
    widest = max((size for header in headers for one in header.values() for size in one["shape"]), default=0)
    for key, value in read_json(folder / "config.json").items():
        most = tensors if "layers" in key else max(widest, _LARGEST)
        for number in value if isinstance(value, list) else [value]:
            if type(number) is int and abs(number) > most:
                raise PocketfusionError(
                    f"{folder / 'config.json'} says {key[:80]} {number}, and the weights beside it are of a smaller "
                    "network: restore both from their source"
                )


def empty_part(kind: type[Network], folder: Path) -> Network:
    """The network in `folder` on `meta`, without its weights, which need not be there.

    Raises PocketfusionError if its config does not load, or is of a far larger network than the weights beside it.
    """
    if any(folder.glob("*.safetensors")):
        _check_config(folder, weight_files(folder)[0])

    def made() -> Any:
        with torch.device("meta"):
            if issubclass(kind, PreTrainedModel):
                return kind(kind.config_class.from_pretrained(folder))  # type: ignore[attr-defined]  # transformers' have it
            return kind.from_config(kind.load_config(folder))  # type: ignore[attr-defined]  # diffusers' have it

    network: Network = _loaded(made, folder)
    return network.eval()


def assemble(path: Path, part: Callable[[type[Any], Path], Any] = load_part) -> StableDiffusionPipeline:
    """The parts of the model folder `path` as a stock pipeline; raises PocketfusionError as `load_part` does.

    With `empty_part` nothing but configs and the tokenizer is read: shapes, sizes and multiply-adds need no more.
    """
    from pocketfusion.models.elastic_unet import ElasticUNet
    from pocketfusion.models.slim_autoencoder import vae_class

    index = read_json(path / "model_index.json")
    name = str(read_json(path / "unet" / "config.json").get("_class_name", "UNet2DConditionModel"))
    unets = {kind.__name__: kind for kind in (UNet2DConditionModel, ElasticUNet)}
    if name not in unets:
        raise PocketfusionError(f"{path / 'unet'} is a {name!a}: only {' and '.join(unets)} are supported")
    encoder = _listed(index, "text_encoder")
    if encoder not in _TEXT_ENCODERS:
        raise PocketfusionError(
            f"{path / 'text_encoder'} is a {encoder!a}: only {' and '.join(_TEXT_ENCODERS)} are supported"
        )
    tokenizer = _loaded(
        lambda: library_class(transformers, _listed(index, "tokenizer"), PreTrainedTokenizerBase).from_pretrained(
            path / "tokenizer", local_files_only=True
        ),
        path / "tokenizer",
    )
    spell_out(tokenizer)
    return StableDiffusionPipeline(
        unet=part(unets[name], path / "unet"),
        vae=part(vae_class(path / "vae"), path / "vae"),
        text_encoder=part(_TEXT_ENCODERS[encoder], path / "text_encoder"),
        tokenizer=tokenizer,
        scheduler=_loaded(
            lambda: library_class(diffusers, _listed(index, "scheduler"), SchedulerMixin).from_pretrained(
                path / "scheduler"
            ),
            path / "scheduler",
        ),
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    )


def _listed(index: dict[str, Any], part: str) -> str:
    """The class that model_index.json names for a part."""
    entry = index.get(part)
    return str(entry[1]) if isinstance(entry, list) and len(entry) == 2 else "None"


def library_class(library: Any, name: str, base: type) -> Any:
    """A class of the library by the name in a folder's file; no code but the library's is imported for it.

    Raises PocketfusionError if there is none of that name and kind.
    """
    kind = getattr(library, name, None)
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise PocketfusionError(f"the folder names the class {name[:80]!a}, which is not known")
    return kind


def _loaded(read: Callable[[], Any], folder: Path) -> Any:
    """What `read` gives; whatever the libraries raise over a damaged file ends in one sentence."""
    try:
        return read()
    except PocketfusionError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PocketfusionError(f"{folder} could not be loaded ({reason[:200]})") from None


def load_pipeline(path: Path) -> StableDiffusionPipeline:
    """Loads a model folder as a stock diffusers pipeline in fp32, whole and finite.

    A safety checker is left out, there or not; learnt tokens of several vectors are spelt out by the tokenizer (see
    `models.learnt_tokens`). Raises PocketfusionError if it is not a model folder of the family, holds pickled weights,
    a component does not load, lacks a weight, or a weight is NaN.
    """
    check_folder(path)
    pipeline = assemble(path)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
