"""One ONNX bundle, made once: CLIP's text encoder, an evolved UNet, a decoder, small enough to convert in seconds."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from menagerie import pipeline, save, unet

INSTALL = "pip install '.[compress,dev,onnx]' in pocketfusion's clone"


@pytest.fixture(scope="session", autouse=True)
def _onnx() -> None:
    """All of this folder's tests need the extra."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed: {INSTALL}")


@pytest.fixture(scope="session")
def onnx_folder(once: Callable) -> Path:
    """Its model folder. Read only."""
    return once("onnx-folder", lambda root: save(evolved_pipeline(), root / "model")) / "model"


def evolved_pipeline() -> Any:
    from pocketfusion.models.elastic.architecture import Architecture
    from pocketfusion.models.elastic_unet import ElasticUNet

    stock = unet()
    config = {key: value for key, value in stock.config.items() if not key.startswith("_")}
    evolved = Architecture.stock(config).remove("down_blocks.0.attentions.0").duplicate("up_blocks.1.resnets.0")
    made = ElasticUNet(**config, architecture=evolved.model_dump(mode="json")).eval()
    made.load_state_dict(stock.state_dict(), strict=False)
    return pipeline(unet=made)


@pytest.fixture(scope="session")
def onnx_parts(once: Callable, onnx_folder: Path) -> Path:
    """The bundle in `bundle`, and its networks with exact weights as they were converted. Read only."""
    return once("onnx-bundle", lambda root: _make(onnx_folder, root))


def _make(folder: Path, root: Path) -> None:
    from pocketfusion.mobile import export

    convert = export._convert_network

    def kept(module: Any, samples: Any, file: Path, settings: Any) -> None:
        convert(module, samples, file, settings)
        shutil.copytree(file, root / file.name.partition("-")[0])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "_convert_network", kept)
        export.export(folder, root / "bundle", target="onnx", gate_steps=1)


@pytest.fixture(scope="session")
def onnx_bundle(onnx_parts: Path) -> Path:
    """The bundle, float32. Read only."""
    return onnx_parts / "bundle"


@pytest.fixture
def copied(onnx_parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`export` of that folder copies its networks instead of converting; all else is real."""
    from pocketfusion.mobile import export

    def copy(module: Any, samples: Any, file: Path, settings: Any) -> None:
        shutil.copytree(onnx_parts / file.name.partition("-")[0], file)

    monkeypatch.setattr(export, "_convert_network", copy)
