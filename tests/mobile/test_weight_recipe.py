"""The weight recipe: rules by regex, near names, files that are none."""

from __future__ import annotations

from pathlib import Path

import pytest

from pocketfusion.errors import PocketfusionError
from pocketfusion.mobile.quantization.weight_forms import NetworkRecipe, Rule, WeightRecipe

LAYERS = [
    "conv_in",
    "down_blocks.0.attentions.0.proj_in",
    "down_blocks.1.attentions.0.proj_in",
    "time_embedding.linear_1",
]


def test_the_first_rule_that_takes_a_layer_or_a_module_above_it_wins() -> None:
    recipe = NetworkRecipe(
        default="int8",
        rules=(
            Rule(match=r"down_blocks\.\d+\.attentions.*", weights="int4-dynamic"),
            Rule(match=r"down_blocks\.1", weights="float32"),
            Rule(match="time_embedding", weights="float16"),
        ),
    )
    assert list(recipe.forms(LAYERS).values()) == ["int8", "int4-dynamic", "int4-dynamic", "float16"]


def test_a_listing_gives_back_what_it_lists() -> None:
    forms = dict(zip(LAYERS, ("float16", "int8", "int8-dynamic", "int8"), strict=True))
    recipe = NetworkRecipe.listing(forms)  # type: ignore[arg-type]
    assert recipe.forms(LAYERS) == forms
    assert recipe.default == "int8" and len(recipe.rules) == 2


def test_save_and_load(tmp_path: Path) -> None:
    recipe = WeightRecipe(
        model="0" * 64, unet=NetworkRecipe(default="int8", rules=(Rule(match="a.*", weights="float16"),))
    )
    recipe.save(tmp_path / "r.yaml")
    assert WeightRecipe.load(tmp_path / "r.yaml") == recipe


def test_an_unknown_layer_is_told_with_the_nearest_names() -> None:
    recipe = NetworkRecipe(rules=(Rule(match=r"down_blocks\.0\.attention\.0", weights="int8"),))
    with pytest.raises(
        PocketfusionError, match=r"matches no layer: the nearest names are .*down_blocks\.0\.attentions\.0"
    ):
        recipe.forms(LAYERS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not YAML"),
        ("- 1", "is not a weight recipe"),
        ("format: pocketfusion-weights\nunet: {default: int3}", "unet.default"),
        ("unet: {rules: [{match: '(', weights: int8}]}", "is not a regular expression"),
        ("weights: int8", "weights: Extra inputs"),
    ],
)
def test_what_is_no_recipe_is_told_in_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(PocketfusionError, match=message):
        WeightRecipe.load(tmp_path / "r.yaml")
    with pytest.raises(PocketfusionError, match="cannot be read"):
        WeightRecipe.load(tmp_path / "missing.yaml")
