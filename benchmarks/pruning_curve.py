"""Noise of a pruned UNet's output over the share of parameters removed, for both rules, without any training.

python benchmarks/pruning_curve.py models/emoji/eight --data /path/to/emoji --ratios 0.11,0.2,0.3,0.5
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pocketfusion.data.sources import open_dataset
from pocketfusion.evaluate.generate import ModelFolder
from pocketfusion.mobile.pipeline_specs import unet_cost
from pocketfusion.models.elastic.transfer import without_units
from pocketfusion.models.elastic_unet import load_elastic
from pocketfusion.prune.harm import noise, predictions, real_calls, unit_harm
from pocketfusion.prune.pruning import HELD_OUT, TRAINING, Prunable, least_harm, uniform


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--ratios", default="0.11,0.2,0.3,0.5")
    parser.add_argument("--samples", type=int, default=64)
    given = parser.parse_args()
    system, unet = ModelFolder(given.folder), load_elastic(given.folder).eval()
    unet.to(system.device)
    images = open_dataset(given.data, system.image_size)
    training, held_out = (real_calls(system, images, split, given.samples) for split in (TRAINING, HELD_OUT))
    harm = unit_harm(unet, Prunable.of(unet).sizes, training)
    exact = predictions(unet, held_out)
    tokens = system.text.max_length
    base = unet_cost(unet.config, unet.architecture, tokens)
    print(f"most that can go: {Prunable.of(unet).most:.3f}")
    print("ratio  rule         multiply-adds  output   direction  guidance delta")
    for ratio in map(float, given.ratios.split(",")):
        for rule, kept in (("uniform", uniform(unet, ratio)), ("sensitivity", least_harm(unet, ratio, harm))):
            pruned = without_units(unet, kept)
            cost = unet_cost(pruned.config, pruned.architecture, tokens)
            found = noise(predictions(pruned, held_out), exact)
            print(
                f"{ratio:<5}  {rule:11}  {cost.multiply_adds / base.multiply_adds:<13.3f}  {found['output']:.1e}  "
                f"{found['direction']:.1e}    {found['guidance_delta']:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
