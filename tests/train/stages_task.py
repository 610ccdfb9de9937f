"""Every training stage on the tiny recipe, in one process or in all of a launch, for tests of several processes."""

import sys
from pathlib import Path

from pocketfusion.data.packed import CaptionedImages
from pocketfusion.data.sources import open_dataset
from pocketfusion.distill.consistency import distill_consistency
from pocketfusion.distill.decoder import distill_decoder
from pocketfusion.distill.guidance import distill_guidance
from pocketfusion.distill.steps import distill_steps
from pocketfusion.distill.to_v import to_v
from pocketfusion.recipe import Recipe, load_recipe
from pocketfusion.train.autoencoder import train_autoencoder
from pocketfusion.train.elastic import train_elastic
from pocketfusion.train.judge import train_judge
from pocketfusion.train.place import StageRun
from pocketfusion.train.recovery import recover
from pocketfusion.train.teacher import train_teacher

STAGES = ("autoencoder", "judge", "base", "to-v", "elastic", "recover", "steps", "guidance", "consistency", "decoder")


def run_stages(recipe: Recipe, data: CaptionedImages, trained: Path, epsilon: Path, out: Path) -> None:
    """`trained`: folders autoencoder and base; `epsilon`: the base, said to predict ε."""
    base = trained / "base"
    place = {name: StageRun.at(out / name) for name in STAGES}
    train_autoencoder(recipe, data, place["autoencoder"])
    train_judge(recipe, data, place["judge"])
    train_teacher(recipe, data, trained / "autoencoder", place["base"])
    to_v(recipe, data, epsilon, place["to-v"])
    train_elastic(recipe, data, base, place["elastic"])
    recover(recipe, data, place["elastic"].out, base, place["recover"])  # what a stage before has written
    distill_steps(recipe, recipe.step_distillation, data, base, base, place["steps"])
    distill_guidance(recipe, data, base, place["guidance"])
    distill_consistency(recipe, recipe.consistency, data, base, base, place["consistency"])
    distill_decoder(recipe, data, base, place["decoder"], recipe.decoder)


if __name__ == "__main__":
    recipe_file, data_folder, *folders = map(Path, sys.argv[1:])
    loaded = load_recipe(recipe_file)
    run_stages(loaded, open_dataset(data_folder, loaded.data.size), *folders)
