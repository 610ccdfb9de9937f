"""`kill -9` in the middle of `export`: nothing half-written, and the same command goes on."""

from __future__ import annotations

import json
import shutil

from command import leftovers
from pocketfusion.mobile import export as module
from pocketfusion.runtime.manifest import Bundle


def test_export_in_the_place_of_a_bundle(kill, end, cli, tiny_folder, tiny_bundle, tmp_path):
    from pocketfusion.mobile.export_settings import ExportSettings

    out, work = tmp_path / "out", tmp_path / ".out.work"
    shutil.copytree(tiny_bundle, out)
    old = (out / "bundle.json").read_bytes()
    work.mkdir()  # as if a killed run had converted everything: minutes saved
    for name in ("text_encoder", "unet", "decoder"):
        key = ExportSettings().conversion_key(tiny_folder, name)
        shutil.copyfile(tiny_bundle / f"{name}.tflite", work / f"{name}-{key}.tflite")
    arguments = ("export", tiny_folder, out, "--overwrite", "--name", "new")
    kill("pocketfusion.mobile.backends:quantize", 2, *arguments)
    kill("pocketfusion.mobile.export:write_json", 1, *arguments)
    assert (out / "bundle.json").read_bytes() == old and len(leftovers(tmp_path)) == 1
    drawn = cli("generate", "cat", "--bundle", out, "--steps", 1, "-o", tmp_path / "a.png")
    assert drawn.returncode == 0, drawn.stderr
    end(*arguments)
    assert json.loads((out / "bundle.json").read_text())["name"] == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "out"]


def test_what_was_converted_is_kept(kill, tiny_folder, fast_conversion, monkeypatch, tmp_path):
    out, converted = tmp_path / "out", []
    kill("pocketfusion.mobile.backends:quantize", 1, "export", tiny_folder, out)
    assert not out.exists() and (tmp_path / ".out.work").is_dir() and len(leftovers(tmp_path)) == 1
    convert = module._convert_network

    def recording(network, samples, file, settings):
        converted.append(file.name.partition("-")[0])
        convert(network, samples, file, settings)

    monkeypatch.setattr(module, "_convert_network", recording)
    module.export(tiny_folder, out)
    assert converted == ["unet", "decoder"]
    Bundle.open(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
