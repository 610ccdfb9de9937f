"""What export refuses: one sentence that names the trouble, and nothing under the final name."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from pocketfusion.cli import shared
from pocketfusion.errors import PocketfusionError
from pocketfusion.mobile import export as module
from pocketfusion.mobile import gate, measure
from pocketfusion.mobile.export import export
from pocketfusion.runtime.manifest import Bundle


def refused(folder: Path, out: Path, match: str, **settings: object) -> None:
    with pytest.raises(PocketfusionError, match=match):
        export(folder, out, **settings)  # type: ignore[arg-type]
    assert not out.exists()
    assert not list(out.parent.glob(f".{out.name}.*"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_missing_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", tmp_path / "out", "no model folder at .*nowhere")


def test_not_a_model_folder(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    refused(tmp_path / "x", tmp_path / "out", "no model_index.json")


def test_missing_component_is_named(tiny_folder_copy: Path, tmp_path: Path) -> None:
    shutil.rmtree(tiny_folder_copy / "vae")
    refused(tiny_folder_copy, tmp_path / "out", "lacks vae/")


def test_nan_weight_is_named(tiny_folder_copy: Path, tmp_path: Path) -> None:
    file = tiny_folder_copy / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_in.weight"][0, 0, 0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    refused(tiny_folder_copy, tmp_path / "out", "conv_in.weight holds NaN")


def test_pickled_weights_are_refused(tiny_folder_copy: Path, tmp_path: Path) -> None:
    safe = tiny_folder_copy / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(safe), safe.with_suffix(".bin"))
    safe.unlink()
    refused(tiny_folder_copy, tmp_path / "out", "pickled and is never read")


def test_unknown_schedule_is_named(tiny_folder_copy: Path, tmp_path: Path) -> None:
    file = tiny_folder_copy / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "sample"}))
    refused(tiny_folder_copy, tmp_path / "out", "prediction_type 'sample'")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "epsilon", "beta_end": 1.5}))
    refused(tiny_folder_copy, tmp_path / "out", "manifest would not be valid .beta_end")


def test_mixed_models_are_refused(tiny_folder_copy: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    AutoencoderKL(latent_channels=8, norm_num_groups=4, block_out_channels=(8,)).save_pretrained(
        tiny_folder_copy / "vae"
    )
    refused(tiny_folder_copy, tmp_path / "out", "8 latent channels but the UNet takes 4")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"weights": {"unet": "int7"}}, "'int7' weights for 'unet'"),
        ({"weights": {"vae": "int8"}}, "'int8' weights for 'vae'"),
        ({"num_inference_steps": 0}, "--steps is 0"),
        ({"guidance_scale": float("nan")}, "--guidance is nan"),
        ({"guidance_scale": 1e9}, "manifest would not be valid .guidance_scale"),
    ],
)
def test_settings(tiny_folder: Path, tmp_path: Path, settings: dict, match: str) -> None:
    refused(tiny_folder, tmp_path / "out", match, **settings)


def test_output_parent_missing(tiny_folder: Path, tmp_path: Path) -> None:
    refused(tiny_folder, tmp_path / "no" / "out", "no does not exist")


def test_output_parent_read_only(tiny_folder: Path) -> None:
    refused(tiny_folder, Path("/proc/out"), "cannot write into /proc")


def test_existing_output_is_kept(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    for overwrite, match in ((False, "exists already"), (True, "is not a bundle")):
        with pytest.raises(PocketfusionError, match=match):
            export(tiny_folder, tmp_path / "out", overwrite=overwrite)
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"


def test_overwrite_replaces_a_bundle(
    tiny_folder: Path, tiny_bundle: Path, tmp_path: Path, fast_conversion: None
) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "out")
    export(tiny_folder, tmp_path / "out", name="second", overwrite=True)
    assert json.loads((tmp_path / "out" / "bundle.json").read_text())["name"] == "second"


def test_gate_failure_writes_nothing(
    tiny_folder: Path, tmp_path: Path, fast_conversion: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An altered network (here: the decoder's file holds another seed's numbers) does not pass."""
    original = gate.run

    def off(path: Path, inputs: list, output: str, signature: str) -> object:
        return original(path, inputs, output, signature) * (1.01 if output == "image" else 1)

    monkeypatch.setattr(gate, "run", off)
    refused(tiny_folder, tmp_path / "out", r"exported decoder with float32 weights differs .* SQNR 40.0 dB")


def test_lost_guidance_writes_nothing(
    tiny_folder: Path, tmp_path: Path, fast_conversion: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text encoder that says the same for every prompt passes no guidance gate, whatever the UNet's SQNR is."""
    original = measure.run_file

    def deaf(file: Path, network: str, reference: object, form: object, unet: object, embeds: object) -> object:
        embeds = embeds[:1].repeat(len(embeds), 0)  # type: ignore[index]
        return original(file, network, reference, form, unet, embeds)  # type: ignore[arg-type]

    monkeypatch.setattr(measure, "run_file", deaf)
    refused(tiny_folder, tmp_path / "out", "follow the prompt 0.000 times as much")


def test_full_disk(tiny_folder: Path, tmp_path: Path, fast_conversion: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "copy_licences", full)
    with pytest.raises(OSError, match="No space left"):  # which the command tells in one sentence
        export(tiny_folder, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_two_exports_to_one_name(tiny_folder: Path, tmp_path: Path, fast_conversion: None) -> None:
    """The second is refused while the first is at work, which goes on unharmed."""
    out, meanwhile = tmp_path / "out", []

    def second(stage: str, index: int, count: int) -> None:
        if stage == "unet: pack":
            with pytest.raises(PocketfusionError, match=r"\.out\.work is in use by another run \(process \d+\): wait"):
                export(tiny_folder, out)
            meanwhile.append(stage)

    export(tiny_folder, out, progress=second)
    assert meanwhile and names(tmp_path) == ["out"]
    Bundle.open(out)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"size": (60, 64)}, r"--size has 60 pixels: this model's pictures are multiples of \d+"),
        ({"decoder_tile": 9}, "the decoder's tile is 9 latents and the picture has 8x8"),
        ({"decoder_tile": 0}, "the decoder's tile is 0 latents"),
        ({"rewrites": ("flatten",)}, "--rewrites has 'flatten': choose among .*linear-to-conv"),
        ({"gate_steps": 0}, "--gate-steps is 0"),
        (
            {"gpu_fp32": ("unit",), "target": "litert-gpu"},
            "--gpu-fp32 has 'unit': choose among text_encoder, unet, dec",
        ),
        ({"gpu_fp32": ("unet",)}, "--gpu-fp32 is 'unet' and the target litert-cpu: it is of litert-gpu"),
        ({"lora": ((Path("nowhere.safetensors"), 1.0),)}, "the LoRA nowhere.safetensors is not there"),
        ({"recipe": Path("nowhere.yaml")}, "nowhere.yaml cannot be read"),
        ({"recipe": Path("nowhere.yaml"), "weights": {"unet": "int8"}}, "--recipe and --weights both"),
    ],
)
def test_settings_of_device_bundles(tiny_folder: Path, tmp_path: Path, settings: dict, match: str) -> None:
    refused(tiny_folder, tmp_path / "out", match, **settings)


def test_a_recipe_for_another_target(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("format: pocketfusion-weights\ntarget: litert-gpu\n")
    refused(tiny_folder, tmp_path / "out", "was made for litert-gpu", recipe=tmp_path / "r.yaml")


def test_command(tiny_folder: Path, tmp_path: Path, fast_conversion: None) -> None:
    from pocketfusion.cli import app
    from pocketfusion.cli import export_commands as _  # noqa: F401  (registers the command)

    arguments = ["export", str(tiny_folder), str(tmp_path / "out"), "--json", str(tmp_path / "r.json"), "--name", "n"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "peak memory" in result.output and "unet" in result.output
    report = json.loads((tmp_path / "r.json").read_text())
    assert [row["name"] for row in report["networks"]] == ["text_encoder", "unet", "decoder"]
    assert report["peak_rss"] > 1e8


@pytest.mark.parametrize(
    ("target", "missing", "extra"),
    [
        ("litert-cpu", "torch", "compress"),
        ("onnx", "onnxscript", "compress,onnx"),
        ("coreml", "coremltools", "compress,coreml"),
        ("coreml", "sklearn", "compress,coreml"),
    ],
)
def test_command_says_what_to_install(
    target: str, missing: str, extra: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run
) -> None:
    found = shared.find_spec
    monkeypatch.setattr(shared, "find_spec", lambda name: None if name == missing else found(name) or object())
    code, _, error = run("export", tiny_folder, tmp_path / "out", "--target", target)
    error = " ".join(error.split())
    assert code == 2 and f"needs {missing}: pip install '.[{extra}]'" in error and "Traceback" not in error
    assert not list(tmp_path.iterdir())


WRONG_USES = (
    (("--target", "onnx", "--weights", "palette6"), "'palette6' weights for 'text_encoder' are not known to onnx"),
    (("--target", "onnx", "--decoder-weights", "int4-block"), "'int4-block' weights for 'decoder' are not known"),
    (("--weights", "palette6"), "'palette6' weights for 'text_encoder' are not known to litert-cpu"),
    (("--for", "android", "--unet-weights", "int7"), "'int7' weights for 'unet' are not known to litert-gpu"),
    (("--target", "coreml", "--layout", "diffusers"), "--layout is 'diffusers' and the target coreml"),
    (("--target", "coreml", "--ios", "15"), "--ios is 15, too old"),
    (("--target", "coreml", "--weights", "int4-block"), "int4-block weights for text_encoder need iOS 18"),
    (("--target", "onnx", "--ios", "17"), "--ios is 17 and the target onnx: it is of coreml"),
    (("--name", "n"), "exists already"),
)
#: Each command in turn in one process: what it ended with and said, and then whether torch was loaded.
TELL = """
import contextlib, io, json, sys
from pocketfusion.cli import main
said = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["pocketfusion", "export", *arguments]
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        try:
            main()
        except SystemExit as end:
            said.append((end.code, " ".join(stderr.getvalue().split())))
print(json.dumps([said, "torch" in sys.modules]))
"""


def test_wrong_uses_are_told_before_the_libraries_load(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    out = [str(tmp_path / ("there" if options == ("--name", "n") else "out")) for options, _ in WRONG_USES]
    commands = [[str(tiny_folder), one, *options] for one, (options, _) in zip(out, WRONG_USES, strict=True)]
    commands.append([str(tmp_path / "nowhere"), str(tmp_path / "out")])
    done = subprocess.run(
        [sys.executable, "-c", TELL, json.dumps(commands)], capture_output=True, text=True, check=True, timeout=120
    )
    told, torch_loaded = json.loads(done.stdout)
    for (code, text), message in zip(told, [*(m for _, m in WRONG_USES), "no model folder at"], strict=True):
        assert code == 2 and message in text and text.startswith("error: "), text
    assert not torch_loaded
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
