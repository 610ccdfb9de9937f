"""`export --target coreml`: bundles, what the gate ran, `info` and `check` on them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pocketfusion.errors import PocketfusionError
from pocketfusion.info import describe
from pocketfusion.mobile import gate
from pocketfusion.mobile.coreml import mlpackage
from pocketfusion.mobile.coreml.executor import Executor
from pocketfusion.mobile.coreml.verdict import judge
from pocketfusion.mobile.export import export
from pocketfusion.mobile.gate import sqnr
from pocketfusion.models.loading import load_pipeline
from pocketfusion.runtime.manifest import NETWORKS, Bundle


def test_bundle(coreml_bundle: Path) -> None:
    manifest = Bundle.open(coreml_bundle, any_runtime=True).manifest  # also checks hashes and sizes
    assert manifest.target == "coreml" and manifest.coreml is not None
    assert manifest.coreml.model_dump() == {
        "ios": 17,
        "layout": "bundle",
        "packages": {name: [f"{name}.mlpackage"] for name in NETWORKS},
    }
    paths = {file.path for file in manifest.files.values()}
    assert {f"unet.mlpackage/{name}" for name in (mlpackage.MODEL, mlpackage.WEIGHTS, mlpackage.CONTENTS)} <= paths
    on_disk = {path.relative_to(coreml_bundle).as_posix() for path in coreml_bundle.rglob("*") if path.is_file()}
    assert on_disk == paths | {"bundle.json"}, "torch.export's debugging notes are not shipped"
    for name, network in manifest.networks:
        assert network.weights == "float16" and network.sqnr_db >= 55 and network.fp16_sqnr_db >= 45
        assert manifest.network_size(name) == mlpackage.size(coreml_bundle / f"{name}.mlpackage")
    unet = manifest.networks.unet
    assert unet.guidance_delta == pytest.approx(1, abs=1e-2) and unet.fp16_guidance_delta == pytest.approx(1, abs=1e-2)
    assert manifest.provenance["export"]["ios"] == 17 and manifest.provenance["export"]["weights"]["unet"] == "float16"


def test_packages_compute_what_the_stock_networks_do(coreml_bundle: Path, coreml_folder: Path) -> None:
    pipeline = load_pipeline(coreml_folder)
    torch.manual_seed(3)
    sample, states, t = torch.randn(2, 4, 8, 8), torch.randn(2, 32, 32), torch.full((2,), 777.0)
    latents = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        expected = pipeline.unet(sample, t, states).sample.permute(0, 2, 3, 1).numpy()
        image = pipeline.vae.decode(latents / 0.7).sample.permute(0, 2, 3, 1).numpy()

    def nhwc(x: torch.Tensor) -> np.ndarray:
        return np.ascontiguousarray(x.permute(0, 2, 3, 1).numpy())

    unet, decoder = (Executor(coreml_bundle / f"{name}.mlpackage") for name in ("unet", "decoder"))
    given = {"sample": nhwc(sample), "timestep": t.numpy(), "encoder_hidden_states": states.numpy()}
    assert sqnr(expected, unet(**given)["noise_pred"]) > 55
    assert sqnr(image, decoder(latents=nhwc(latents))["image"]) > 55


def test_apples_layout(apple_bundle: tuple[Path, Path]) -> None:
    """Names, tensors and tokenizer as Apple's Swift package asks for them, a UNet in two chunks: against the stock
    networks, called as that package calls them."""
    folder, bundle = apple_bundle
    manifest = Bundle.open(bundle, any_runtime=True).manifest
    assert manifest.coreml is not None and manifest.coreml.packages == {
        "text_encoder": ["TextEncoder.mlpackage"],
        "unet": ["UnetChunk1.mlpackage", "UnetChunk2.mlpackage"],
        "decoder": ["VAEDecoder.mlpackage"],
    }
    pipeline = load_pipeline(folder)
    ids = pipeline.tokenizer("a red cat", padding="max_length", max_length=16, return_tensors="pt").input_ids
    encoder = Executor(bundle / "TextEncoder.mlpackage")
    assert encoder.inputs == {"input_ids": (1, 16)} and encoder.outputs == ["last_hidden_state"]
    found = encoder(input_ids=ids.numpy().astype(np.float32))["last_hidden_state"]
    with torch.no_grad():
        assert sqnr(pipeline.text_encoder(ids)[0].numpy(), found) > 55
    torch.manual_seed(4)
    sample, states, t = torch.randn(2, 4, 8, 8), torch.randn(2, 16, 32), torch.full((2,), 500.0)
    chunks = [bundle / name for name in manifest.coreml.packages["unet"]]
    first, second = (mlpackage.size(chunk) for chunk in chunks)
    assert 0.3 < first / second < 3
    unet = Executor(chunks)
    assert unet.inputs == {"sample": (2, 4, 8, 8), "timestep": (2,), "encoder_hidden_states": (2, 32, 1, 16)}
    given = {"sample": sample, "timestep": t, "encoder_hidden_states": states.transpose(1, 2)[:, :, None]}
    found = unet(**{name: np.ascontiguousarray(value.numpy()) for name, value in given.items()})["noise_pred"]
    with torch.no_grad():
        assert sqnr(pipeline.unet(sample, t, states).sample.numpy(), found) > 55
    latents = torch.randn(1, 4, 8, 8)  # Swift divides them by 0.18215, whatever the model's own factor is
    image = Executor(bundle / "VAEDecoder.mlpackage")(z=(latents / 0.18215).numpy())["image"]
    with torch.no_grad():
        assert sqnr(pipeline.vae.decode(latents / 0.7).sample.numpy(), image) > 55
    vocabulary = json.loads((bundle / "vocab.json").read_text())
    assert vocabulary == pipeline.tokenizer.get_vocab() and vocabulary["<|startoftext|>"]
    merges = (bundle / "merges.txt").read_text().splitlines()
    assert merges == ["#version: 0.2", "r e", "re d</w>", "c a", "ca t</w>"]


@pytest.fixture
def only_the_unet(coreml_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`export` copies the other networks from the bundle: they are the same."""
    from pocketfusion.mobile import export as module

    convert = module._convert_network

    def write(wrapped: Any, samples: Any, file: Path, settings: Any) -> None:
        network = file.name.partition("-")[0]
        if network == "unet":
            convert(wrapped, samples, file, settings)
        else:
            shutil.copytree(coreml_bundle / f"{network}.mlpackage", file)

    monkeypatch.setattr(module, "_convert_network", write)


def test_embedded_guidance_with_the_step_in_the_graph(
    coreml_folder: Path, tmp_path: Path, only_the_unet: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scale is an input, the output the new latents; the gate has compared it with PyTorch's own step."""
    from guided import RANGE, SCALE, small_unet
    from pocketfusion.models.sampling import Sampling, write_sampling

    folder = shutil.copytree(coreml_folder, tmp_path / "model")
    torch.manual_seed(5)
    shutil.rmtree(folder / "unet")
    small_unet(12).save_pretrained(folder / "unet")
    index = json.loads((folder / "model_index.json").read_text())
    index["unet"] = ["diffusers", "UNet2DConditionModel"]
    (folder / "model_index.json").write_text(json.dumps(index))
    sampling = {"num_inference_steps": 4, "guidance_scale": SCALE, "guidance": "embedded", "guidance_range": RANGE}
    write_sampling(folder, Sampling(**sampling))
    # random weights follow prompt and scale so little that fp16's rounding is some per cent of it
    monkeypatch.setitem(gate.MAX_GUIDANCE_ERROR, "float16", 0.05)
    report = export(folder, tmp_path / "b", target="coreml", scheduler_step=True, gate_steps=1)
    assert report.networks[1].guidance_delta == pytest.approx(1, abs=1e-2)
    manifest = Bundle.open(tmp_path / "b", any_runtime=True).manifest
    assert manifest.guidance == "embedded"
    assert set(Executor(tmp_path / "b" / "unet.mlpackage").inputs) == {
        *("sample", "timestep", "encoder_hidden_states", "timestep_cond", "step_coefficients")
    }


def test_check_draws_with_the_executor(coreml_bundle: Path) -> None:
    verdict = judge(coreml_bundle)
    assert verdict.passed and verdict.picture_psnr_db is not None and verdict.picture_psnr_db > 40
    by_name = {one.network: one for one in verdict.networks}
    assert set(by_name) == set(NETWORKS)
    assert by_name["unet"].operations["conv"] > 10 and by_name["text_encoder"].operations["gather"] >= 1
    assert all(45 <= one.fp16_sqnr_db < 120 for one in verdict.networks)


def test_check_finds_what_fp16_breaks(apple_bundle: tuple[Path, Path], tmp_path: Path, cli: Callable) -> None:
    """Weights so large that a sum leaves fp16: told by its network, with exit code 1; other forms in the JSON too."""
    bundle = shutil.copytree(apple_bundle[1], tmp_path / "b")
    _enlarge_the_last_convolution(bundle / "VAEDecoder.mlpackage")
    _rehash(bundle)
    done = cli("check", bundle, "--json", tmp_path / "report.json")
    assert done.returncode == 1, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert [one["passed"] for one in report["networks"]] == [True, True, False]
    assert "FP16 loses too much" in done.stdout and "Traceback" not in done.stderr


def test_info_and_the_runtime_on_it(coreml_bundle: Path, cli: Callable, tmp_path: Path) -> None:
    about = describe(coreml_bundle)
    assert about["target"] == "coreml" and about["coreml"]["ios"] == 17 and not about["problems"]
    assert about["networks"]["unet"]["size"] == mlpackage.size(coreml_bundle / "unet.mlpackage")
    done = cli("info", coreml_bundle)
    assert done.returncode == 0 and re.search(r"target +coreml, iOS 17 and later", done.stdout)
    for command in (["generate", "a cat", "--bundle"], ["bench"], ["serve"]):
        refused = cli(*command, coreml_bundle)
        assert refused.returncode == 2 and "Traceback" not in refused.stderr, command
        said = " ".join((refused.stdout + refused.stderr).split())
        assert "exported for Core ML, on Apple's devices and cannot be run here" in said, command


@pytest.mark.parametrize("damage", ["program", "weights", "missing", "operation"])
def test_a_damaged_package(damage: str, coreml_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(coreml_bundle, tmp_path / "b")
    package = bundle / "decoder.mlpackage"
    program, weights = package / mlpackage.MODEL, package / mlpackage.WEIGHTS
    if damage == "program":
        program.write_bytes(program.read_bytes()[:-50])
    elif damage == "weights":
        weights.write_bytes(weights.read_bytes()[:200])
    elif damage == "missing":
        weights.unlink()
    else:
        spec = mlpackage.read_spec(package)
        function = spec.mlProgram.functions["main"]
        operations = function.block_specializations[function.opset].operations
        next(one for one in operations if one.type == "conv").type = "conv_of_tomorrow"
        program.write_bytes(spec.SerializeToString())
    with pytest.raises(PocketfusionError, match=r"is truncated|is altered|is missing"):
        judge(bundle)
    assert describe(bundle)["problems"]
    if damage != "missing":
        _rehash(bundle)
    with pytest.raises(PocketfusionError, match=r"damaged|missing|conv_of_tomorrow .*cannot run"):
        judge(bundle)


def test_the_same_network_gives_the_same_bytes(coreml_bundle: Path, tmp_path: Path) -> None:
    import coremltools as ct

    source, opened = coreml_bundle / "decoder.mlpackage", tmp_path / "opened.mlpackage"
    shutil.copytree(source, opened)  # coremltools rewrites the list of a package that it opens
    mlpackage.save(ct.models.MLModel(str(opened), skip_model_load=True), tmp_path / "again.mlpackage")
    for name in (mlpackage.WEIGHTS, mlpackage.CONTENTS):
        assert (source / name).read_bytes() == (tmp_path / "again.mlpackage" / name).read_bytes()


def _enlarge_the_last_convolution(package: Path) -> None:
    """Its weights in the file become as large as fp16 has them: sums of them leave it, and no norm follows."""
    constants, found = mlpackage.Constants(package), []
    for one in mlpackage.read_program(package)[1].operations:
        if one.type == "const" and one.attributes["val"].WhichOneof("value") == "blobFileValue":
            values = constants.value(one.attributes["val"])
            found += [values.numpy()] if values.ndim == 4 and values.is_floating_point() else []
    raw = found[-1].astype("<f2").tobytes()
    content = (package / mlpackage.WEIGHTS).read_bytes()
    assert content.count(raw) == 1
    large = (np.sign(found[-1]) * 6e4).astype("<f2").tobytes()
    (package / mlpackage.WEIGHTS).write_bytes(content.replace(raw, large))


def _rehash(bundle: Path) -> None:
    """Makes the manifest agree with the files again."""
    from pocketfusion.artefact import sha256_file

    said = json.loads((bundle / "bundle.json").read_text())
    for file in said["files"].values():
        path = bundle / file["path"]
        file |= {"sha256": sha256_file(path), "size": path.stat().st_size}
    (bundle / "bundle.json").write_text(json.dumps(said))
