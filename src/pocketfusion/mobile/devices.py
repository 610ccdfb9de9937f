"""Where a bundle is to run: targets, and what `export --for DEVICE` stands for.

A target says by which runtime, in which forms, after which rewrites, and within a device's limits. A device stands
for target, weights, precision, decoder tiles and form. Tables, not code: another runtime for a device (Core ML for
iPhones, say) is another row. docs/export.md says why each value is what it is, and what of it was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from pocketfusion.errors import PocketfusionError
from pocketfusion.runtime.tiles import starts

TargetName = Literal["litert-cpu", "litert-gpu", "coreml", "onnx"]
RuntimeName = Literal["litert", "coreml", "onnx"]


class Limits(BaseModel):
    """What one operation may ask of a device; None where the device sets no limit. Rewrites split what exceeds it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: Activations are computed in half precision: nothing may exceed 65,504 on the way.
    float16: bool = False
    #: Longest side of a 2-D image, as which OpenCL delegates keep tensors: width W * B, height H * ceil(C / 4).
    image2d: int | None = None
    #: Largest score matrix (heads, queries, keys) that one attention may store at a time, in bytes.
    attention_score_bytes: int | None = None
    #: Largest weight of one matrix product or convolution, in bytes.
    weight_bytes: int | None = None
    #: Products that one sum of a convolution may add up; a device that sums in half precision loses more with each.
    sum_terms: int | None = None
    #: A core's second-level cache, in bytes: half of it should hold what a convolution's inner loop reads over again.
    cache_bytes: int | None = None

    @property
    def bytes_per_value(self) -> int:
        """Of activations, and of weights once they are on the device."""
        return 2 if self.float16 else 4


class Target(BaseModel):
    """A runtime on a device: the forms of its weights, the first where none is asked for, the rewrites applied by
    default, in `rewrites.PASSES`' names, the device's limits, and how files can be laid out, the first by default.
    `backends` has what its runtime's files are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: TargetName
    runtime: RuntimeName = "litert"
    forms: tuple[str, ...] = ("float32", "float16", "int8", "int8-dynamic", "int4-dynamic")
    rewrites: tuple[str, ...]
    limits: Limits
    layouts: tuple[str, ...] = ("bundle",)


#: WebGPU's default maxStorageBufferBindingSize, which every implementation offers (W3C WebGPU, 3.6.2).
_BUFFER = 128 << 20
TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        # 512 KiB: what phones' big cores have at least, and half of what servers' have. The scores' limit holds where
        # `attention` is asked for.
        Target(
            name="litert-cpu",
            rewrites=("group-norm", "silu-nhwc"),
            limits=Limits(cache_bytes=512 << 10, attention_score_bytes=_BUFFER // 2),
        ),
        Target(
            name="litert-gpu",
            # linear-to-conv: 8-bit FULLY_CONNECTED that turn dimensions into rows fail to compile, CONV_2D do not
            rewrites=(
                *("masks", "attention", "subpixel-upsample", "geglu", "linear-to-conv", "serialise-conv"),
                *("group-norm", "layer-norm", "silu-nhwc"),
            ),
            # 16,384: CL_DEVICE_IMAGE2D_MAX_HEIGHT as Adreno's drivers report it. 5,000: with
            # outliers, sums of 5,120 products are off by 3.4 % in fp16, of 11,520 by 3.7 % (docs/mobile.md).
            limits=Limits(
                float16=True, image2d=16384, attention_score_bytes=_BUFFER, weight_bytes=_BUFFER, sum_terms=5000
            ),
        ),
        # coremltools lowers all of it, and group norms compute in fp32; CLIP's own mask is below fp16's range.
        Target(
            name="coreml",
            runtime="coreml",
            forms=("float16", "float32", "int8", "palette6", "palette4", "int4-block"),
            rewrites=("masks",),
            limits=Limits(float16=True),
            layouts=("bundle", "apple"),
        ),
        # the exporter has an operation for everything, and all runtimes compute these files in float32
        Target(
            name="onnx",
            runtime="onnx",
            forms=("float32", "float16", "int8"),
            rewrites=(),
            limits=Limits(),
            layouts=("bundle", "diffusers"),
        ),
    )
}


DeviceName = Literal["android", "iphone", "browser", "desktop"]
#: A decoder holds some four maps of its widest level at once: at 512 pixels tiles save 0.7 GB (docs/full-size.md).
_MAP = 64 << 20


class Device(BaseModel):
    """A kind of device. `weights`: each network's form. `gpu_fp32`: networks that compute in fp32 on its GPU.

    `widest_map`: bytes that one feature map of the decoder may take, in float32; a decoder whose maps are larger is
    exported for tiles of half the picture's side. `two_calls_from`: latent pixels from which guidance is two calls of
    batch 1. `largest_file`: bytes of a network's file that it loads. None is no limit. `page`: in docs/, of what comes
    `then`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: DeviceName
    runs_on: str
    target: TargetName
    weights: Mapping[str, str]
    gpu_fp32: tuple[str, ...] = ()
    widest_map: int | None = None
    two_calls_from: int | None = None
    largest_file: int | None = None
    page: str
    then: str


def _same(form: str, **other: str) -> dict[str, str]:
    return {"text_encoder": form, "unet": form, "decoder": form, **other}


#: What the devices with a GPU share. A flatbuffer ends at 2 GB; the delegate does not read what lies behind, and a
#: browser's heap of 4 GB holds the file and its packed weights.
_GPU: dict[str, Any] = {
    "target": "litert-gpu",
    "gpu_fp32": ("text_encoder",),
    "widest_map": _MAP,
    "two_calls_from": 32 * 32,
    "largest_file": 2_000_000_000,
}

DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        # int8 is int8-dynamic there: unpacked at load, computed in fp16. The text encoder runs once a prompt, so fp32
        # costs little; MiniLM is wrong in fp16 (docs/check.md).
        Device(
            name="android",
            runs_on="LiteRT's GPU delegate",
            weights=_same("int8"),
            **_GPU,
            page="running-on-android.md",
            then="the bundle in an Android app",
        ),
        # float16: TensorFlow Lite's Metal delegate and LiteRT's GPU delegate both take it (docs/running-on-ios.md).
        Device(
            name="iphone",
            runs_on="LiteRT's GPU delegate or TensorFlow Lite's for Metal",
            weights=_same("float16"),
            **_GPU,
            page="running-on-ios.md",
            then="the bundle in an iOS app",
        ),
        # One bundle for WebGPU and WASM: both take dynamic int8; WebGPU refuses int8 behind a DEQUANTIZE.
        Device(
            name="browser",
            runs_on="LiteRT.js, WebGPU or WASM",
            weights=_same("int8"),
            **_GPU,
            page="web.md",
            then="the bundle in a page",
        ),
        # Integer kernels: a quarter of the memory, faster; they round activations, which the text encoder feels most.
        Device(
            name="desktop",
            runs_on="LiteRT on the CPU",
            target="litert-cpu",
            weights=_same("int8-dynamic", text_encoder="float16"),
            page="generate.md",
            then="from Python, modes and samplers",
        ),
    )
}


def options_for(name: str | None, pipeline: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """`ExportSettings`' fields: what `given` says (None: not said; a decoder's tile of 0: none), else the device's.

    `pipeline`: the model's, of the size wanted; its networks may be on `meta`. A recipe in `given` takes the place of
    the device's weights. Raises PocketfusionError for an unknown device, and for another target than its own.
    """
    said = {key: value for key, value in given.items() if value is not None}
    found = said if name is None else _of_device(name, pipeline, said)
    return {key: value for key, value in found.items() if key != "decoder_tile" or value != 0}


def _of_device(name: str, pipeline: Any, said: Mapping[str, Any]) -> dict[str, Any]:
    if name not in DEVICES:
        raise PocketfusionError(f"--for is {name!r}: choose {', '.join(DEVICES)}")
    device = DEVICES[name]
    if said.get("target", device.target) != device.target:
        raise PocketfusionError(
            f"--for {name} is the target {device.target} and --target is {said['target']}: leave one of them out"
        )
    side = pipeline.unet.config.sample_size
    height, width = (side, side) if isinstance(side, int) else side
    own: dict[str, Any] = {"target": device.target, "made_for": name, "gpu_fp32": device.gpu_fp32}
    if device.two_calls_from is not None:
        own["two_calls"] = height * width >= device.two_calls_from and not said.get("scheduler_step")
    if device.widest_map is not None and widest_map(pipeline.vae, height, width) > device.widest_map:
        own["decoder_tile"] = tile_within(pipeline.vae, min(height, width), device.widest_map)
    weights = said.get("weights", {})
    return {**own, **said, "weights": weights if "recipe" in said else {**device.weights, **weights}}


def tile_within(vae: Any, side: int, limit: int) -> int:
    """A decoder's tile for latents of `side`: the smallest of which two a side do, 1.56 times the picture's work; half
    of it, where three a side do 2.25 times, if the larger one's feature maps take more than `limit` bytes."""
    two = next(tile for tile in range(side // 2 + 1, side + 1) if tile % 4 == 0 and len(starts(side, tile)) <= 2)
    return two if widest_map(vae, two, two) <= limit else side // 2


def widest_map(vae: Any, height: int, width: int) -> int:
    """Bytes in float32 of the largest feature map of an autoencoder's decoder, for latents of `height` × `width`.

    Every level but the last ends in a doubling, whose channels the next one takes at its own, larger size.
    """
    decoder = getattr(vae, "decoder", None)
    most = channels = 0
    for level, block in enumerate(getattr(decoder, "up_blocks", ())):
        given = block.resnets[0].in_channels
        channels = max(given, block.resnets[0].out_channels)
        most = max(most, 4 * channels * height * width << 2 * level)
    return most


def check_files(made_for: str | None, sizes: Mapping[str, float]) -> None:
    """Raises PocketfusionError if a network's file, of `sizes` in bytes, is larger than the device loads."""
    largest = DEVICES[made_for].largest_file if made_for else None
    for network, size in sizes.items():
        if largest is not None and size > largest:
            raise PocketfusionError(
                f"{network}.tflite would have {size / 1e9:.1f} GB, and --for {made_for} loads files up to "
                f"{largest / 1e9:g} GB: choose smaller weights for it, such as --{network.replace('_', '-')}-weights "
                "int8"
            )


def next_steps(
    made_for: str | None, target: TargetName, bundle: Path, layout: str = "bundle"
) -> list[tuple[str, str]]:
    """What to do with a bundle now: commands or pages, and what each is for."""
    if target == "coreml":
        return [
            (f"pocketfusion check {bundle}", "its operations, run here in fp32 and rounded to fp16"),
            ("docs/coreml.md", "what Xcode or a Mac does with it, and the loop in Swift"),
        ]
    if target == "onnx":
        runs = ("docs/runtimes.md", "what reads these files, and how it calls them")
        draw = (f'pocketfusion generate "a red apple" --bundle {bundle}', "a picture, by ONNX Runtime on the CPU")
        return [runs] if layout == "diffusers" else [draw, runs]
    found = [(f'pocketfusion generate "a red apple" --bundle {bundle}', "a picture, drawn here on the CPU")]
    if target == "litert-gpu":
        found.insert(0, (f"pocketfusion check {bundle}", "does all of it run on a GPU delegate, with right numbers?"))
    if made_for:
        found.append((f"docs/{DEVICES[made_for].page}", DEVICES[made_for].then))
    return found
