"""The losses of the tiny recipe's trainings, step by step, are those of when they were last looked at.

They hold together what no single test does: the data's order, every random number, the objectives, the optimiser, the
schedule. A change of them is meant or a fault. Stages behind `evolve` depend on measured times and are not held.

    python tests/compress/test_golden_losses.py OUT    # writes them anew, from a `compress` of the shallow recipe
"""

import json
import sys
from pathlib import Path

import pytest

from pocketfusion.train.log import read_log

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny_losses.json"
STAGES = ("loss-judge", "autoencoder", "base", "judge", "elastic")


def losses(out: Path) -> dict[str, list[float]]:
    return {stage: [line["loss"] for line in read_log(out / f"{stage}.run") if "loss" in line] for stage in STAGES}


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("stage", STAGES)
def test_losses_are_as_they_were(compressed, stage):
    found, golden = losses(compressed)[stage], json.loads(GOLDEN.read_text())[stage]
    assert len(found) >= 4
    assert found == pytest.approx(golden, rel=1e-3)  # processors differ in the last digits, and steps add them up


if __name__ == "__main__":
    found = {stage: [round(loss, 6) for loss in each] for stage, each in losses(Path(sys.argv[1])).items()}
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
