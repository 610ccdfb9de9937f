"""Every `pocketfusion` command of the README runs on small data, and those of the pages are at least commands."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]


def console_commands(page: Path) -> list[str]:
    """The lines that begin with `$` in the page's `console` blocks."""
    blocks = re.findall(r"^```console\n(.*?)^```", page.read_text(), flags=re.S | re.M)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("$ ")]
    return [line.removeprefix("$ ").split(" #")[0].strip() for line in lines]


def first_table() -> str:
    """The README's, of what a reader has and runs."""
    return README.read_text().partition("| you have | you run |\n|---|---|\n")[2].partition("\n\n")[0]


def table_commands() -> list[str]:
    return re.findall(r"`(pocketfusion [^`]+)`", first_table())


def test_the_readme_has_commands():
    """Of all that people come with, before anything else; what it installs is to be had."""
    text = README.read_text()
    assert text.index("make demo") < text.index(". .venv-demo/bin/activate") < text.index("| you have |")
    rows = re.findall(r"^\| \*\*(.+?)\*\*", first_table(), flags=re.M)
    wanted = ["nothing", "a checkpoint file", "a checkpoint and a LoRA", "pictures and a GPU", "a bundle and an app"]
    assert rows == wanted and len(table_commands()) >= len(rows)
    for page in PAGES:  # on no index yet
        assert not re.search(r"pip install \S*pocketfusion", page.read_text()), page


def make_inputs(folder: Path) -> None:
    """What the table's reader has: `my.safetensors` and a LoRA for it, in miniature."""
    import torch
    from members import file
    from safetensors.torch import save_file

    path, pipeline = file()(folder)
    path.rename(folder / "my.safetensors")
    width = pipeline.unet.config.block_out_channels[0]
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    lora = {f"{layer}.lora_down.weight": torch.randn(2, width), f"{layer}.lora_up.weight": torch.randn(width, 2)}
    save_file(lora, folder / "style.safetensors")


def needs_inputs(command: str) -> bool:
    return "my-" in command or "my." in command


@pytest.mark.timeout(1500)
def test_every_command_of_the_readme_runs(cli, compressed, shallow_recipe, tmp_path, monkeypatch):
    """On the chain that `compress` has made: its own command finds every stage finished. Those on a reader's own
    checkpoint are below."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(compressed, tmp_path / "OUT")
    for command in [*table_commands(), *console_commands(README)]:
        if command.startswith("pocketfusion ") and not needs_inputs(command):
            done = cli(*shlex.split(command.replace("recipes/emoji128.yaml", str(shallow_recipe)))[1:])
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_command_on_a_checkpoint_runs(tmp_path, monkeypatch, once):
    """Of the README's table, in its order; networks of the same weights are converted once."""
    from conversions import kept_in
    from pocketfusion.cli import app, commands  # noqa: F401  (registers them)
    from pocketfusion.mobile import export

    make_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    kept = once("zoo-conversions", lambda root: None)
    monkeypatch.setattr(export, "_convert_network", kept_in(kept, export._convert_network))
    for command in filter(needs_inputs, table_commands()):
        result = CliRunner().invoke(app, shlex.split(command)[1:])
        assert result.exit_code == 0, f"{command}\n{result.output}\n{result.exception}"


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_command_of_the_readme_works_when_typed_after_make_demo(shallow_recipe, tmp_path):
    """In one shell, in a clone, with what the README installs and nothing else; the long recipe as a short one."""
    clone = tmp_path / "clone"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    for name in filter(None, map(os.fsdecode, files)):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, clone / name)
    make_inputs(clone)
    shutil.copy(shallow_recipe, clone / "recipes" / "emoji128.yaml")
    typed = console_commands(README)
    first = typed.index(next(line for line in typed if line.startswith("pocketfusion ")))
    lines = [*typed[:first], *table_commands(), *(line for line in typed[first:] if line != "make test")]
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    script = "set -ex\n" + "\n".join(lines)
    done = subprocess.run(["bash", "-c", script], cwd=clone, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_a_recipe_takes_a_readers_own_pictures():
    """The lines that docs/compress.md asks to change, in the recipe that the README names."""
    from pocketfusion.compress.chain import chain_of
    from pocketfusion.recipe import Recipe

    page = (ROOT / "docs" / "compress.md").read_text().partition("## Your own pictures")[2]
    changed = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", page, flags=re.S)[0])["stages"]
    recipe = yaml.safe_load((ROOT / "recipes" / "emoji128.yaml").read_text())
    assert set(changed) <= set(recipe["stages"])
    recipe["stages"] |= changed
    chain = chain_of(Recipe.model_validate(recipe))
    assert chain["data"].given == Path("my-pictures") and chain["evaluate"].options.sets == ("val_combo",)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page_have_its_options(page):
    """Parsed as the command line would be, and not run."""
    from pocketfusion.cli import app, commands  # noqa: F401  (registers them)

    for command in console_commands(page) + (table_commands() if page == README else []):
        if command.startswith("pocketfusion "):
            group, arguments = typer.main.get_command(app), shlex.split(command)[1:]
            while arguments and arguments[0] in getattr(group, "commands", {}):
                group, arguments = group.commands[arguments[0]], arguments[1:]
            group.make_context("pocketfusion", list(arguments))


@pytest.mark.parametrize(
    "command",
    [
        "compress",
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
        "vectors",
        "device-pack",
        "device-report",
    ],
)
def test_the_readme_names_every_command(command):
    assert f"`{command}" in README.read_text() or f"pocketfusion {command}" in README.read_text()
