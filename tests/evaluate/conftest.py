"""An untrained judge and the commands run in this process."""

import sys

import pytest
import torch

from pocketfusion.cli import main
from pocketfusion.models.dual_encoder import JudgeModel


@pytest.fixture(scope="session")
def judge(tiny_folder, tmp_path_factory):
    """An untrained judge of 32 features over the tiny text encoder. Read only."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("judge") / "judge"
    text = {"source": str(tiny_folder), "max_length": 32}
    JudgeModel(image_size=64, widths=(8, 16), text_width=32, embed_dim=16, text=text).save_pretrained(path)
    return path


@pytest.fixture
def pocketfusion(monkeypatch, capsys):
    """Runs `pocketfusion ARGS` in this process: exit code, stdout, stderr."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pocketfusion", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return (stopped.value.code or 0, *capsys.readouterr())

    return run
