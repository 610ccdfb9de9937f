"""The whole export on the tiny folder, once: what is in the bundle, and that it computes what PyTorch does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from pocketfusion.folder import Provenance, folder_hash, write_provenance
from pocketfusion.mobile import gate, pipeline_specs
from pocketfusion.mobile.convert import DEFAULT_SIGNATURE
from pocketfusion.mobile.export import STAGES, export
from pocketfusion.mobile.flatbuffer import operations
from pocketfusion.models.loading import load_pipeline
from pocketfusion.runtime.manifest import Bundle

PROMPT = "a red apple, noto style"


def test_manifest(tiny_bundle: Path, tiny_folder: Path) -> None:
    manifest = Bundle.open(tiny_bundle).manifest  # also checks hashes and sizes
    assert manifest.name == "tiny"
    assert manifest.latents.model_dump() == {"channels": 4, "height": 8, "width": 8}
    assert manifest.image.model_dump() == {"height": 64, "width": 64}
    assert manifest.tokenizer.max_length == 32 and manifest.tokenizer.pad_token_id == 0
    assert manifest.scheduler.prediction_type == "v_prediction" and manifest.scheduler.timestep_spacing == "trailing"
    assert manifest.provenance["model_folder"] == folder_hash(tiny_folder)
    pipeline = load_pipeline(tiny_folder)
    assert manifest.networks.unet.parameters == sum(p.numel() for p in pipeline.unet.parameters())
    assert manifest.networks.text_encoder.sqnr_db is not None and manifest.networks.text_encoder.sqnr_db >= 60
    assert manifest.networks.unet.guidance_delta == pytest.approx(1, abs=1e-3)
    assert [x.shape for x in manifest.networks.unet.inputs] == [[2, 8, 8, 4], [2], [2, 32, 32]]
    assert manifest.networks.decoder.outputs[0].shape == [1, 64, 64, 3]


def test_multiply_adds_by_hand() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 5, 3, padding=1)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            flat = self.conv(x).flatten(2)
            return {"y": torch.nn.functional.scaled_dot_product_attention(flat, flat, flat)}

    conv, attention = 5 * 3 * 9 * 16, 2 * 5 * 5 * 16
    assert pipeline_specs.multiply_adds(Net(), {"x": torch.zeros(1, 3, 4, 4)}) == conv + attention


def test_unet_equals_the_stock_one(tiny_bundle: Path, tiny_folder: Path) -> None:
    batch = 2
    unet = load_pipeline(tiny_folder).unet
    torch.manual_seed(3)
    sample, states = torch.randn(batch, 4, 8, 8), torch.randn(batch, 32, 32)
    t = torch.full((batch,), 777.0)
    with torch.no_grad():
        expected = unet(sample, t, states).sample.permute(0, 2, 3, 1).numpy()
    nhwc = np.ascontiguousarray(sample.permute(0, 2, 3, 1).numpy())
    inputs = {"sample": nhwc, "timestep": t.numpy(), "encoder_hidden_states": states.numpy()}
    (measured,) = gate.run(tiny_bundle / "unet.tflite", [inputs], "noise_pred", DEFAULT_SIGNATURE)
    assert gate.sqnr(expected, measured) > 60


def test_text_encoder_equals_the_stock_pipelines(tiny_bundle: Path, tiny_folder: Path) -> None:
    pipeline = load_pipeline(tiny_folder)
    tokenizer = Tokenizer.from_file(str(tiny_bundle / "tokenizer.json"))
    for prompt in (PROMPT, ""):
        with torch.no_grad():
            expected = pipeline.encode_prompt(prompt, "cpu", 1, False)[0].numpy()
        encoding = tokenizer.encode(prompt)
        ids, mask = np.zeros((1, 32), np.int32), np.zeros((1, 32), np.int32)
        ids[0, : len(encoding.ids)], mask[0, : len(encoding.ids)] = encoding.ids, 1
        inputs = {"input_ids": ids, "attention_mask": mask}
        (measured,) = gate.run(tiny_bundle / "text_encoder.tflite", [inputs], "prompt_embeds", DEFAULT_SIGNATURE)
        assert gate.sqnr(expected, measured) > 60


def test_decoder_divides_by_the_scaling_factor(tiny_bundle: Path, tiny_folder: Path) -> None:
    vae = load_pipeline(tiny_folder).vae
    torch.manual_seed(4)
    z = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        expected = vae.decode(z / vae.config.scaling_factor).sample.permute(0, 2, 3, 1).numpy()
    inputs = {"latents": np.ascontiguousarray(z.permute(0, 2, 3, 1).numpy())}
    (measured,) = gate.run(tiny_bundle / "decoder.tflite", [inputs], "image", DEFAULT_SIGNATURE)
    assert gate.sqnr(expected, measured) > 60


def test_graphs_hold_no_operation_that_gpus_refuse(tiny_bundle: Path) -> None:
    for network in ("text_encoder", "unet", "decoder"):
        for counts in operations(tiny_bundle / f"{network}.tflite"):
            assert not {"BROADCAST_TO", "GATHER_ND", "TOPK_V2", "PACK"} & set(counts), network


def test_unet_has_one_transpose_per_head_split_only(tiny_bundle: Path) -> None:
    # 32 attentions x (query, key, value, output); fewer where the converter drops those of single positions
    for counts in operations(tiny_bundle / "unet.tflite"):
        assert counts["TRANSPOSE"] <= 32 * 4


def test_licences_provenance_and_stages(tiny_folder_copy: Path, tmp_path: Path, fast_conversion: None) -> None:
    (tiny_folder_copy / "licences").mkdir()
    text = (
        "# MiniLM\nSPDX-License-Identifier: Apache-2.0\nCopyright 2020 Someone\nAttribution: sentence-transformers\n"
    )
    (tiny_folder_copy / "licences" / "minilm.md").write_text(text)
    (tiny_folder_copy / "licences" / "drawings.txt").write_text("free\n")
    write_provenance(tiny_folder_copy, Provenance(stage="teacher", settings={"steps": 7}))
    seen: list[str] = []
    report = export(
        tiny_folder_copy, tmp_path / "b", guidance_scale=2.5, num_inference_steps=9,
        progress=lambda stage, index, count: seen.append(stage),
    )  # fmt: skip
    manifest = Bundle.open(tmp_path / "b").manifest
    assert tuple(seen) == STAGES
    assert manifest.defaults.model_dump() == {"num_inference_steps": 9, "guidance_scale": 2.5}
    assert manifest.files["licence:minilm"].path == "licences/minilm.md"
    minilm = next(x for x in manifest.licences if x.what == "minilm")
    assert minilm.spdx == "Apache-2.0" and minilm.attribution == "Copyright 2020 Someone; sentence-transformers"
    assert next(x for x in manifest.licences if x.what == "drawings").spdx == "LicenseRef-drawings"
    assert manifest.provenance["model"]["settings"] == {"steps": 7}
    assert report.size == sum(p.stat().st_size for p in (tmp_path / "b").rglob("*") if p.is_file())
    assert json.loads(json.dumps(report.as_dict()))["networks"][1]["name"] == "unet"


def test_runtime_draws_what_the_stock_pipeline_draws(tiny_bundle: Path, tiny_folder: Path) -> None:
    """End to end: DDIM, 6 guided steps from the same latents; stock diffusers against the bundle on LiteRT."""
    from pocketfusion.runtime.pipeline import Pipeline

    pipeline = load_pipeline(tiny_folder)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    images = pipeline(
        PROMPT, num_inference_steps=6, guidance_scale=4.0, latents=latents.clone(), output_type="np"
    ).images
    nhwc = np.ascontiguousarray(latents.permute(0, 2, 3, 1).numpy())
    result = Pipeline.load(tiny_bundle, num_threads=2).generate(
        PROMPT, num_inference_steps=6, guidance_scale=4.0, latents=nhwc
    )
    drawn = np.asarray(result.images[0], np.float64)
    mse = float(np.mean((np.round(images[0] * 255) - drawn) ** 2))
    assert 10 * np.log10(255**2 / max(mse, 1e-12)) >= 40
