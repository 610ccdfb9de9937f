"""What the plan of a chain shows."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from pocketfusion.compress.chain import chain_of
from pocketfusion.compress.forecast import Forecast, table
from pocketfusion.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"


def shown(rows, chain) -> str:
    console = Console(file=io.StringIO(), width=80)
    console.print(table(chain, rows))
    return console.file.getvalue()


def test_a_plan_loses_no_figure_in_80_columns():
    chain = chain_of(load_recipe(RECIPES / "tiny.yaml"))
    rows = [
        Forecast(stage, "go on", 104_857_600, 1_302_500_000, 460e9, 156.5e9, seconds)
        for stage, seconds in zip(chain.stages, [2.3e10, None] * 8, strict=True)
    ]
    plan = shown(rows, chain)
    assert (
        "…" not in plan and "104,857,600" in plan and "460 GB" in plan and "2,504 GB" in plan and "729.3 years" in plan
    )


def test_the_sum_says_what_it_leaves_out():
    chain = chain_of(load_recipe(RECIPES / "tiny.yaml"))
    unknown = ("profile", "quantize")
    rows = [Forecast(s, "run", disk=3e6, seconds=None if s.name in unknown else 1.0) for s in chain.stages]
    plan = shown(rows, chain)
    assert "48 MB" in plan and "14 s" in plan and "without those of profile, quantize" in " ".join(plan.split())


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.2, "under 1 s"), (59, "59 s"), (90, "1.5 min"), (129_600, "36.0 h"), (864_000, "10.0 days")],
)
def test_times_have_the_unit_of_a_reader(seconds, said):
    from pocketfusion.compress.overview import duration

    assert duration(seconds) == said
