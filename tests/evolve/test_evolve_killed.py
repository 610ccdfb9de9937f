"""`kill -9` in the middle of `evolve`: nothing half-written, and the same command goes on."""

from __future__ import annotations

import json
from typing import Any

from command import leftovers
from pocketfusion.folder import weights_hash


def test_a_killed_search_goes_on(kill, end, tiny_folder, tiny_recipe, tiny_data, judge, table, tmp_path):
    given = ("--recipe", tiny_recipe, "--data", tiny_data, "--judge", judge, "--latency", table, "--samples", 4)
    search = ("--steps", 1, "--actions", "self-attention", "--group", 16, "--budget-ratio", 0.8, "--train-steps", 2)

    def arguments(name: str) -> tuple:
        return ("evolve", tiny_folder, *given, *search, "--out", tmp_path / name)

    def evaluations() -> list[str]:
        return (tmp_path / "cut.run" / "evaluations.jsonl").read_text().splitlines()

    end(*arguments("whole"))
    kill("pocketfusion.evolve.algorithm:Ledger.add", 7, *arguments("cut"))
    first = evaluations()
    assert len(first) == 7
    kill("pocketfusion.evolve.search:_save", 1, *arguments("cut"))  # after the round's training
    kill("pocketfusion.evolve.search:plot_frontier", 1, *arguments("cut"))
    assert not (tmp_path / "cut").exists() and len(leftovers(tmp_path)) == 1
    before = evaluations()
    end(*arguments("cut"))
    assert evaluations() == before and before[:7] == first and not leftovers(tmp_path)

    def result(name: str) -> Any:
        log = json.loads((tmp_path / name / "actions.json").read_text())
        return log, weights_hash(tmp_path / name / "unet")

    assert result("cut") == result("whole")
