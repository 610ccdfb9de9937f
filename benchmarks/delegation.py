"""Is all of Stable Diffusion on the GPU delegate, and right there? Every distinct block at its real width, and whole
networks in topology at reduced width, before and after the rewrites of `litert-gpu`.

Usage: python benchmarks/delegation.py [blocks] [networks] [--only REGEX] [--precisions fp32,fp16]
           [--forms unit,before,after] [--scale S] [--json FILE]

Protocol: random weights that keep the scale of what passes, batch 1; a block's input is noise of std 2 with 1 % of the
channels at std 40, the networks' are unit latents. Converted by the exporter, run on the GPU delegate (GPU only) of a
software Vulkan driver. Errors are the largest difference from stock PyTorch in fp32, over the largest value, and SQNR.
"before" has no rewrites; it is compiled, and run too with `--scale`, which multiplies the residual stream to show what
large activations do in fp16. Refused operations and partitions are the static rules'. "unit" is "before" with all
norms' weights 1 and biases 0, as fresh ones have: there the converter folds what trained weights keep.
FP32 needs Debian's chromium, FP16 an unpacked Mesa 25 named by POCKETFUSION_LAVAPIPE (docs/mobile.md).
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from pocketfusion.artefact import write_json
from pocketfusion.latency.blocks import all_blocks, with_weights
from pocketfusion.mobile.delegate.oracle import Oracle
from pocketfusion.mobile.delegate.proof import Proof, prove
from pocketfusion.mobile.delegate.stack import choose, find_stacks
from pocketfusion.mobile.devices import TARGETS
from pocketfusion.mobile.pipeline_specs import Samples
from pocketfusion.mobile.rewrites.passes import shared_copy
from pocketfusion.mobile.wrappers import Decoder, TextEncoder, UNet
from pocketfusion.models.elastic.presets import snapfusion
from pocketfusion.models.elastic_unet import ElasticUNet
from pocketfusion.models.sd_configs import CONFIGS

BEFORE = TARGETS["litert-gpu"].model_copy(update={"rewrites": ()})


def networks() -> Iterator[tuple[str, nn.Module, Samples]]:
    """Both configurations' networks with a tenth of the channels and 16x16 latents; all their layers and heads."""
    torch.manual_seed(0)
    latents, ids = torch.randn(1, 16, 16, 4), torch.randint(0, 1000, (1, 77)).int()
    for name, parts in CONFIGS.items():
        config = parts["unet"] | {
            "block_out_channels": (32, 64, 128, 128),
            "norm_num_groups": 8,
            "cross_attention_dim": 64,
            "sample_size": 16,
            "attention_head_dim": 8 if name == "sd-1.5" else (1, 2, 4, 4),
        }
        inputs = {
            "sample": latents,
            "timestep_embedding": torch.randn(1, 32),
            "encoder_hidden_states": torch.randn(1, 77, 64),
        }
        evolved = snapfusion(config | {"mid_block_type": "UNetMidBlock2DCrossAttn"}).model_dump(mode="json")
        yield f"{name} unet", UNet(UNet2DConditionModel(**config), "outside"), inputs
        yield f"{name} unet, snapfusion", UNet(ElasticUNet(**config, architecture=evolved), "outside"), inputs
        text = parts["text_encoder"] | {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 256}
        text |= {"num_attention_heads": 4, "bos_token_id": 0, "eos_token_id": 2}
        encoder = TextEncoder(CLIPTextModel(CLIPTextConfig(**text)))
        yield f"{name} text_encoder", encoder, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    vae = AutoencoderKL(**CONFIGS["sd-1.5"]["vae"] | {"block_out_channels": (16, 32, 64, 64), "norm_num_groups": 8})
    yield "sd-1.5 and sd-2.1 decoder", Decoder(vae), {"latents": latents}


def unit_norms(module: nn.Module) -> nn.Module | None:
    """A copy whose norms are as when made; None if it has none."""
    fresh = shared_copy(module)
    norms = [one for one in fresh.modules() if isinstance(one, (nn.GroupNorm, nn.LayerNorm))]
    for norm in norms:
        norm.weight, norm.bias = nn.Parameter(torch.ones_like(norm.weight)), nn.Parameter(torch.zeros_like(norm.bias))
    return fresh.requires_grad_(False) if norms else None


def row(proof: Proof) -> str:
    """The proof's columns: operations, refused, pieces on GPU and CPU, errors."""
    errors = "".join(
        f"{one.max_error if one.finite else 'NaN':>10.1e}{one.sqnr_db:>7.1f}" if one.finite else f"{'NaN':>10}{'':>7}"
        for one in proof.parity.values()
    )
    verdict = "taken" if proof.accepted else "refused"
    pieces = f"{proof.partitions[0]}+{proof.partitions[1]}"
    return f"{proof.operations:>6}{sum(proof.refused.values()):>9}{pieces:>9}{verdict:>9}{errors}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=("blocks", "networks"), default=["blocks", "networks"])
    parser.add_argument("--only", type=re.compile, default=re.compile(""), metavar="REGEX")
    parser.add_argument("--precisions", default="fp32,fp16")
    parser.add_argument("--forms", default="unit,before,after")
    parser.add_argument("--scale", type=float, default=1.0, help="of the residual stream")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        oracles: dict[str, Oracle] = {}
        for precision in args.precisions.split(","):
            stacks = find_stacks()
            # two independent drivers where there are two: SwiftShader has FP32 only
            found = choose(tuple(one for one in stacks if one.precisions == (precision,)) or stacks, precision)
            if found is None:
                raise SystemExit(f"no driver with {precision} here: see docs/mobile.md")
            oracles[precision] = stack.enter_context(Oracle(found, timeout=3600))
            print(f"{precision}: {found.name}, {found.adapter}")
        columns = f"{'ops':>6}{'refused':>9}{'GPU+CPU':>9}{'delegate':>9}" + f"{'error':>10}{'dB':>7}" * len(oracles)
        print(f"{'':<72}{'form':<7}{columns}")

        def show(name: str, module: nn.Module, samples: Samples) -> None:
            stressed = args.scale != 1
            unit = unit_norms(module)
            forms = [("before", module, BEFORE), ("after", module, TARGETS["litert-gpu"])]
            for form, network, target in forms if unit is None or stressed else [("unit", unit, BEFORE), *forms]:
                if form not in args.forms.split(","):
                    continue
                start = time.perf_counter()
                proof = prove(name, network, samples, target, oracles, compile_only=form != "after" and not stressed)
                print(
                    f"{name:<72}{form:<7}{row(proof)}{time.perf_counter() - start:>7.0f} s {proof.failure}", flush=True
                )
                rows.append({**asdict(proof), "form": form, "proved": proof.proved})
                if args.json:
                    write_json(args.json, {"scale": args.scale, "rows": rows})

        if "blocks" in args.what:
            for block in all_blocks(args.scale):
                if args.only.search(block.name):
                    show(block.name, block.module, block.samples)
        if "networks" in args.what:
            for name, module, samples in networks():
                if args.only.search(name):
                    show(name, with_weights(module.eval(), args.scale), samples)
    failed = [one["name"] for one in rows if one["form"] == "after" and not one["proved"]]
    print(f"{len(rows)} rows, not proved: {', '.join(failed) or 'none'}")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
