"""Which of a row's captions a step takes."""

import numpy as np

from pocketfusion.train.cache import CaptionTable


def test_earlier_captions_are_taken_as_often_as_the_docstring_says():
    table = CaptionTable([{"captions": ["a"]}, {"captions": ["b", "a"]}, {"captions": ["c", "b", "a"]}])
    u = (np.arange(10_000) + 0.5) / 10_000
    for row, wanted in enumerate(({"a": 1.0}, {"b": 0.63, "a": 0.37}, {"c": 0.48, "b": 0.28, "a": 0.24})):
        picked = [table.captions[i] for i in table.pick(np.full(len(u), row), u)]
        assert {caption: round(picked.count(caption) / len(u), 2) for caption in wanted} == wanted
