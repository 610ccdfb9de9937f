"""What a folder is: bundle, model folder or single model; sizes, costs, licences, provenance, and if it is whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from pocketfusion.data.latents.reading import is_cache
from pocketfusion.errors import INSTALL_COMPRESS, PocketfusionError
from pocketfusion.folder import check_folder, folder_hash, read_json, read_provenance, weight_files
from pocketfusion.models.sampling import read_sampling
from pocketfusion.runtime.manifest import MANIFEST, Bundle
from pocketfusion.safetensors_header import read_safetensors_header

#: The first diffusers' names of an autoencoder's attention.
_OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # floating types; others cannot hold NaN


def describe(path: Path, on_stage: Callable[[str], None] = lambda stage: None) -> dict[str, Any]:
    """A JSON-ready description of the folder at `path`. Sizes are bytes; `problems` is empty if all is well.

    `on_stage` is called with the name of each slow stage. Raises PocketfusionError if there is nothing at `path`, it
    is of no known kind, or what describes it is damaged.
    """
    if not path.exists():
        raise PocketfusionError(f"there is nothing at {path}: check the path")
    if path.is_file():
        check_folder(path)  # says what file it is
    if (path / MANIFEST).is_file():
        return describe_bundle(path)
    if (path / "model_index.json").is_file():
        return describe_model_folder(path, on_stage)
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        return describe_single_model(path)
    if (path / "unet").is_dir():
        check_folder(path)  # says what it lacks
    if is_cache(path):
        raise PocketfusionError(f"{path} is a cache of latents: 'pocketfusion data show-cache {path}' tells of it")
    raise PocketfusionError(
        f"{path} is neither a bundle ({MANIFEST}) nor a model folder (model_index.json) nor a single model "
        "(config.json and safetensors): check the path"
    )


def describe_bundle(path: Path) -> dict[str, Any]:
    """The manifest's content, file sizes and the hash check of the bundle at `path`."""
    bundle = Bundle.open(path, verify=False, any_runtime=True)
    manifest = bundle.manifest
    networks = {
        name: {"size": manifest.network_size(name), **network.model_dump()} for name, network in manifest.networks
    }
    return {
        "kind": "bundle",
        "path": str(path),
        "name": manifest.name,
        "version": manifest.version,
        "created_by": manifest.created_by,
        "target": manifest.target,
        "coreml": manifest.coreml.model_dump() if manifest.coreml else None,
        "onnx": manifest.onnx.model_dump() if manifest.onnx else None,
        "sha256": bundle.hash,
        "size": sum(file.size for file in manifest.files.values()),
        "problems": list(bundle.problems()),
        "networks": networks,
        "max_tokens": manifest.tokenizer.max_length,
        "latents": manifest.latents.model_dump(),
        "image": manifest.image.model_dump(),
        "scheduler": manifest.scheduler.model_dump(),
        "sampler": manifest.sampler,
        "samplers": list(manifest.allowed_samplers),
        "defaults": manifest.defaults.model_dump(),
        "guidance": manifest.guidance,
        "guidance_range": manifest.guidance_range,
        "preview": manifest.preview.model_dump() if manifest.preview else None,
        "licences": [licence.model_dump() for licence in manifest.licences],
        "provenance": manifest.provenance,
    }


def describe_model_folder(path: Path, on_stage: Callable[[str], None] = lambda stage: None) -> dict[str, Any]:
    """Networks, configs and provenance of the model folder at `path`. Only its multiply-adds need torch."""
    check_folder(path)
    on_stage("reading the weights")
    networks = {name: _weights(path / name) for name in ("text_encoder", "unet", "vae")}
    problems = [problem for network in networks.values() for problem in network.pop("problems")]
    unet, vae = (read_json(path / name / "config.json") for name in ("unet", "vae"))
    size = unet.get("sample_size")
    height, width = (size, size) if isinstance(size, int) else size or (None, None)
    scheduler = read_json(path / "scheduler" / "scheduler_config.json")
    provenance, sampling = _provenance(path), read_sampling(path)
    embeds = unet.get("time_cond_proj_dim") is not None
    factor = 2 ** (len(vae.get("block_out_channels", [0])) - 1)
    on_stage("counting multiply-adds")
    macs, note, lacking = _multiply_adds(path)
    problems += lacking
    on_stage("hashing the files")
    return {
        "kind": "model folder",
        "path": str(path),
        "name": path.resolve().name,
        "sha256": folder_hash(path),
        "size": _size(path),
        "problems": problems,
        "networks": networks,
        "multiply_adds": macs,
        "multiply_adds_note": note,
        "latents": {"channels": unet.get("in_channels"), "height": height, "width": width},
        "image": {"height": height and height * factor, "width": width and width * factor},
        "scheduler": scheduler,
        "sampling": sampling.model_dump() if sampling else None,
        "guidance": sampling.guidance if sampling else "embedded" if embeds else "classifier-free",
        "guidance_range": sampling.guidance_range if sampling else None,
        "licences": _licence_files(path),
        "provenance": provenance,
    }


def describe_single_model(path: Path) -> dict[str, Any]:
    """Weights, config and provenance of a folder that holds one model, such as the judge."""
    weights = _weights(path)
    return {
        "kind": "model",
        "path": str(path),
        "name": path.resolve().name,
        "sha256": folder_hash(path),
        "size": _size(path),
        "problems": weights.pop("problems"),
        "networks": {path.resolve().name: weights},
        "config": read_json(path / "config.json"),
        "licences": _licence_files(path),
        "provenance": _provenance(path),
    }


def _weights(folder: Path) -> dict[str, Any]:
    """Class, parameters, dtypes and size of the network in `folder`, and its weights that hold NaN or infinity."""
    files, _ = weight_files(folder)
    parameters, dtypes, problems = 0, set[str](), list[str]()
    for file in files:
        header, start = read_safetensors_header(file)
        parameters += sum(math.prod(tensor["shape"]) for tensor in header.values())
        dtypes |= {tensor["dtype"] for tensor in header.values()}
        problems += [f"{file}: the weight {name} holds NaN or infinity" for name in _unsound(file, header, start)]
    config = read_json(folder / "config.json")
    return {
        "class": config.get("_class_name") or next(iter(config.get("architectures") or []), "unknown"),
        "parameters": parameters,
        "weights": ", ".join(sorted(dtypes)),
        "size": sum(file.stat().st_size for file in files),
        "problems": problems,
    }


def _unsound(file: Path, header: dict[str, dict[str, Any]], start: int) -> Iterator[str]:
    for name, tensor in header.items():
        begin, end = tensor["data_offsets"]
        if tensor["dtype"] not in _DTYPES or begin == end:
            continue
        dtype = np.dtype(_DTYPES[tensor["dtype"]])
        values = np.memmap(file, dtype, "r", start + begin, (end - begin) // dtype.itemsize)
        # bfloat16 is read as integers: NaN and infinity are those with all exponent bits set
        bad = (values & 0x7F80) == 0x7F80 if tensor["dtype"] == "BF16" else ~np.isfinite(values)
        if bad.any():
            yield name


def _multiply_adds(path: Path) -> tuple[dict[str, int] | None, str, list[str]]:
    """Multiply-adds of one call per network at batch 1, counted on shapes alone (meta tensors), a note if not, and
    what weights the files lack."""
    if find_spec("torch") is None or find_spec("diffusers") is None:
        return None, f"to count them: {INSTALL_COMPRESS}", []
    from pocketfusion.quiet import quiet

    with quiet():  # what the libraries say on import is of no use here
        return _count_on_meta(path)


def _count_on_meta(path: Path) -> tuple[dict[str, int] | None, str, list[str]]:
    from pocketfusion.mobile.pipeline_specs import multiply_adds, samples
    from pocketfusion.mobile.wrappers import wrap
    from pocketfusion.models.loading import assemble, empty_part

    try:
        pipeline: Any = assemble(path, empty_part)  # its parts are set at run time, where mypy does not see them
        inputs = samples(pipeline, batch=1)
        return (
            {
                name: multiply_adds(network, {key: value.to("meta") for key, value in inputs[name].items()})
                for name, network in wrap(pipeline).items()
            },
            "",
            [
                problem
                for part in ("unet", "vae", "text_encoder")
                for problem in _lacking(getattr(pipeline, part).state_dict(), path / part)
            ],
        )
    except Exception as error:  # an architecture that stock diffusers does not know; the rest is still shown
        reason = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        return None, f"not counted ({reason})", []


def _lacking(wanted: Iterable[str], folder: Path) -> Iterator[str]:
    """A sentence if files lack weights of their network, under today's names or older ones that are read."""

    def today(name: str) -> str:
        name = name.removeprefix("text_model.")
        for old, new in _OLD_NAMES.items():
            name = name.replace(old, new)
        return name

    there = {today(name) for file in weight_files(folder)[0] for name in read_safetensors_header(file)[0]}
    missing = [name for name in wanted if today(name) not in there and not name.startswith("pooler.")]
    if missing:
        yield f"{folder} lacks the weight {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else "")


def _provenance(path: Path) -> dict[str, Any] | None:
    provenance = read_provenance(path)
    return provenance.model_dump() if provenance else None


def _licence_files(path: Path) -> list[dict[str, str]]:
    return [{"what": file.name} for file in sorted((path / "licences").glob("*")) if file.is_file()]


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
