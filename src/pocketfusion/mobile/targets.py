"""Where a bundle is to run: by which runtime, in which forms, after which rewrites, and within a device's limits."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

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
