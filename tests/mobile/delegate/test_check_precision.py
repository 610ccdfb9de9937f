"""Networks that a bundle asks to be computed in fp32 are judged in fp32."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pocketfusion.cli.check_commands import _details
from pocketfusion.mobile.delegate.check import GraphCheck, check
from pocketfusion.mobile.delegate.oracle import Parity
from pocketfusion.runtime.engines import gpu_options
from pocketfusion.runtime.manifest import Bundle, embedded_bundle


def graph(precision: str, *, fp16: float, fp32: float = 1e-6) -> GraphCheck:
    parities = tuple(Parity(p, "s", 30.0, error, True) for p, error in (("fp32", fp32), ("fp16", fp16)))
    return GraphCheck("text_encoder", "s", 1, "gpu", (), "", "", parities, None, "recorded", (), precision)


def test_wrong_numbers_count_in_the_precision_that_is_used() -> None:
    assert graph("fp16", fp16=0.01).passed and graph("fp32", fp16=0.1).passed
    assert not graph("fp16", fp16=0.1).passed
    assert not graph("fp32", fp16=0.1, fp32=0.1).passed


def test_the_report_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    console = Console(width=200, soft_wrap=True)
    _details(graph("fp16", fp16=0.1), console)
    assert "or `export --gpu-fp32 text_encoder`" in capsys.readouterr().out
    _details(graph("fp32", fp16=0.1), console)
    printed = capsys.readouterr().out
    assert "the bundle asks for this network in fp32" in printed and "cure" not in printed


def test_a_bundles_manifest_is_read(tmp_path: Path) -> None:
    bundle = shutil.copytree(embedded_bundle(), tmp_path / "b")
    manifest = json.loads((bundle / "bundle.json").read_text())
    manifest["networks"]["text_encoder"]["gpu_precision"] = "fp32"
    (bundle / "bundle.json").write_text(json.dumps(manifest))
    assert [one.precision for one in check(bundle, static=True).graphs] == ["fp32", "fp16", "fp16"]
    networks = Bundle.open(bundle).manifest.networks
    assert gpu_options(networks.text_encoder).gpu_options.enforce_f32
    assert not gpu_options(networks.unet).gpu_options.enforce_f32
