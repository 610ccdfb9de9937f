"""The browser's engine in Chromium: its pictures are Python's; what goes wrong is told and leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest


def test_wasm(vitest, drawn: Path, chromium: str) -> None:
    vitest("tests/engine/wasm.test.ts", POCKETFUSION_VECTORS=str(drawn), POCKETFUSION_CHROMIUM=chromium)


def test_webgpu(vitest, drawn: Path, chromium: str) -> None:
    vitest("tests/engine/webgpu.test.ts", POCKETFUSION_VECTORS=str(drawn), POCKETFUSION_CHROMIUM=chromium)


@pytest.mark.slow
def test_memory_over_fifty_pictures(vitest, drawn: Path, chromium: str) -> None:
    vitest(
        "tests/engine/wasm.test.ts", "heap", POCKETFUSION_VECTORS=str(drawn), POCKETFUSION_CHROMIUM=chromium,
        POCKETFUSION_PICTURES="50",
    )  # fmt: skip


@pytest.mark.slow  # an export, and shaders on a CPU
def test_an_exported_bundle_passes_its_self_check(vitest, tmp_path: Path, chromium: str) -> None:
    from guided import make_guided_folder
    from pocketfusion.mobile.export import export

    folder = make_guided_folder(tmp_path / "model", "classifier-free")
    weights = dict.fromkeys(("text_encoder", "unet", "decoder"), "int8-dynamic")
    export(folder, tmp_path / "exported", target="litert-gpu", weights=weights, gate_steps=1)
    (tmp_path / "drawn.json").write_text(
        json.dumps({"bundles": {"exported": str(tmp_path / "exported")}, "cases": []})
    )
    vitest("tests/engine/exported.test.ts", POCKETFUSION_VECTORS=str(tmp_path), POCKETFUSION_CHROMIUM=chromium)


def test_the_self_check_is_of_the_networks(drawn: Path) -> None:
    """By hand: noise in every row, the middle timestep; the decoder's image in means over a latent's pixels."""
    from pocketfusion.runtime.denoise import seeded_noise, timestep_embedding
    from pocketfusion.runtime.manifest import Bundle
    from pocketfusion.runtime.networks import Network

    bundle = Bundle.open(drawn / "gpu")
    unet, decoder = (Network(bundle.file(n), getattr(bundle.manifest.networks, n), 1) for n in ("unet", "decoder"))
    assert bundle.manifest.time_embedding is not None
    time = timestep_embedding(500, bundle.manifest.time_embedding)
    noise, text = seeded_noise(0, 8, 8, 4), seeded_noise(1, 32, 32, 1)[..., 0]
    prediction = unet(
        sample=np.stack([noise] * 2),
        timestep_embedding=np.concatenate([time] * 2),
        encoder_hidden_states=np.stack([text] * 2),
    )
    image = decoder(latents=noise[None])[0]
    means = [image[8 * y : 8 * y + 8, 8 * x : 8 * x + 8].mean((0, 1)) for y in range(8) for x in range(8)]
    stored = np.frombuffer(bundle.file("selfcheck").read_bytes(), "<f4")
    np.testing.assert_allclose(stored, np.concatenate([prediction.ravel(), np.ravel(means)]), atol=1e-5)
