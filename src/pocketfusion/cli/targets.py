"""The values of the options `--target` and `--for`."""

from __future__ import annotations

from enum import Enum


class TargetOption(str, Enum):
    """Where a bundle is to run (`mobile.targets`)."""

    litert_cpu = "litert-cpu"
    litert_gpu = "litert-gpu"
    coreml = "coreml"
    onnx = "onnx"


class LiteRTTarget(str, Enum):
    """Those of them whose weights this project packs, layer by layer."""

    litert_cpu = "litert-cpu"
    litert_gpu = "litert-gpu"


class DeviceOption(str, Enum):
    """Whom a bundle is made for (`mobile.devices`)."""

    android = "android"
    iphone = "iphone"
    browser = "browser"
    desktop = "desktop"
