"""A model folder to a LiteRT bundle: convert, shrink, measure against PyTorch, write the manifest; all or nothing."""

from __future__ import annotations

import errno
import resource
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn

from pocketfusion import __version__
from pocketfusion.artefact import atomic_folder, check_writable_parent, sha256_file, write_json
from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import check_folder, folder_hash, load_pipeline, read_provenance
from pocketfusion.mobile import specs
from pocketfusion.mobile.convert import convert
from pocketfusion.mobile.inputs import reference_runs
from pocketfusion.mobile.licences import copy_licences
from pocketfusion.mobile.measure import NetworkReport, measure, run_file
from pocketfusion.mobile.quantize import quantize
from pocketfusion.mobile.wrappers import StablePipeline, wrap
from pocketfusion.models.guidance import guidance_of
from pocketfusion.models.sampling import Sampling, read_sampling
from pocketfusion.quiet import quiet
from pocketfusion.runtime.manifest import MANIFEST, NETWORKS, BundleFile, Defaults, Manifest, Network, Networks

#: Called with the stage's name, its number from 0 and their count.
Progress = Callable[[str, int, int], None]
STAGES = (
    "loading",
    "PyTorch reference",
    *(f"{name.replace('_', ' ')}: {step}" for name in NETWORKS for step in ("convert", "gate")),
    "writing bundle",
)


@dataclass(frozen=True)
class ExportReport:
    """What `export` did: the bundle, its size in bytes, its networks, and the process's peak memory in bytes."""

    bundle: str
    size: int
    networks: list[NetworkReport]
    peak_rss: int

    def as_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return asdict(self)


def export(
    folder: Path | str,
    out: Path | str,
    *,
    weights: Mapping[str, str] | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    name: str | None = None,
    overwrite: bool = False,
    progress: Progress = lambda stage, index, count: None,
) -> ExportReport:
    """Exports the model folder `folder` to the bundle `out`.

    `weights`: per network (`text_encoder`, `unet`, `decoder`) float32, float16 or int8; float32 where not given.
    `num_inference_steps` and `guidance_scale` become the bundle's defaults; the latter also in the gate's sampling.
    Where not given they are those of the folder's `sampling.json`, else 25 and 4.
    `name` is the bundle's (default: `out`'s last part). An existing `out` is replaced only with `overwrite`.

    Raises PocketfusionError, and leaves no `out`, if the folder or the settings are wrong, a network does not convert,
    the gate (see `pocketfusion.mobile.gate`) is missed, or the disk is full.
    """
    folder, out = Path(folder), Path(out)
    kinds = _check(folder, out, weights or {}, num_inference_steps, guidance_scale, overwrite)
    stated = read_sampling(folder)
    defaults = _defaults(folder, stated, num_inference_steps, guidance_scale)
    stages = iter(STAGES)

    def stage() -> None:
        current = next(stages)
        progress(current, STAGES.index(current), len(STAGES))

    stage()
    with quiet():
        pipeline: StablePipeline = load_pipeline(folder)
    networks = wrap(pipeline)
    guidance = guidance_of(pipeline.unet, stated.guidance if stated else None)
    batch = 2 if guidance == "classifier-free" else 1
    spec = specs.tokenizer_spec(pipeline)
    scheduler = specs.scheduler_spec(pipeline)
    with _disk_errors(out), atomic_folder(out, overwrite=overwrite) as partial:
        stage()
        reference = reference_runs(pipeline, networks, spec.max_length, defaults.guidance_scale, guidance)
        rows: dict[str, NetworkReport] = {}
        embeds: np.ndarray | None = None
        for network in NETWORKS:
            stage()
            file = partial / f"{network}.tflite"
            _write_network(pipeline, network, networks[network], kinds[network], file, batch)
            stage()
            measured = run_file(file, network, reference)
            rows[network] = measure(network, kinds, file, networks[network], pipeline, measured, reference, embeds)
            if network == "text_encoder":
                embeds = measured
        stage()
        tokenizer = Tokenizer.from_str(pipeline.tokenizer.backend_tokenizer.to_str())
        tokenizer.no_padding()  # both are the runtime's to set, from the manifest
        tokenizer.no_truncation()
        tokenizer.save(str(partial / "tokenizer.json"), pretty=False)
        licence_files, licences = copy_licences(folder, partial)
        files = (
            {n: partial / f"{n}.tflite" for n in NETWORKS} | {"tokenizer": partial / "tokenizer.json"} | licence_files
        )
        manifest = Manifest(
            name=name or out.name,
            created_by=f"pocketfusion {__version__}",
            files={key: _file(path, partial) for key, path in files.items()},
            networks=Networks(**{n: _network(pipeline, n, networks[n], row, batch) for n, row in rows.items()}),
            tokenizer=spec,
            latents=specs.latent_spec(pipeline),
            image=specs.image_spec(pipeline),
            scheduler=scheduler,
            guidance=guidance,
            guidance_range=stated.guidance_range if stated else None,
            defaults=defaults,
            licences=licences,
            provenance=_provenance(folder),
        )
        write_json(partial / MANIFEST, manifest.contents())
        size = sum(p.stat().st_size for p in partial.rglob("*") if p.is_file())
    return ExportReport(str(out), size, list(rows.values()), peak_rss())


def peak_rss() -> int:
    """The process's largest resident memory so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _check(
    folder: Path, out: Path, weights: Mapping[str, str], steps: int | None, guidance: float | None, overwrite: bool
) -> dict[str, str]:
    """Everything that can be refused before minutes of work; returns the weights of all three networks."""
    for network, kind in weights.items():
        if network not in NETWORKS or kind not in WEIGHTS:
            raise PocketfusionError(
                f"{kind!r} weights for {network!r} are not known: "
                f"choose {', '.join(WEIGHTS)} for {', '.join(NETWORKS)}"
            )
    if steps is not None and not 1 <= steps <= 1000:
        raise PocketfusionError(f"--steps is {steps}: choose 1 to 1000")
    if guidance is not None and not np.isfinite(guidance):
        raise PocketfusionError(f"--guidance is {guidance}: choose a finite number, such as 4")
    check_folder(folder)
    check_writable_parent(out)
    if out.exists() and not overwrite:
        raise PocketfusionError(f"{out} exists already: choose another output path or pass --overwrite")
    if out.exists() and not (out / MANIFEST).is_file():
        raise PocketfusionError(f"{out} exists and is not a bundle: it is not replaced, choose another output path")
    return {network: weights.get(network, "float32") for network in NETWORKS}


def _defaults(folder: Path, stated: Sampling | None, steps: int | None, guidance: float | None) -> Defaults:
    """Given, else the folder's, else 25 and 4; raises PocketfusionError for a scale other than the one folded in."""
    known = stated or Sampling(num_inference_steps=25, guidance_scale=4.0)
    if known.guidance == "folded" and guidance not in (None, known.guidance_scale):
        raise PocketfusionError(
            f"--guidance is {guidance:g} but {folder} has {known.guidance_scale:g} folded in: leave --guidance out"
        )
    return Defaults(
        num_inference_steps=known.num_inference_steps if steps is None else steps,
        guidance_scale=known.guidance_scale if guidance is None else guidance,
    )


@contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise PocketfusionError(
            f"the disk of {out.absolute().parent} is full: free some space and run again"
        ) from None


def _write_network(
    pipeline: StablePipeline, network: str, module: nn.Module, kind: str, file: Path, batch: int
) -> None:
    samples = specs.samples(pipeline, batch)[network]
    if kind == "float32":
        convert(module, samples, file)
        return
    exact = file.with_suffix(".float32.tflite")
    convert(module, samples, exact)
    quantize(exact, file, kind)
    exact.unlink()


@torch.no_grad()
def _network(pipeline: StablePipeline, network: str, module: nn.Module, row: NetworkReport, batch: int) -> Network:
    inputs = specs.samples(pipeline, batch)[network]
    return Network(
        inputs=specs.tensor_specs(inputs),
        outputs=specs.tensor_specs(module(**inputs)),
        parameters=row.parameters,
        macs=row.macs,
        weights=row.weights,  # type: ignore[arg-type]  # one of WEIGHTS, checked
        sqnr_db=row.sqnr_db,
        guidance_delta=row.guidance_delta,
    )


def _file(path: Path, bundle: Path) -> BundleFile:
    return BundleFile(path=path.relative_to(bundle).as_posix(), sha256=sha256_file(path), size=path.stat().st_size)


def _provenance(folder: Path) -> dict[str, Any]:
    provenance = read_provenance(folder)
    return {"model_folder": folder_hash(folder)} | ({"model": provenance.model_dump()} if provenance else {})
