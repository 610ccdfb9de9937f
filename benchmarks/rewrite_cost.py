"""What each rewrite costs on the CPU: the stock module against the rewritten one, at widths of SD-1.5.

Usage: python benchmarks/rewrite_cost.py [--only REGEX] [--runs 15] [--json FILE]

Protocol: LiteRT's CPU path (XNNPACK), one thread, fp32, batch 1; stock and rewritten forms of a case run in turns
after one warm-up: median milliseconds with minimum and maximum, operations in the file, largest difference from
PyTorch over the largest value.
"""

from __future__ import annotations

import argparse
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ai_edge_litert.interpreter import Interpreter
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from pocketfusion.artefact import write_json
from pocketfusion.latency.blocks import with_weights
from pocketfusion.mobile.convert import convert
from pocketfusion.mobile.devices import TARGETS, Target
from pocketfusion.mobile.flatbuffer import operations
from pocketfusion.mobile.rewrites.convolution import SerialConv
from pocketfusion.mobile.rewrites.linear import SerialLinear
from pocketfusion.mobile.wrappers import nchw, nhwc
from pocketfusion.runtime.output import cpu_name

CPU, GPU = TARGETS["litert-cpu"], TARGETS["litert-gpu"]


class OnTokens(nn.Module):
    """`x` [B, N, C] -> `y`."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.module(x)}


class OnPictures(OnTokens):
    """`x` [B, H, W, C] -> `y`, the module's own order being [B, C, H, W]."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        arguments = (None,) if isinstance(self.module, ResnetBlock2D) else ()
        return {"y": nhwc(self.module(nchw(x), *arguments))}


class OnIds(OnTokens):
    """`x` int32 [B, T] -> `y` [B, T, D]."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.module(x)[0]}


Form = tuple[str, nn.Module, Target]
_GROUP_NORM = nn.GroupNorm(32, 320)
_RESNET = ResnetBlock2D(in_channels=320, out_channels=320, temb_channels=None, groups=32)
_ATTENTION = Attention(320, heads=8, dim_head=40)
_CONV = nn.Conv2d(1920, 640, 3, padding=1)
_CLIP = CLIPTextModel(CLIPTextConfig(vocab_size=1000, num_hidden_layers=1, hidden_size=768, intermediate_size=3072))


def rewritten(target: Target, *names: str, **limits: Any) -> Target:
    return target.model_copy(update={"rewrites": names, "limits": target.limits.model_copy(update=limits)})


def case(
    wrapper: Callable[[nn.Module], nn.Module], module: nn.Module, shape: tuple[int, ...], *forms: Any
) -> tuple[torch.Tensor, list[Form]]:
    """Inputs and forms: stock, then each of `forms`, (label, target) or (label, module made of the stock one)."""
    wrapped = with_weights(wrapper(module.eval()))
    listed: list[Form] = [("stock", wrapped, rewritten(CPU))]
    for label, form in forms:
        made = isinstance(form, Target)
        listed.append((label, wrapped if made else wrapper(form(wrapped.module)), form if made else rewritten(CPU)))
    generator = torch.Generator().manual_seed(0)
    if wrapper is OnIds:
        return torch.randint(0, 1000, shape, generator=generator).int(), listed
    return torch.randn(shape, generator=generator), listed


def cases() -> dict[str, Callable[[], tuple[torch.Tensor, list[Form]]]]:
    tokens, picture = (1, 4096, 320), (1, 64, 64, 320)
    unsliced = rewritten(GPU, "attention", attention_score_bytes=None, image2d=None)
    eighth = rewritten(GPU, "attention", attention_score_bytes=32 << 20)
    return {
        "group-norm 320@64x64": lambda: case(
            OnPictures,
            _GROUP_NORM,
            picture,
            ("4-D (litert-cpu)", rewritten(CPU, "group-norm")),
            ("4-D, in fp16's range (litert-gpu)", rewritten(GPU, "group-norm")),
        ),
        "layer-norm 4096x320": lambda: case(
            OnTokens, nn.LayerNorm(320), tokens, ("in fp16's range", rewritten(GPU, "layer-norm"))
        ),
        "silu-nhwc, in a ResNet 320@64x64": lambda: case(
            OnPictures,
            _RESNET,
            picture,
            ("group-norm", rewritten(CPU, "group-norm")),
            ("group-norm, silu-nhwc", rewritten(CPU, "group-norm", "silu-nhwc")),
        ),
        "attention 4096x320, 8 heads": lambda: case(
            OnTokens,
            _ATTENTION,
            tokens,
            ("4-D, unsliced", unsliced),
            ("2 slices of the queries (litert-gpu)", rewritten(GPU, "attention")),
            ("8 slices of the queries", eighth),
        ),
        "geglu 4096x320": lambda: case(OnTokens, GEGLU(320, 1280), tokens, ("two", rewritten(GPU, "geglu"))),
        "gelu, in a GEGLU 4096x320": lambda: case(
            OnTokens, GEGLU(320, 1280), tokens, ("tanh of a polynomial", rewritten(GPU, "gelu"))
        ),
        "linear-to-conv 4096x320->1280": lambda: case(
            OnTokens, nn.Linear(320, 1280), tokens, ("1x1 convolution", rewritten(GPU, "linear-to-conv"))
        ),
        "serialise-matmul 256x1280->10240": lambda: case(
            OnTokens, nn.Linear(1280, 10240), (1, 256, 1280), ("2 along outputs", lambda m: SerialLinear(m, 2))
        ),
        "serialise-conv 1920->640@32x32": lambda: case(
            OnPictures,
            _CONV,
            (1, 32, 32, 1920),
            ("2 along inputs (litert-gpu)", rewritten(GPU, "serialise-conv")),
            ("2 along outputs", lambda m: SerialConv(m, 2, "outputs")),
            ("8 along inputs", lambda m: SerialConv(m, 8)),
            ("8 along outputs", lambda m: SerialConv(m, 8, "outputs")),
        ),
        **{
            f"serialise-conv {size}": lambda conv=conv, side=side: case(
                OnPictures,
                conv,
                (1, side, side, conv.in_channels),
                *(
                    (f"{count} along {along}", lambda m, count=count, along=along: SerialConv(m, count, along))
                    for count, along in ((4, "outputs"), (16, "outputs"), (4, "inputs"))
                ),
            )
            for size, conv, side in (
                ("1280->1280@16x16", nn.Conv2d(1280, 1280, 3, padding=1), 16),
                ("640->640@32x32", nn.Conv2d(640, 640, 3, padding=1), 32),
                ("320->320@64x64", nn.Conv2d(320, 320, 3, padding=1), 64),
            )
        },
        "masks, CLIP's embeddings and a layer": lambda: case(
            OnIds,
            _CLIP,
            (1, 77),
            ("masks", rewritten(GPU, "masks")),
            ("masks, attention", rewritten(GPU, "masks", "attention")),
        ),
        "upsample 640@32x32": lambda: case(
            OnPictures, Upsample2D(640, use_conv=True), (1, 32, 32, 640), ("concatenation", rewritten(GPU, "upsample"))
        ),
        "padding 320@64x64": lambda: case(
            OnPictures, Downsample2D(320, use_conv=True), picture, ("explicit", rewritten(GPU, "padding"))
        ),
    }


def load(file: Path, x: np.ndarray) -> Interpreter:
    interpreter = Interpreter(str(file), num_threads=1)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x)
    return interpreter


@torch.no_grad()
def measure(x: torch.Tensor, forms: list[Form], runs: int) -> list[dict[str, Any]]:
    """A row for each form; the forms run in turns."""
    expected = forms[0][1](x)["y"].numpy()
    rows, loaded = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number, (label, module, target) in enumerate(forms):
            file = Path(folder) / f"{number}.tflite"
            convert(module, {"x": x}, file, target)
            rows.append({"form": label, "operations": sum(operations(file)[0].values()), "ms": []})
            loaded.append(load(file, x.numpy()))
        for turn in range(1 + runs):
            for row, interpreter in zip(rows, loaded, strict=True):
                start = time.perf_counter()
                interpreter.invoke()
                if turn:
                    row["ms"].append(1000 * (time.perf_counter() - start))
    for row, interpreter in zip(rows, loaded, strict=True):
        y = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
        row["error"] = float(np.abs(y - expected).max() / np.abs(expected).max())
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=re.compile, default=re.compile(""), metavar="REGEX")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = {}
    print(f"1 thread, {cpu_name()}, median (min to max) of {args.runs}, in turns")
    for name, make in cases().items():
        if not args.only.search(name):
            continue
        print(name)
        results[name] = measure(*make(), args.runs)
        for row in results[name]:
            ms = row["ms"]
            span = f"({min(ms):.1f} to {max(ms):.1f})"
            print(
                f"  {row['form']:<40}{row['operations']:>5} ops{statistics.median(ms):>9.1f} ms {span:<20}"
                f"{row['error']:>9.1e}",
                flush=True,
            )
    if args.json:
        write_json(args.json, {"threads": 1, "cpu": cpu_name(), "runs": args.runs, "results": results})


if __name__ == "__main__":
    main()
