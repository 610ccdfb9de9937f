"""Every `pocketfusion` command of the README runs, in the README's order, on small data."""

import shlex
from pathlib import Path

import pytest
import yaml

README = Path(__file__).parents[1] / "README.md"
#: What makes the thread small enough for a test; everything else runs as it is written.
SMALL = {
    "data emoji data/emoji": "data emoji data/emoji --style fxemoji --size 64 --scenes 60",
    "recipes/emoji64.yaml": "TINY_RECIPE",
    "--samples 256": "--samples 4",
    "--runs 150 --validate 8": "--runs 1 --base-only --backend torch",
    "--budget-ratio 0.5 --samples 128 --precision bf16 --group 10 --train-steps 60": (
        "--budget-ratio 0.95 --samples 4 --steps 1 --actions remove --group 3 --train-steps 2 --rounds 1"
    ),
    "--guidance 3,4.5,7 --samples 768 --steps 10": "--guidance 2 --samples 64 --steps 1 --sets train",
    "models/emoji/base@50 models/emoji/final": "models/emoji/base@2 models/emoji/final",
    "--guidance 3,4.5,6 --sets test_combo,test_concept --samples 2000": "--guidance 2 --samples 64 --sets train",
    "distill-steps": "distill-steps --train-steps 1",
    "--teacher-steps 16 --steps 4": "--teacher-steps 8 --steps 4 --train-steps 1",
    "--min-sqnr 28": "--min-sqnr 15 --samples 1 --forms int8,float16",
    "check phone.bundle": "check phone.bundle --static",
    "--runs 5": "--runs 1",
}


def readme_commands() -> list[str]:
    commands, inside = [], False
    for line in README.read_text().splitlines():
        if line.startswith("```"):
            inside = not inside and line == "```console"
        elif inside and line.startswith("$ "):
            commands.append(line.removeprefix("$ ").split(" #")[0].strip())
    return commands


def test_the_readme_has_commands():
    commands = readme_commands()
    assert sum(c.startswith("pocketfusion ") for c in commands) >= 8
    assert "make demo" in README.read_text() and "make test" in README.read_text()


@pytest.fixture
def shallow_recipe(tiny_recipe: Path, tmp_path: Path) -> Path:
    """The tiny recipe with a UNet of two levels: the README exports three times, and tracing is most of an export."""
    recipe = yaml.safe_load(tiny_recipe.read_text())
    recipe["teacher"]["unet"] |= {
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "block_out_channels": [8, 16],
        "layers_per_block": 1,
    }
    path = tmp_path / "shallow.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.mark.timeout(1500)
def test_every_command_runs(cli, shallow_recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "emoji").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    for command in readme_commands():
        if not command.startswith("pocketfusion "):
            continue
        for large, small in SMALL.items():
            command = command.replace(large, small)
        arguments = shlex.split(command.replace("TINY_RECIPE", str(shallow_recipe)))[1:]
        done = cli(*arguments)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize(
    "command",
    [
        "data",
        "train-teacher",
        "evaluate",
        "export",
        "generate",
        "info",
        "profile",
        "train-elastic",
        "evolve",
        "recover",
        "score",
        "distill-steps",
        "distill-decoder",
        "distill-guidance",
        "distill-consistency",
        "architecture",
        "quantize",
        "check",
        "bench",
    ],
)
def test_the_readme_names_every_command(command):
    assert any(c.startswith(f"pocketfusion {command}") for c in readme_commands())
