"""A recipe's stages as they are read: inputs by default and by name, own settings, and what cannot work."""

from pathlib import Path

import pytest
import yaml

from pocketfusion.compress.chain import chain_of
from pocketfusion.compress.kinds import KINDS
from pocketfusion.errors import PocketfusionError
from pocketfusion.recipe import Recipe, load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
TINY = yaml.safe_load((RECIPES / "tiny.yaml").read_text())


def chain(stages: dict, **sections):
    return chain_of(Recipe.model_validate({**TINY, **sections, "stages": stages}))


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_with_stages_can_work(path):
    recipe = load_recipe(path, whole=False)
    if recipe.stages:
        assert len(chain_of(recipe).stages) == len(recipe.stages)


def test_inputs_are_the_nearest_that_fit():
    found = chain(TINY["stages"])
    assert found["autoencoder"].inputs == {"data": ("data",), "loss-judge": ("loss-judge",)}
    assert found["base"].inputs == {"data": ("data",), "autoencoder": ("autoencoder",)}
    evolve = {"data": ("data",), "folder": ("elastic",), "judge": ("judge",), "latency": ("profile",)}
    assert found["evolve"].inputs == evolve
    assert found["recover"].inputs == {"data": ("data",), "folder": ("evolve",), "base": ("base",)}
    assert found["distill-steps"].inputs["folder"] == ("recover",)
    assert found["export"].inputs == {"folder": ("distill-decoder",), "recipe": ("quantize",)}
    assert found["evaluate"].parents == ("data", "judge", "base", "distill-decoder")


def test_an_export_for_a_device_has_its_target_and_still_takes_a_recipe():
    stages = {
        "base": {"from": "sd"},
        "quantize": {"min_sqnr": 28, "target": "litert-gpu"},
        "export": {"for": "android"},
    }
    export = chain(stages)["export"]
    assert (export.options.device, export.options.target) == ("android", "litert-gpu")
    assert export.inputs["recipe"] == ("quantize",)
    with pytest.raises(PocketfusionError, match="the stage export is for litert-cpu and its recipe quantize for"):
        chain({**stages, "export": {"for": "desktop"}})
    with pytest.raises(PocketfusionError, match="the stage export: for: Input should be 'android'"):
        chain({**stages, "export": {"for": "fridge"}})


def test_an_export_with_its_own_weights_takes_no_recipe():
    found = chain({"base": {"from": "x"}, "quantize": {"min_sqnr": 28}, "export": {"weights": "int8"}})
    assert found["export"].inputs == {"folder": ("base",)}


def test_a_checkpoint_and_named_inputs_make_other_chains():
    stages = {
        "data": {"from": "pictures"},
        "checkpoint": {"stage": "base", "from": "a/checkpoint"},
        "distill-steps": {"teacher_steps": 16, "steps": 8, "train": {"steps": 3}},
        "distill-decoder": {"folder": "checkpoint", "sampler": "distill-steps"},
    }
    found = chain(stages)
    assert found["distill-steps"].inputs == {"data": ("data",), "folder": ("checkpoint",), "teacher": ("checkpoint",)}
    assert found["distill-decoder"].inputs["sampler"] == ("distill-steps",)
    settings = found["distill-steps"].settings
    assert (settings.teacher_steps, settings.train.steps, settings.train.batch_size) == (16, 3, 4)
    assert found.recipe_of(found["distill-steps"]).step_distillation == settings


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ({"autoencodr": {}}, "no stage 'autoencodr': did you mean 'autoencoder'?"),
        ({"data": {"sorce": "shapes"}}, "data has no setting 'sorce': did you mean 'source'?"),
        ({"data": {"source": "paintings"}}, "data: source: Input should be 'emoji' or 'shapes'"),
        ({"Data": {"stage": "data"}}, "a stage is called 'Data'"),
        ({"autoencoder": {}}, "autoencoder needs data, and no stage before it makes one: put data"),
        (
            {"data": {}, "base": {}, "autoencoder": {}},
            "base needs an autoencoder, and no stage before it makes one: put autoencoder before it",
        ),
        ({"data": {}, "autoencoder": {"loss": {"feature_weight": 1}}}, "needs a loss judge, and no"),
        (
            {"data": {}, "judge": {"train": {"stepps": 3}}},
            "judge: there is no setting 'stepps' in train: did .*'steps'",
        ),
        ({"data": {}, "judge": {"gate": {"val_psnr": 2}}}, "the gate of judge names 'val_psnr', no score of it"),
        ({"data": {}, "judge": {"gate": {"val_combo_top1": "much"}}}, "asks val_combo_top1 for 'much'"),
        ({"data": {}, "judge": {"gate": {}}}, "the gate of judge names no score: there are val_combo_top1"),
        (
            {"data": {}, "judge": {"gate": {"val_combo_top1": 1, "up_to": 9}}},
            "up_to 9: give a multiple of its 6 steps",
        ),
        ({"data": {"gate": {"pictures": 9, "up_to": 9}}}, "data has up_to, but data trains no steps"),
        ({"data": {}, "judge": {"data": "elsewhere"}}, "takes its data from 'elsewhere', which is no stage before it"),
        (
            {"data": {}, "judge": {}, "base": {"autoencoder": "judge"}},
            "from 'judge', a judge: it needs an autoencoder",
        ),
        ({"data": {"from": "x", "scenes": 3}}, "taken from x, so it has no 'scenes'"),
        ({"judge": {"from": "x", "skip_bad": True}}, "taken from x, so it has no 'skip_bad'"),
        ({"data": {}, "judge": {"data": ["data", "data"]}}, "takes one data, not data, data"),
        ({"base": {"from": "x"}, "quantize": {}}, "the stage quantize: give one budget: min_sqnr, such as 28 dB"),
        (
            {"base": {"from": "x"}, "quantize": {"min_sqnr": 28, "forms": ["int9"]}},
            "quantize: forms.0: Input should be",
        ),
        (
            {"base": {"from": "x"}, "export": {"weights": "int9"}},
            "export: weights: Input should be 'float32', 'float16'",
        ),
        (
            {"base": {"from": "x"}, "quantize": {"min_sqnr": 28}, "export": {"target": "litert-gpu"}},
            "export is for litert-gpu and its recipe quantize for litert-cpu",
        ),
        ({}, "tiny has no section 'stages'"),
    ],
)
def test_what_cannot_work_is_told(stages, said):
    with pytest.raises(PocketfusionError, match=said):
        chain(stages)


def test_a_stage_without_its_section_is_told():
    with pytest.raises(PocketfusionError, match="distill-steps trains by the recipe's section 'step_distillation'"):
        chain({"data": {}, "b": {"stage": "base", "from": "x"}, "distill-steps": {}}, step_distillation=None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"judgge": {}}, "there is no setting 'judgge': did you mean 'judge'?"),
        (
            {"elastic": {**TINY["elastic"], "atention_drop": 1}},
            "'atention_drop' in elastic: did you mean 'attention_drop'",
        ),
        ({"text": {"surce": "x"}}, "no setting 'surce' in text: did you mean 'source'"),
        ({"elastic": {"attention_drop": 0.1}}, "elastic.train is missing: add it"),
        ({"data": {"size": 4}}, "data.size: Input should be greater than or equal to 16 .got 4."),
    ],
)
def test_what_is_wrong_with_a_section_is_told(tmp_path, change, said):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({**TINY, **change}))
    with pytest.raises(PocketfusionError, match=said):
        load_recipe(file)


@pytest.mark.parametrize("kind", ["evolve", "quantize", "export", "check", "evaluate", "bench", "profile"])
def test_options_have_their_commands_names_and_defaults(kind):
    """Where a stage and its command differ on purpose, it is listed here."""
    import typer

    from pocketfusion.cli import app, commands  # noqa: F401  (registers them)

    meant = {"profile": {"batch": "2"}}  # a search needs the guided step alone
    given = {p.name: p.default for p in typer.main.get_command(app).commands[kind].params}
    for name, field in KINDS[kind].options.model_fields.items():
        if name == "architectures":  # pydantic has a method called as the command's --validate is
            continue
        option = meant.get(kind, {}).get(name, given[name])
        wanted = getattr(option, "value", option)
        own = (
            ",".join(f"{one:g}" if isinstance(one, float) else str(one) for one in field.default)
            if isinstance(field.default, tuple)
            else field.default
        )
        assert own == wanted or (not own and not wanted) or (kind, name) == ("evaluate", "samples"), name
