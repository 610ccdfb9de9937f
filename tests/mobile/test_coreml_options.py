"""What `export --target coreml` refuses before any work, with or without coremltools."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pocketfusion.errors import PocketfusionError
from pocketfusion.mobile import gate, target_options
from pocketfusion.mobile.devices import TARGETS
from pocketfusion.mobile.export_settings import ExportSettings
from pocketfusion.mobile.outlook import prepare
from pocketfusion.mobile.quantization import packing
from pocketfusion.mobile.rewrites import rewrite
from pocketfusion.mobile.target_options import check_guidance


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_options, "find_spec", lambda name: object())


def refused(folder: Path, message: str, **given: Any) -> None:
    with pytest.raises(PocketfusionError, match=message):
        prepare(folder, None, given)


def test_the_extra_is_named(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_options, "find_spec", lambda name: None)
    refused(tiny_folder, r"--target coreml needs coremltools: pip install '\.\[compress,coreml\]'", target="coreml")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ios": 16}, "--ios is 16, too old: .* choose 17 or 18"),
        ({"ios": 19}, "--ios is 19: choose 17 or 18"),
        (
            {"weights": {"unet": "int4-block"}},
            "int4-block weights for unet need iOS 18 and --ios is 17: give --ios 18",
        ),
        ({"weights": {"unet": "int8-dynamic"}}, "'int8-dynamic' weights for 'unet' are not known to coreml: choose f"),
        ({"recipe": Path("recipe.yaml")}, "--recipe is of LiteRT's targets"),
        (
            {"layout": "diffusers"},
            "--layout is 'diffusers' and the target coreml: its files are laid out as bundle or apple",
        ),
        ({"layout": "apple"}, "--layout apple is of models with CLIP's text encoder .* has 'bert'"),
        ({"layout": "apple", "two_calls": True}, "--layout apple has no --two-calls"),
        ({"layout": "apple", "scheduler_step": True}, "--layout apple has no --scheduler-step"),
        ({"layout": "apple", "decoder_tile": 4}, "--layout apple has no --decoder-tile"),
        ({"gpu_fp32": ("unet",)}, "the target coreml: it is of litert-gpu"),
    ],
)
def test_refusals(given: dict[str, Any], message: str, tiny_folder: Path, installed: None) -> None:
    refused(tiny_folder, message, target="coreml", **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ios": 17}, "--ios is 17 and the target litert-cpu: it is of coreml"),
        ({"layout": "apple"}, "--layout is 'apple' and the target litert-cpu: its files are laid out as bundle"),
        ({"weights": {"unet": "palette6"}}, "'palette6' weights for 'unet' are not known to litert-cpu"),
    ],
)
def test_its_options_on_another_target(given: dict[str, Any], message: str, tiny_folder: Path) -> None:
    refused(tiny_folder, message, **given)


def test_apples_layout_of_a_masked_clip(tiny_folder: Path, tmp_path: Path, installed: None) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    config = folder / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "clip_text_model"}))
    settings = ExportSettings(target="coreml", layout="apple")
    with pytest.raises(PocketfusionError, match="CLIP's text encoder and no mask"):
        target_options.check_options(settings, folder)


@pytest.mark.parametrize("guidance", ["embedded", "folded"])
def test_apples_layout_guides_itself(guidance: str) -> None:
    with pytest.raises(PocketfusionError, match=f"this model's guidance is {guidance}: choose --layout bundle"):
        check_guidance("apple", guidance)


def test_out_that_exists_is_kept(tiny_folder: Path, tmp_path: Path, installed: None) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(PocketfusionError, match="exists already"):
        prepare(tiny_folder, tmp_path / "out", {"target": "coreml"})


def test_the_plan_knows_its_forms(tiny_folder: Path, installed: None) -> None:
    found = prepare(tiny_folder, None, {"target": "coreml", "weights": {"unet": "palette6", "decoder": "palette4"}})
    assert [row.weights for row in found.networks] == ["float16", "palette6", "palette4"]
    encoder, unet, decoder = ((row.size - 600 * row.modules) / row.parameters for row in found.networks)
    assert encoder == pytest.approx(2, rel=0.1) and decoder < unet < encoder


def test_every_form_has_its_gates() -> None:
    forms = {form for target in TARGETS.values() for form in target.forms}
    for gates in (gate.MIN_SQNR, gate.MIN_PADDING_SQNR, gate.MAX_GUIDANCE_ERROR):
        assert gates.keys() == forms
    assert TARGETS["litert-cpu"].forms == packing.FORMS


class _Attended(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.attention(*inputs)


@pytest.mark.parametrize("kind", ["self", "cross", "picture"])
def test_split_attention_gives_the_same_numbers(kind: str) -> None:
    from diffusers.models.attention_processor import Attention

    torch.manual_seed(0)
    if kind == "picture":
        attention = Attention(8, heads=1, dim_head=8, residual_connection=True, bias=True, norm_num_groups=2)
        inputs = (torch.randn(2, 8, 3, 4),)
    else:
        attention = Attention(12, 6 if kind == "cross" else None, heads=3, dim_head=4)
        inputs = (torch.randn(2, 5, 12), *([torch.randn(2, 7, 6)] if kind == "cross" else []))
    module = _Attended(attention).eval()
    rewritten, counts = rewrite(module, TARGETS["coreml"], ["split-attention"])
    assert counts == {"split-attention": 1}
    with torch.no_grad():
        torch.testing.assert_close(rewritten(*inputs), module(*inputs), rtol=1e-4, atol=1e-5)
