"""The fixed prompts are of the frozen split and stay what they are."""

from collections import Counter

import pytest

from pocketfusion.data.emoji.drawings import STYLES
from pocketfusion.data.emoji.split import assign_split, frozen_groups
from pocketfusion.evaluate.prompts import fixed_prompts


def test_there_are_twelve_of_each_kind_and_no_two_alike():
    prompts = fixed_prompts()
    assert Counter(p.set for p in prompts) == {"train": 12, "test_combo": 12, "test_concept": 12, "free": 12}
    assert len({p.prompt for p in prompts}) == len({p.id for p in prompts}) == 48


@pytest.mark.parametrize("prompt", [p for p in fixed_prompts() if p.set != "free"], ids=lambda p: p.id)
def test_each_pair_is_in_its_set(prompt):
    style, code = prompt.id.split("/")
    assert assign_split(frozen_groups()[code], STYLES[style].family) == prompt.set
    assert prompt.prompt.endswith(f", {STYLES[style].words} style")
