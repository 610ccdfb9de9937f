"""A model folder to a bundle: convert, shrink, measure against PyTorch, write the manifest; all or nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from torch import nn

from pocketfusion import __version__
from pocketfusion.artefact import atomic_folder, sha256_file, write_json
from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import folder_hash, read_provenance
from pocketfusion.locks import locked
from pocketfusion.mobile import pipeline_specs
from pocketfusion.mobile.adapters.lora import merge_lora
from pocketfusion.mobile.backends import backend_of
from pocketfusion.mobile.bundle_extras import copy_licences, fit_preview, known_result, write_styles
from pocketfusion.mobile.export_settings import ExportSettings
from pocketfusion.mobile.measure import Described, NetworkReport, describe, measure, reference_runs, run_file, tiled
from pocketfusion.mobile.wrappers import StablePipeline, time_embedding_spec, unet_form, wrap
from pocketfusion.models.guided import guidance_of
from pocketfusion.models.learnt_tokens import add_embedding
from pocketfusion.models.loading import load_pipeline
from pocketfusion.models.sampling import read_sampling
from pocketfusion.models.tiny_autoencoder import load_decoder, vae_hash
from pocketfusion.quiet import quiet
from pocketfusion.runtime.manifest import (
    EMPTY_PROMPT,
    MANIFEST,
    NETWORKS,
    SELF_CHECK,
    BundleFile,
    Manifest,
    Network,
    Networks,
)
from pocketfusion.runtime.memory import peak_rss, release_garbage
from pocketfusion.runtime.specs import SamplerName
from pocketfusion.runtime.trust.vocabulary import check_parts

#: Called with the stage's name, its number from 0 and their count.
Progress = Callable[[str, int, int], None]
STAGES = (
    "loading",
    "PyTorch reference",
    *(f"{name.replace('_', ' ')}: {step}" for name in NETWORKS for step in ("convert", "pack", "gate")),
    "writing bundle",
)


@dataclass(frozen=True)
class ExportReport:
    """What `export` did: the bundle, its size in bytes, its networks, the process's peak memory in bytes, how many
    layers of LoRA adapters are of blocks that were cut from the model, and how the bundle is drawn."""

    bundle: str
    size: int
    networks: list[NetworkReport]
    peak_rss: int | None
    lora_layers_left_out: int = 0
    sampler: SamplerName = "ddim"
    num_inference_steps: int = 0
    guidance_scale: float = 1.0

    def as_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return asdict(self)


def export(
    folder: Path | str,
    out: Path | str,
    *,
    name: str | None = None,
    overwrite: bool = False,
    progress: Progress = lambda stage, index, count: None,
    **options: Any,
) -> ExportReport:
    """Exports the model folder `folder` to the bundle `out`.

    `options` are `ExportSettings`' fields. Steps and guidance become the bundle's defaults, the latter also in the
    gate's sampling; where not given they are those of `few_steps` or the folder (see `usual_sampling`).
    `name` is the bundle's (default: `out`'s last part). An existing `out` is replaced only with `overwrite`.
    Converted networks are kept beside `out` until the bundle is whole, so a killed export goes on where it was.

    Raises PocketfusionError, and leaves no `out`, if the folder or the settings are wrong, another process exports to
    `out`, a network does not convert or the gate (see `pocketfusion.mobile.gate`) is missed; OSError if the disk is
    full.
    """
    folder, out = Path(folder), Path(out)
    settings = ExportSettings(**options)
    settings.check(folder, out, overwrite)
    kinds = settings.kinds()
    sampling = settings.sampling(folder)
    defaults = settings.defaults(folder, sampling)
    if defaults.guidance_scale <= 1 and not settings.scheduler_step:
        settings = replace(settings, two_calls=True)  # one call a step is all that such a model needs
    stages = iter(STAGES)

    def stage() -> None:
        current = next(stages)
        progress(current, STAGES.index(current), len(STAGES))

    stage()
    with quiet():
        pipeline: StablePipeline = load_pipeline(folder)
    left_out = sum(merge_lora(pipeline, file, scale) for file, scale in settings.lora)
    for file in settings.embedding:
        add_embedding(pipeline, file)
    encoder = pipeline.vae  # whose latents the UNet makes
    if settings.vae is not None:
        with quiet():
            pipeline.register_modules(vae=load_decoder(settings.vae))
    settings.resize(pipeline)
    plain = wrap(pipeline)
    guidance = guidance_of(pipeline.unet, sampling.guidance)
    form = unet_form(guidance, settings.target, settings.two_calls, settings.scheduler_step)
    networks = wrap(pipeline, form.time_embedding, form.scheduler_step)
    backend = backend_of(settings)
    backend.check(guidance)
    inputs = pipeline_specs.samples(pipeline, form.batch, form.time_embedding, form.scheduler_step)
    if settings.decoder_tile:
        side = settings.decoder_tile
        inputs["decoder"]["latents"] = inputs["decoder"]["latents"][:, :side, :side].contiguous()
    spec, tokenizer = pipeline_specs.tokenizer_spec(pipeline), _tokenizer(pipeline)
    latents, image = pipeline_specs.latent_spec(pipeline), pipeline_specs.image_spec(pipeline)
    sampler, scheduler = settings.drawn_with(folder, pipeline, defaults.num_inference_steps)
    work = out.absolute().parent / f".{out.name}.work"
    with _kept_until_whole(work), atomic_folder(out, overwrite=overwrite) as partial:
        stage()
        reference = reference_runs(
            pipeline, plain, spec.max_length, defaults.guidance_scale, guidance, settings.gate_steps
        )
        preview = fit_preview(encoder, plain["decoder"], image.height // latents.height, reference)
        del encoder
        if settings.decoder_tile:
            reference = tiled(reference, plain["decoder"], settings.decoder_tile)
        one = pipeline_specs.samples(pipeline, batch=1)
        described = {n: describe(networks[n], inputs[n], plain[n], one[n]) for n in NETWORKS}
        rows: dict[str, NetworkReport] = {}
        forms: dict[str, str] = {}
        embeds: dict[str, np.ndarray] = {}
        known: list[np.ndarray] = []
        for network in NETWORKS:
            stage()
            exact = work / f"{network}-{settings.conversion_key(folder, network)}{backend.suffix}"
            if not exact.exists():
                _convert_network(networks[network], inputs[network], exact, settings)
            for module in (plain[network], networks[network]):  # a UNet whose time comes from outside is a copy
                module.to("meta")  # only its file is looked at from here on: the memory is the runtime's
            release_garbage()
            stage()
            stored = backend.store(exact, partial, network, networks[network], kinds[network])
            forms[network] = stored.form
            stage()
            call = form if network == "unet" else None
            measured: dict[str, NetworkReport] = {}
            for arithmetic, run in stored.runs.items():
                found = run_file(run, network, reference, call, pipeline.unet)
                measured[arithmetic] = measure(
                    network, stored.label, forms, run, stored.size, described[network], pipeline.unet, found,
                    reference, embeds.get(arithmetic), call,
                )  # fmt: skip
                if network == "text_encoder":
                    embeds[arithmetic] = found
            rows[network] = _together(measured)
            if settings.target == "litert-gpu" and network != "text_encoder":
                tensors, output = described[network].inputs, described[network].outputs[0].name
                time = time_embedding_spec(pipeline.unet)
                known.append(known_result(stored.runs[""], tensors, output, scheduler, defaults.guidance_scale, time))
            stored.close()
            if network == "text_encoder" and guidance == "classifier-free":  # the gate's first prompt is the empty one
                (partial / "empty_prompt.f32").write_bytes(embeds[""][0].astype("<f4").tobytes())
        stage()
        tokenizer.save(str(partial / "tokenizer.json"), pretty=False)
        licence_files, licences = copy_licences(folder, partial)
        files = backend.files(partial, tokenizer, folder) | {"tokenizer": partial / "tokenizer.json"}
        files |= write_styles(folder, partial)
        if guidance == "classifier-free":
            files[EMPTY_PROMPT] = partial / "empty_prompt.f32"
        if known:
            files[SELF_CHECK] = partial / "selfcheck.f32"
            files[SELF_CHECK].write_bytes(np.concatenate(known).astype("<f4").tobytes())
        manifest = Manifest.made(
            name=name or out.name,
            created_by=f"pocketfusion {__version__}",
            target=settings.target,
            files={key: _file(path, partial) for key, path in (files | licence_files).items()},
            networks=Networks.made(**{n: _network(described[n], row, settings) for n, row in rows.items()}),
            tokenizer=spec,
            latents=latents,
            image=image,
            scheduler=scheduler,
            sampler=sampler,
            samplers=None if read_sampling(folder) is None else ["ddim"],
            time_embedding=time_embedding_spec(pipeline.unet) if form.time_embedding == "outside" else None,
            preview=preview,
            guidance=guidance,
            guidance_range=sampling.guidance_range,
            defaults=defaults,
            licences=licences,
            provenance=_provenance(folder, settings),
            **backend.manifest(partial),
        )
        write_json(partial / MANIFEST, manifest.contents())
        backend.verify(partial, manifest)  # what the runtime would refuse is no bundle
        size = sum(p.stat().st_size for p in partial.rglob("*") if p.is_file())
    drawn = (sampler, defaults.num_inference_steps, defaults.guidance_scale)
    return ExportReport(str(out), size, list(rows.values()), peak_rss(), left_out, *drawn)


def _tokenizer(pipeline: StablePipeline) -> Tokenizer:
    """The pipeline's tokenizer; raises PocketfusionError for parts that bundles do not have."""
    tokenizer = Tokenizer.from_str(pipeline.tokenizer.backend_tokenizer.to_str())
    tokenizer.no_padding()  # both are the runtime's to set, from the manifest
    tokenizer.no_truncation()
    try:
        check_parts(json.loads(tokenizer.to_str()))
    except ValueError as error:
        raise PocketfusionError(
            f"the folder's tokenizer cannot be in a bundle ({error}): use BERT's or CLIP's with their own parts"
        ) from None
    return tokenizer


@contextmanager
def _kept_until_whole(work: Path) -> Iterator[None]:
    """One export at a time has `work`, which lasts over a kill alone: a run that ends, well or not, removes it."""
    with locked(work):
        try:
            yield
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _convert_network(module: nn.Module, samples: pipeline_specs.Samples, file: Path, settings: ExportSettings) -> None:
    backend_of(settings).convert(module, samples, file)


def _together(measured: dict[str, NetworkReport]) -> NetworkReport:
    """The figures of all arithmetics in one row."""
    row, half = measured[""], measured.get("fp16")
    if half is None:
        return row
    return replace(row, fp16_sqnr_db=half.sqnr_db, fp16_guidance_delta=half.guidance_delta)


def _network(described: Described, row: NetworkReport, settings: ExportSettings) -> Network:
    return Network.made(
        inputs=described.inputs,
        outputs=described.outputs,
        parameters=row.parameters,
        macs=row.macs,
        weights=row.weights,  # type: ignore[arg-type]  # one of the forms, or mixed
        sqnr_db=row.sqnr_db,
        guidance_delta=row.guidance_delta,
        fp16_sqnr_db=row.fp16_sqnr_db,
        fp16_guidance_delta=row.fp16_guidance_delta,
        gpu_precision="fp32" if row.name in settings.gpu_fp32 else None,
    )


def _file(path: Path, bundle: Path) -> BundleFile:
    return BundleFile.made(
        path=path.relative_to(bundle).as_posix(), sha256=sha256_file(path), size=path.stat().st_size
    )


def _provenance(folder: Path, settings: ExportSettings) -> dict[str, Any]:
    provenance = read_provenance(folder)
    lora = [{"file": file.name, "sha256": sha256_file(file), "scale": scale} for file, scale in settings.lora]
    vae = settings.vae
    embeddings = [{"file": file.name, "sha256": sha256_file(file)} for file in settings.embedding]
    return (
        {"model_folder": folder_hash(folder), "export": settings.chosen()}
        | ({"model": provenance.model_dump()} if provenance else {})
        | ({"vae": {"file": vae.name, "sha256": vae_hash(vae)}} if vae else {})
        | ({"lora": lora} if lora else {})
        | ({"embeddings": embeddings} if embeddings else {})
        | ({"few_steps": settings.few_steps} if settings.few_steps else {})
    )
