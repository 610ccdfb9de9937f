"""`export --target onnx`: bundles, their networks against stock diffusers, forms of weights, every kind of UNet."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drive import against

from pocketfusion.errors import PocketfusionError
from pocketfusion.info import describe
from pocketfusion.mobile import gate
from pocketfusion.mobile.export import export
from pocketfusion.mobile.gate import sqnr
from pocketfusion.models.loading import load_pipeline
from pocketfusion.runtime.manifest import NETWORKS, Bundle
from pocketfusion.runtime.pipeline import Pipeline


def called(file: Path, **inputs: np.ndarray) -> np.ndarray:
    import onnxruntime

    (output,) = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"]).run(None, inputs)
    return output


def test_bundle(onnx_bundle: Path) -> None:
    """Standard operations alone, in files that say nothing of the machine that they were made on."""
    import onnx

    manifest = Bundle.open(onnx_bundle, drawable=True).manifest  # also checks hashes and sizes
    assert manifest.target == "onnx" and manifest.onnx is not None
    assert manifest.onnx.model_dump() == {"opset": 20, "layout": "bundle"}
    on_disk = {path.relative_to(onnx_bundle).as_posix() for path in onnx_bundle.rglob("*") if path.is_file()}
    assert on_disk == {file.path for file in manifest.files.values()} | {"bundle.json"}
    for name, network in manifest.networks:
        assert network.weights == "float32" and network.sqnr_db > 100
        file = onnx_bundle / f"{name}.onnx"
        model = onnx.load(str(file))
        onnx.checker.check_model(model, full_check=True)
        assert [(one.domain, one.version) for one in model.opset_import] == [("", 20)]
        assert {one.domain for one in model.graph.node} <= {""} and not model.functions
        assert manifest.network_size(name) == file.stat().st_size
        assert b"site-packages" not in file.read_bytes() and str(Path.cwd()).encode() not in file.read_bytes()
    assert manifest.networks.unet.guidance_delta == pytest.approx(1, abs=1e-3)
    assert describe(onnx_bundle)["onnx"] == {"opset": 20, "layout": "bundle"}


def test_networks_compute_what_the_stock_ones_do(onnx_bundle: Path, onnx_folder: Path) -> None:
    pipeline = load_pipeline(onnx_folder)
    torch.manual_seed(3)
    sample, states, t = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 64), torch.full((2,), 777.0)
    ids = torch.randint(0, 49408, (1, 77), dtype=torch.int32)

    def nhwc(x: torch.Tensor) -> np.ndarray:
        return np.ascontiguousarray(x.permute(0, 2, 3, 1).numpy())

    with torch.no_grad():
        noise, image = pipeline.unet(sample, t, states).sample, pipeline.vae.decode(sample[:1] / 0.18215).sample
        text = pipeline.text_encoder(ids)[0].numpy()
    files = {name: onnx_bundle / f"{name}.onnx" for name in NETWORKS}
    given = {"sample": nhwc(sample), "timestep": t.numpy(), "encoder_hidden_states": states.numpy()}
    mask = np.ones((1, 77), np.int32)
    assert sqnr(text, called(files["text_encoder"], input_ids=ids.numpy(), attention_mask=mask)) > 100
    assert sqnr(nhwc(noise), called(files["unet"], **given)) > 100
    assert sqnr(nhwc(image), called(files["decoder"], latents=nhwc(sample[:1]))) > 100


def test_it_is_drawn_as_stock_diffusers_draws_it(onnx_bundle: Path, onnx_folder: Path) -> None:
    assert against(Pipeline.load(onnx_bundle, 1), load_pipeline(onnx_folder)) > 60


@pytest.mark.parametrize(("form", "bytes_per_weight", "psnr"), [("float16", 2, 45), ("int8", 1, 30)])
def test_smaller_weights(
    form: str, bytes_per_weight: int, psnr: float, onnx_folder: Path, onnx_bundle: Path, copied: None, tmp_path: Path
) -> None:
    """Through the gate, of their size, drawn as diffusers draws, and in operations that every runtime has."""
    import onnx

    report = export(onnx_folder, tmp_path / "b", target="onnx", weights=dict.fromkeys(NETWORKS, form), gate_steps=1)
    assert [row.weights for row in report.networks] == [form] * 3
    for row in report.networks:
        model = onnx.load(str(tmp_path / "b" / f"{row.name}.onnx"))
        onnx.checker.check_model(model, full_check=True)
        assert {one.domain for one in model.graph.node} == {""}
        exact = (onnx_bundle / f"{row.name}.onnx").stat().st_size
        graph = exact - 4 * row.parameters
        assert row.size == pytest.approx(graph + bytes_per_weight * row.parameters, rel=0.2)
    assert against(Pipeline.load(tmp_path / "b", 1), load_pipeline(onnx_folder)) > psnr


def test_weights_beside_a_graph_that_cannot_hold_them(
    onnx_folder: Path, onnx_bundle: Path, copied: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above a protobuf's 2 GB: two files, both in the manifest, and the same pictures."""
    from pocketfusion.mobile.onnx import weight_storage

    monkeypatch.setattr(weight_storage, "APART_FROM", 2_000_000)
    export(onnx_folder, tmp_path / "b", target="onnx", gate_steps=1)
    bundle = Bundle.open(tmp_path / "b", drawable=True)
    assert bundle.manifest.files["text_encoder.data"].path == "text_encoder.onnx_data"
    assert "decoder.data" not in bundle.manifest.files
    sizes = [(tmp_path / "b" / name).stat().st_size for name in ("text_encoder.onnx", "text_encoder.onnx_data")]
    assert sizes[0] < 300_000 and bundle.manifest.network_size("text_encoder") == sum(sizes)
    pictures = [Pipeline.load(path, 1).generate("a red cat", seed=1, num_inference_steps=2).images[0]
                for path in (onnx_bundle, tmp_path / "b")]  # fmt: skip
    assert pictures[0].tobytes() == pictures[1].tobytes()
    data = tmp_path / "b" / "text_encoder.onnx_data"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(PocketfusionError, match="text_encoder.onnx_data is truncated"):
        Pipeline.load(tmp_path / "b")


@pytest.mark.parametrize(("kind", "step"), [("embedded", True), ("folded", False)])
def test_guidance_in_the_unet(
    kind: str, step: bool, guided: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scale as an input, or none, and the sampler's step in the graph: drawn as LiteRT draws the same model."""
    folder, litert = guided[kind]
    monkeypatch.setitem(gate.MAX_GUIDANCE_ERROR, "float32", 0.01)  # random weights follow prompts so little
    report = export(folder, tmp_path / "b", target="onnx", scheduler_step=step, gate_steps=1)
    assert report.networks[1].guidance_delta == pytest.approx(1, abs=1e-2)
    unet = Bundle.open(tmp_path / "b", drawable=True).manifest.networks.unet
    assert {one.name for one in unet.inputs} == {
        *("sample", "timestep", "encoder_hidden_states"),
        *(("timestep_cond",) if kind == "embedded" else ()),
        *(("step_coefficients",) if step else ()),
    }
    given = {"seed": 4, "num_inference_steps": 3, "num_images": 2}
    for one, other in zip(
        *(Pipeline.load(path, 1).generate("a red apple", **given).images for path in (tmp_path / "b", litert)),
        strict=True,
    ):
        assert np.abs(np.asarray(one, np.int16) - np.asarray(other)).max() <= 1


def test_a_tiny_decoder(tmp_path: Path) -> None:
    from menagerie import tiny_autoencoder

    from pocketfusion.mobile.devices import TARGETS
    from pocketfusion.mobile.onnx.graph_export import GRAPH, convert
    from pocketfusion.mobile.wrappers import decoder_of

    vae = tiny_autoencoder()
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    given = latents.permute(0, 2, 3, 1).contiguous()
    convert(decoder_of(vae).eval(), {"latents": given}, tmp_path / "decoder", TARGETS["onnx"])
    with torch.no_grad():
        expected = vae.decode(latents).sample.permute(0, 2, 3, 1).numpy()
    assert sqnr(expected, called(tmp_path / "decoder" / GRAPH, latents=given.numpy())) > 90


class _Unusual(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = _Eigenvalues()

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.inner(x)}


class _Eigenvalues(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigvalsh(x)


def test_an_operation_that_onnx_lacks(tmp_path: Path) -> None:
    from pocketfusion.mobile.devices import TARGETS
    from pocketfusion.mobile.onnx.graph_export import convert

    with pytest.raises(
        PocketfusionError, match=r"ONNX cannot express the operation aten._linalg_eigh of inner in _Unusual: "
    ):
        convert(_Unusual().eval(), {"x": torch.eye(3)}, tmp_path / "n", TARGETS["onnx"])
    assert not list(tmp_path.iterdir())


def test_the_command_from_export_to_picture(
    onnx_folder: Path, onnx_bundle: Path, copied: None, tmp_path: Path, run: Callable
) -> None:
    code, out, err = run(
        "export", onnx_folder, tmp_path / "b", "--target", "onnx", "--gate-steps", 1, "--json", tmp_path / "r.json"
    )
    assert (code, err) == (0, "") and "pocketfusion generate" in out and "docs/runtimes.md" in out
    assert len(json.loads((tmp_path / "r.json").read_text())["networks"]) == 3
    for name in NETWORKS:  # the same network gives the same bytes
        assert (tmp_path / "b" / f"{name}.onnx").read_bytes() == (onnx_bundle / f"{name}.onnx").read_bytes()
    given = ("--bundle", tmp_path / "b", "--seed", 1, "--steps", 2, "--json", tmp_path / "p.json")
    code, out, err = run("generate", "a red cat", "-o", tmp_path / "p.png", *given)
    assert (code, err) == (0, "")
    assert json.loads((tmp_path / "p.json").read_text())["runtime"].startswith("onnxruntime ")
    code, out, err = run("bench", tmp_path / "b", "--runs", 1, "--steps", 2, "--threads", 1)
    assert (code, err) == (0, "") and "onnxruntime" in out
    assert shutil.which("pocketfusion") is None or "target      onnx" in run("info", tmp_path / "b")[1]


@pytest.fixture(scope="module")
def diffusers_bundle(onnx_folder: Path, once: Callable) -> Path:
    """The same model in diffusers' layout. Read only."""
    given = {"target": "onnx", "layout": "diffusers", "gate_steps": 1}
    return once("onnx-diffusers", lambda root: export(onnx_folder, root / "b", **given)) / "b"


def test_diffusers_pipeline_draws_with_its_layout(diffusers_bundle: Path, onnx_folder: Path) -> None:
    """diffusers' own `OnnxStableDiffusionPipeline`, two pictures at once, against its PyTorch pipeline."""
    from diffusers import DDIMScheduler, OnnxStableDiffusionPipeline

    given: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "np"}
    noise = np.random.default_rng(0).standard_normal((2, 4, 8, 8), np.float32)
    pipelines = (
        OnnxStableDiffusionPipeline.from_pretrained(diffusers_bundle, vae_encoder=None),
        load_pipeline(onnx_folder),
    )
    images = []
    for pipeline, latents in zip(pipelines, (noise, torch.from_numpy(noise)), strict=True):
        pipeline.set_progress_bar_config(disable=True)
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
        side = 64 if pipeline is pipelines[0] else 32  # it takes an eighth for the latents', whatever the decoder is
        images.append(pipeline(["a red cat", "a dog"], height=side, width=side, latents=latents, **given).images)
    found, wanted = images
    assert found.shape == wanted.shape == (2, 32, 32, 3) and wanted.std() > 0.2
    assert np.abs(found - wanted).max() < 1e-3


def test_diffusers_layout_is_not_drawn_here(diffusers_bundle: Path, run: Callable) -> None:
    manifest = Bundle.open(diffusers_bundle, any_runtime=True).manifest
    on_disk = {path.relative_to(diffusers_bundle).as_posix() for path in diffusers_bundle.rglob("*") if path.is_file()}
    assert on_disk == {file.path for file in manifest.files.values()} | {"bundle.json"}
    assert {
        "unet/model.onnx",
        "vae_decoder/model.onnx",
        "model_index.json",
        "scheduler/scheduler_config.json",
    } < on_disk
    for command in (("generate", "a", "--bundle", diffusers_bundle), ("bench", diffusers_bundle)):
        code, _, err = run(*command)
        assert code == 2 and "in the layout of diffusers' OnnxStableDiffusionPipeline" in " ".join(err.split())


def test_bench_all_has_it(
    onnx_folder: Path, onnx_parts: Path, tmp_path: Path, run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime and OpenVINO beside PyTorch: the same pictures."""
    from pocketfusion.mobile.export_settings import ExportSettings

    pytest.importorskip("openvino", reason="openvino is not installed: pip install '.[openvino]'")
    cache = tmp_path / "cache"
    cache.mkdir()
    key = ExportSettings(target="onnx").conversion_key(onnx_folder, "unet")
    shutil.copytree(onnx_parts / "unet", cache / f"unet-{key}.exact")
    only, out = "onnxruntime:int8,openvino:float32", tmp_path / "t.json"
    options = ("--only", only, "--cache", cache, "--threads", 1, "--runs", 1, "--steps", 2, "--json", out)
    code, printed, err = run("bench", "--all", onnx_folder, *options)
    assert (code, err) == (0, ""), printed + err
    rows = {row["name"]: row for row in json.loads(out.read_text())["rows"]}
    assert rows["openvino:float32"]["psnr_db"] > 50 and 25 < rows["onnxruntime:int8"]["psnr_db"] < 60


def test_openvino_draws_the_same(onnx_bundle: Path) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed: pip install '.[openvino]'")
    given = {"seed": 1, "num_inference_steps": 2}
    one = Pipeline.load(onnx_bundle, 1).generate("a red cat", **given).images[0]
    other = Pipeline.load(onnx_bundle, 1, runtime="openvino").generate("a red cat", **given).images[0]
    assert np.abs(np.asarray(one, np.int16) - np.asarray(other)).max() <= 1
    rough = Pipeline.load(onnx_bundle, 1, runtime="openvino-bf16", mode="sequential").generate("a red cat", **given)
    assert rough.images[0].size == one.size
