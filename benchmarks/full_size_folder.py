"""A model folder of full size with random weights: what conversion, delegation, memory and speed are measured on.

Usage: python benchmarks/full_size_folder.py sd-1.5 OUT [--unet snapfusion] [--decoder half|tiny] [--guidance embedded]

SD-1.5's or SD-2.1-base's exact configurations, a byte-pair tokenizer of single letters in CLIP's form (prompts are
spelt), SD's noise schedule. `--unet snapfusion` is SnapFusion's architecture, `--decoder` a pruned decoder's, and
`--guidance embedded` a UNet with the guidance scale as an input (one prediction a step): the forms that the stages
`evolve`, `distill-decoder` and `distill-guidance` end in.
"""

from __future__ import annotations

import argparse
import string
from pathlib import Path

import torch

from pocketfusion.artefact import atomic_folder

#: SD-1.x's and SD-2.1-base's `scheduler_config.json`, as DDIM reads it.
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}


def write_folder(name: str, out: Path, unet_form: str, decoder: str, guidance: str) -> None:
    """Writes the folder, atomically."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTokenizer

    from pocketfusion.distill.decoder_pruning import half_shape, prune_decoder, tiny_shape
    from pocketfusion.models.elastic.presets import snapfusion
    from pocketfusion.models.elastic_unet import ElasticUNet
    from pocketfusion.models.sampling import Sampling, write_sampling
    from pocketfusion.models.sd_configs import CONFIGS, random_pipeline

    parts = random_pipeline(name)
    config = CONFIGS[name]["unet"] | {"mid_block_type": "UNetMidBlock2DCrossAttn"}
    if guidance == "embedded":
        config["time_cond_proj_dim"] = 256
    torch.manual_seed(0)
    if unet_form == "snapfusion":
        unet = ElasticUNet(architecture=snapfusion(config).model_dump(mode="json"), **config)
    else:
        unet = UNet2DConditionModel(**config)
    vae = parts.vae
    if decoder:
        vae = prune_decoder(vae, {"half": half_shape, "tiny": tiny_shape}[decoder](vae))
    letters = [*string.ascii_lowercase, *string.digits, *",.-"]
    pieces = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={piece: number for number, piece in enumerate(pieces)}, merges=[], model_max_length=77
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=parts.text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with atomic_folder(out) as partial:
        pipeline.save_pretrained(partial)
        steps = 50 if unet_form == "stock" else 8
        write_sampling(partial, Sampling(num_inference_steps=steps, guidance_scale=7.5, guidance=guidance))
    count = sum(p.numel() for p in unet.parameters()) / 1e6
    print(f"{out}: {name}, UNet {unet_form} {count:.1f} M, decoder {decoder or 'stock'}, {guidance} guidance")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", choices=("sd-1.5", "sd-2.1"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--unet", default="stock", choices=("stock", "snapfusion"))
    parser.add_argument("--decoder", default="", choices=("", "half", "tiny"))
    parser.add_argument("--guidance", default="classifier-free", choices=("classifier-free", "embedded"))
    args = parser.parse_args()
    write_folder(args.config, args.out, args.unet, args.decoder, args.guidance)


if __name__ == "__main__":
    main()
