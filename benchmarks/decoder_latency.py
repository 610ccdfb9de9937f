"""Decoders (latents to picture, batch 1) timed in turns on LiteRT's CPU and in PyTorch, fp32: students and teacher.

Usage: python benchmarks/decoder_latency.py models/emoji/base models/emoji/final [SOURCE …] [--runs 100] [--threads N]
           [--cache DIR] [--json FILE]
       python benchmarks/decoder_latency.py sd-1.5 sd-1.5:half sd-1.5:tiny sd-1.5:taesd --runs 3

A SOURCE is a model folder or a configuration at full size (sd-1.5, sd-2.1); with `:half` or `:tiny` behind it, its
decoder pruned by that preset; with `:taesd`, a decoder of TAESD's size (AutoencoderTiny) in its place. Protocol: as
the latency table's (pocketfusion.latency.profiling.rounds): twice `--runs` rounds, each of which runs every network
once; the calmer half counts, by the median with minimum and maximum. The ratios are the first source's to each.
Weights are random: latency does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from pocketfusion.artefact import write_json
from pocketfusion.runtime.networks import available_cores


def decoder_job(source: str) -> Any:
    """The decoder of `source` as the exporter wraps it, with its inputs."""
    import torch
    from diffusers import AutoencoderKL, AutoencoderTiny

    from pocketfusion.distill.decoder_pruning import half_shape, prune_decoder, tiny_shape
    from pocketfusion.latency.timing_backends import Job
    from pocketfusion.mobile.wrappers import decoder_of
    from pocketfusion.models.sd_configs import CONFIGS
    from pocketfusion.models.slim_autoencoder import load_vae

    name, _, preset = source.partition(":")
    if name in CONFIGS:
        vae, unet = AutoencoderKL(**CONFIGS[name]["vae"]).eval(), CONFIGS[name]["unet"]
    else:
        vae = load_vae(Path(name) / "vae")
        unet = json.loads((Path(name) / "unet" / "config.json").read_text(encoding="utf-8"))
    if preset == "taesd":
        vae = AutoencoderTiny(latent_channels=vae.config.latent_channels).eval()
    elif preset:
        vae = prune_decoder(vae, {"half": half_shape, "tiny": tiny_shape}[preset](vae))
    decoder, side = decoder_of(vae).eval().requires_grad_(False), unet["sample_size"]
    latents = torch.randn(1, side, side, vae.config.latent_channels, generator=torch.Generator().manual_seed(0))
    return Job(f"decoder:{decoder}", lambda: decoder, {"latents": latents})


def main() -> None:
    """Parses the command line, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", metavar="SOURCE")
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--cache", type=Path, help="keep the exported networks here")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    from pocketfusion.cli.shared import quiet_libraries

    quiet_libraries()
    from pocketfusion.latency.profiling import network_entry, time_jobs
    from pocketfusion.latency.timing_backends import make_backend

    jobs = {source: decoder_job(source) for source in given.sources}
    measured: dict[str, dict[str, Any]] = {}
    settings: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        cache = given.cache or Path(scratch)
        cache.mkdir(parents=True, exist_ok=True)
        for name in ("litert-cpu", "torch"):
            backend = make_backend(name, "float32", given.threads, cache)
            times, _ = time_jobs(backend, jobs, given.runs, lambda stage, done, total: None, "")
            settings[name] = backend.settings.model_dump()
            for source, timing in times.items():
                measured.setdefault(source, {})[name] = timing
    rows, first = {}, given.sources[0]
    base = network_entry("decoder", jobs[first].module(), jobs[first], {})
    for source, times in measured.items():
        entry = network_entry("decoder", jobs[source].module(), jobs[source], {})
        share = {"parameters": base.parameters / entry.parameters, "macs": base.macs / entry.macs}
        rows[source] = {"parameters": entry.parameters, "macs": entry.macs, "first_to_this": share}
        print(
            f"{source}: {entry.parameters / 1e6:.3f} M parameters ({share['parameters']:.2f}x fewer than the first), "
            f"{entry.macs / 1e9:.3f} G multiply-adds ({share['macs']:.2f}x fewer)"
        )
        for name, timing in times.items():
            share[name] = measured[first][name].median / timing.median
            rows[source][name] = timing.model_dump()
            spread = f"{timing.median:.2f} ms ({timing.min:.2f} to {timing.max:.2f})"
            print(f"    {name:11} {spread}, {share[name]:.2f}x faster")
    if given.json:
        write_json(given.json, {"settings": settings, "runs": given.runs, "decoders": rows})


if __name__ == "__main__":
    main()
