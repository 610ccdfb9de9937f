"""Few-step adapters made of this project's own models, and what `export --few-steps` draws with them.

    python benchmarks/few_step_adapters.py extract BASE STUDENT OUT.safetensors --rank 32
    python benchmarks/few_step_adapters.py measure STUDENT BASE@8 BUNDLE… --data DATA --judge JUDGE --json FILE

`extract` takes no training: the difference of two models' weights, layer by layer cut to a rank by its singular values
(what the community calls LoRA extraction); biases and norms, which a LoRA has none of, are left behind. Three files of
the same numbers: PEFT's names (OUT), kohya's (OUT-kohya), diffusers 0.21's (OUT-diffusers). `measure` draws the
same captions from the same noise with every model folder (in torch) and bundle (on LiteRT), with DDIM.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from pocketfusion.artefact import write_json
from pocketfusion.data.sources import open_dataset
from pocketfusion.evaluate.extractors import JudgeExtractor
from pocketfusion.evaluate.generate import SamplerSettings
from pocketfusion.evaluate.metrics import clip_score, kid, retrieval
from pocketfusion.evaluate.systems import system_spec
from pocketfusion.models.loading import load_pipeline
from pocketfusion.runtime.result import contact_sheet

Pair = tuple[torch.Tensor, torch.Tensor]  # down [r, in, …], up [out, r, …]


def low_rank(delta: torch.Tensor, rank: int) -> Pair:
    """The nearest product up @ down of that rank, singular values shared evenly."""
    u, s, v = torch.linalg.svd(delta.flatten(1), full_matrices=False)
    r = min(rank, len(s))
    root = s[:r].sqrt()
    up = (u[:, :r] * root).reshape(-1, r, *[1] * (delta.ndim - 2))
    return (root[:, None] * v[:r]).reshape(r, *delta.shape[1:]), up


def extract(base: Path, student: Path, out: Path, rank: int) -> None:
    """Writes the three files, and says how much of the difference they hold."""
    ours, theirs = load_pipeline(base).unet, load_pipeline(student).unet
    pairs: dict[str, Pair] = {}
    whole = held = rest = 0.0
    for (name, one), (_, other) in zip(ours.named_modules(), theirs.named_modules(), strict=True):
        weight = getattr(one, "weight", None)
        if weight is None:
            continue
        delta = (other.weight - weight).detach()
        whole += float(delta.square().sum())
        if not isinstance(one, nn.Linear | nn.Conv2d):
            rest += float(delta.square().sum())
        elif bool(delta.any()):
            pairs[name] = low_rank(delta, rank)
            down, up = pairs[name]
            held += float((up.flatten(1) @ down.flatten(1)).square().sum())
    peft, kohya, older = {}, {}, {}
    for name, (down, up) in pairs.items():
        peft |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
        key = "lora_unet_" + name.replace(".", "_")
        kohya |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        kohya[f"{key}.alpha"] = torch.tensor(float(down.shape[0]))
        older |= {f"unet.{name}.lora.down.weight": down, f"unet.{name}.lora.up.weight": up}
    for file, state in ((out, peft), (_named(out, "kohya"), kohya), (_named(out, "diffusers"), older)):
        save_file({key: value.contiguous() for key, value in state.items()}, file)
    print(f"{len(pairs)} layers, rank {rank}: {held / whole:.1%} of the squared difference, norms {rest / whole:.1%}")


def _named(file: Path, convention: str) -> Path:
    return file.with_stem(f"{file.stem}-{convention}")


def measure(systems: list[str], data: Path, judge: Path, guidance: float, count: int, file: Path) -> None:
    """KID to real pictures, CLIP score and top-5 by the judge, PSNR to the first system's pictures."""
    scorer = JudgeExtractor(judge)
    images = open_dataset(data, scorer.judge.image_size)
    indices = images.indices(["test_combo"])
    real, _ = scorer.image_features(np.stack([images.images[i] for i in indices]))
    chosen = np.random.default_rng(1).choice(indices, count, replace=False)
    captions = tuple(images.rows[i]["captions"][0] for i in chosen)
    texts = scorer.text_embeddings(captions)
    first, rows = None, []
    for name in systems:
        path, _, steps = name.partition("@")
        spec = system_spec(Path(path), int(steps) if steps else None)
        settings = SamplerSettings(spec.num_inference_steps, guidance)
        drawn = spec.open(1).draw(captions, range(count), settings)
        first = drawn if first is None else first
        features, embeddings = scorer.image_features(drawn)
        error = np.square(drawn.astype(float) - first).mean((1, 2, 3))
        ranked = retrieval(embeddings, texts, captions, ks=(5,), pool=count)
        rows.append(
            {
                "system": spec.name,
                "kind": spec.kind,
                "kid": kid(features, real)._asdict(),
                "clip_score": float(clip_score(embeddings, texts).mean()),
                "top5": float(ranked.hits[5].mean()),
                "psnr_to_first": float((10 * np.log10(255**2 / error)).mean()) if error.all() else None,
            }
        )
        print(rows[-1], flush=True)
        shown = file.with_name(f"{file.stem}-{spec.name}.png")
        contact_sheet([Image.fromarray(one) for one in drawn[:12]], list(captions[:12])).save(shown)
    write_json(file, {"captions": count, "split": "test_combo", "guidance_scale": guidance, "rows": rows})


def main() -> None:
    """Parses the command line and does one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("extract")
    for name in ("base", "student", "out"):
        one.add_argument(name, type=Path)
    one.add_argument("--rank", type=int, default=32)
    two = commands.add_parser("measure")
    two.add_argument("systems", nargs="+", metavar="PATH[@STEPS]")
    for name in ("data", "judge"):
        two.add_argument(f"--{name}", type=Path, required=True)
    two.add_argument("--guidance", type=float, default=6.0)
    two.add_argument("--count", type=int, default=128)
    two.add_argument("--json", dest="file", type=Path, required=True)
    given = vars(parser.parse_args())
    {"extract": extract, "measure": measure}[given.pop("command")](**given)


if __name__ == "__main__":
    main()
