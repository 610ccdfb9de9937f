"""What `import` exchanges and adds: autoencoder, text layers, learnt tokens; the door; the Hub's cache."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import save_file

from ldm import ldm_state, ldm_vae, miniature, save
from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import read_provenance
from pocketfusion.models.bring import door, hub
from pocketfusion.models.bring.door import open_model
from pocketfusion.models.bring.hub import fetch
from pocketfusion.models.bring.importer import Changes, import_file, import_folder
from pocketfusion.models.loading import load_pipeline


@pytest.fixture(scope="session")
def model() -> Any:
    """Read only."""
    return miniature(depth=3)


@pytest.fixture(scope="session")
def made(once: Callable, model: Any) -> Path:
    """A checkpoint's file and the folder of it. Read only."""

    def make(root: Path) -> None:
        save({name: one.half() for name, one in ldm_state(model).items()}, root / "file.safetensors")
        import_file(root / "file.safetensors", root / "folder")

    return once("imported", make)


def another_vae(model: Any, **changes: Any) -> AutoencoderKL:
    """With the same encoder and another decoder, or of another configuration."""
    torch.manual_seed(5)
    config = {key: value for key, value in model.vae.config.items() if not key.startswith("_")} | changes
    vae = AutoencoderKL(**config).eval()
    if not changes:
        vae.encoder.load_state_dict(model.vae.encoder.state_dict())
        vae.quant_conv.load_state_dict(model.vae.quant_conv.state_dict())
    return vae


@pytest.mark.parametrize("form", ["file", "inside a checkpoint", "folder", "model folder"])
def test_another_autoencoder_takes_the_place(form: str, model: Any, made: Path, tmp_path: Path) -> None:
    vae = another_vae(model).half()
    state = ldm_vae(vae)
    if form == "file":
        given = save(state, tmp_path / "vae.safetensors")
    elif form == "inside a checkpoint":
        named = {f"first_stage_model.{name}": one for name, one in state.items()}
        given = save(named | {"model.diffusion_model.x": torch.zeros(1)}, tmp_path / "vae.safetensors")
    else:
        given = tmp_path / "given"
        vae.save_pretrained(given / "vae" if form == "model folder" else given)
    found_vae = import_folder(made / "folder", tmp_path / "out", Changes(vae=given)).vae
    loaded = load_pipeline(tmp_path / "out")
    for name, value in vae.state_dict().items():
        assert torch.equal(value.float(), loaded.vae.state_dict()[name])
    assert "the same encoder as the model's own" in found_vae
    assert torch.equal(loaded.unet.conv_in.weight, model.unet.conv_in.weight.half().float())


def test_a_file_without_an_autoencoder_takes_another(model: Any, made: Path, tmp_path: Path) -> None:
    state = {name: one for name, one in ldm_state(model).items() if "first_stage" not in name}
    file = save(state, tmp_path / "unet.safetensors")
    found = import_file(file, tmp_path / "out", Changes(vae=made / "folder"))
    assert found.vae.startswith("folder: 4 latent channels at 1/8")
    assert torch.equal(load_pipeline(tmp_path / "out").vae.decoder.conv_in.weight,
                       model.vae.decoder.conv_in.weight.half().float())  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"latent_channels": 16}, "is of other latents: it makes 16 channels, and the UNet takes 4"),
        ({"scaling_factor": 0.13025}, "a scaling_factor of 0.13025, and the model's are a scaling_factor of 0.18215"),
        ({"block_out_channels": (32, 64, 64), "down_block_types": ("DownEncoderBlock2D",) * 3,
          "up_block_types": ("UpDecoderBlock2D",) * 3}, "is of other latents: 1/4, and the model's are 1/8"),
        ({"layers_per_block": 2}, "of one picture its and the model's own correlate -?0"),
    ],
)  # fmt: skip
def test_an_autoencoder_of_other_latents_is_refused(
    changes: dict, match: str, model: Any, made: Path, tmp_path: Path
) -> None:
    another_vae(model, **changes).save_pretrained(tmp_path / "given")
    with pytest.raises(PocketfusionError, match=match):
        import_folder(made / "folder", tmp_path / "out", Changes(vae=tmp_path / "given"))
    assert [path.name for path in tmp_path.iterdir()] == ["given"]


def test_a_file_holds_another_autoencoder_against_its_own(model: Any, made: Path, tmp_path: Path) -> None:
    """One that is unsound is no measure: people take another because of it. Its latents are then SD's at 1/8."""
    smaller = {"block_out_channels": (32, 64, 64), "down_block_types": ("DownEncoderBlock2D",) * 3,
               "up_block_types": ("UpDecoderBlock2D",) * 3}  # fmt: skip
    given = {name: tmp_path / name for name in ("strange", "smaller", "good")}
    another_vae(model, layers_per_block=2).save_pretrained(given["strange"])
    another_vae(model, **smaller).save_pretrained(given["smaller"])
    another_vae(model).save_pretrained(given["good"])
    for name, match in (("strange", "the model's own correlate -?0"), ("smaller", "1/4, and the model's are 1/8")):
        with pytest.raises(PocketfusionError, match=match):
            import_file(made / "file.safetensors", tmp_path / "out", Changes(vae=given[name]))
    broken = ldm_state(model)
    broken["first_stage_model.decoder.conv_in.weight"] = torch.full((64, 4, 3, 3), torch.nan)
    file = save(broken, tmp_path / "broken.safetensors")
    found = import_file(file, tmp_path / "out", Changes(vae=given["good"]))
    assert "own autoencoder is unsound" in found.notes[-1] and found.unused == []
    with pytest.raises(PocketfusionError, match="1/4, and Stable Diffusion's are 1/8"):
        import_file(file, tmp_path / "other", Changes(vae=given["smaller"]))
    assert not (tmp_path / "other").exists()


def test_what_is_no_autoencoder_is_told(made: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    files = {
        "lora": ({"lora_unet_x.lora_down.weight": (1,)}, "is a LoRA adapter.*where --vae takes an autoencoder"),
        "diffusers": ({"decoder.up_blocks.0.x": (1,)}, "in diffusers' layout without its config.json"),
        "other": ({"x": (1,)}, "holds no autoencoder of Stable Diffusion's layout"),
        "decoder": ({"decoder.conv_in.weight": (8, 4, 3, 3)}, "lacks an autoencoder's encoder"),
    }
    for name, (shapes, match) in files.items():
        file = save({key: torch.zeros(shape) for key, shape in shapes.items()}, tmp_path / f"{name}.safetensors")
        with pytest.raises(PocketfusionError, match=match):
            import_folder(made / "folder", tmp_path / "out", Changes(vae=file))
    with pytest.raises(PocketfusionError, match="empty holds no autoencoder"):
        import_folder(made / "folder", tmp_path / "out", Changes(vae=tmp_path / "empty"))
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_clip_skip_takes_the_states_before_the_last_layers(made: Path, tmp_path: Path) -> None:
    """As stock pipelines define it: a hidden state, and the last norm. Their argument fails with transformers 5."""
    import_file(made / "file.safetensors", tmp_path / "out", Changes(clip_skip=2))
    whole, skipped = load_pipeline(made / "folder"), load_pipeline(tmp_path / "out")
    tokens = whole.tokenizer("a red cat", padding="max_length", return_tensors="pt").input_ids
    states = whole.text_encoder(tokens, output_hidden_states=True)
    wanted = whole.text_encoder.final_layer_norm(states.hidden_states[-2])
    torch.testing.assert_close(skipped.encode_prompt("a red cat", "cpu", 1, False)[0], wanted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(states[0], wanted, atol=1e-3)
    for number in (0, 4):
        with pytest.raises(PocketfusionError, match=f"--clip-skip {number} is not from 1 to 3"):
            import_folder(made / "folder", tmp_path / "none", Changes(clip_skip=number))


@torch.no_grad()
def test_learnt_tokens_are_read_as_stock_diffusers_reads_them(made: Path, tmp_path: Path) -> None:
    torch.manual_seed(9)
    several, one, third = torch.randn(3, 64), torch.randn(64), torch.randn(2, 64)
    save_file({"emb_params": several}, tmp_path / "ink-style.safetensors")
    save_file({"<cat-toy>": one}, tmp_path / "learned_embeds.safetensors")
    save_file({"clip_l": third}, tmp_path / "pastel.safetensors")
    files = tuple(tmp_path / f"{name}.safetensors" for name in ("ink-style", "learned_embeds", "pastel"))
    found = import_folder(made / "folder", tmp_path / "out", Changes(embeddings=files))
    assert found.tokens == ["ink-style", "<cat-toy>", "pastel"]
    stock = StableDiffusionPipeline.from_pretrained(made / "folder")
    for token in found.tokens:
        value = {"ink-style": several, "<cat-toy>": one, "pastel": third}[token]
        stock.load_textual_inversion({"x": value} if value.ndim == 1 else {"emb_params": value}, token=token)
    prompt = "a ink-style picture of <cat-toy> in pastel"
    wanted = stock.encode_prompt(prompt, "cpu", 1, False)[0]
    for pipeline in (load_pipeline(tmp_path / "out"), StableDiffusionPipeline.from_pretrained(tmp_path / "out")):
        given = pipeline.encode_prompt(prompt, "cpu", 1, False)[0]
        torch.testing.assert_close(given, wanted, atol=2e-3, rtol=2e-3)  # the folder's weights are fp16
    save_file({"emb_params": torch.randn(2, 768)}, tmp_path / "wide.safetensors")
    with pytest.raises(PocketfusionError, match="its vectors are 768 wide, this one's 64"):
        import_folder(made / "folder", tmp_path / "none", Changes(embeddings=(tmp_path / "wide.safetensors",)))
    assert not (tmp_path / "none").exists()


def test_the_door_imports_a_file_once(made: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place = tmp_path / "place"
    place.mkdir()
    file, said = Path(shutil.copy(made / "file.safetensors", place / "my model.v2.safetensors")), list[str]()
    assert open_model(made / "folder", said.append) == made / "folder" and not said
    folder = open_model(file, said.append)
    assert folder == place / "my model.v2.pocketfusion" and said == [f"{file} was imported to {folder}"]
    load_pipeline(folder)
    before = (folder / "provenance.json").stat()
    assert open_model(file, said.append) == folder and said[1] == f"{file} is imported at {folder}"
    assert (folder / "provenance.json").stat().st_ino == before.st_ino
    with file.open("r+b") as opened:  # another model under the same name
        opened.seek(-2, 2)
        opened.write(b"\x11\x11")
    assert open_model(file, said.append) == folder and "was imported to" in said[2]
    assert (folder / "provenance.json").stat().st_ino != before.st_ino
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "mine.txt").write_text("what somebody keeps there")
    monkeypatch.setattr(door, "check_writable_parent", lambda path: None)
    elsewhere = open_model(file, said.append)
    assert elsewhere.parent == tmp_path / "cache" / "pocketfusion" / "imports" and (folder / "mine.txt").exists()
    assert open_model(file) == elsewhere


def test_commands_take_a_file(made: Path, tmp_path: Path, cli: Callable) -> None:
    file = shutil.copy(made / "file.safetensors", tmp_path / "tiny.safetensors")
    done = cli("info", file, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["name"] == "tiny.pocketfusion" and "was imported to" in done.stderr
    done = cli("prune", file, "-o", tmp_path / "pruned", "--ratio", "0.05")
    assert done.returncode == 0 and "is imported at" in done.stderr, done.stderr
    provenance = read_provenance(tmp_path / "pruned")
    assert provenance is not None and provenance.stage == "prune"
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    done = cli("import", tmp_path / "lora.safetensors", tmp_path / "out")
    assert done.returncode == 2 and "is a LoRA adapter, not a model" in done.stderr.replace("\n", " ")
    done = cli("import", file, tmp_path / "out", "--json", "--clip-skip", "3")
    assert done.returncode == 0 and json.loads(done.stdout)["family"] == "SD-1.x", done.stderr
    done = cli("import", tmp_path / "out")
    assert done.returncode == 2 and "give SOURCE and OUT: 1 paths are given" in done.stderr


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def hub_cache(root: Path, name: str, files: Path) -> None:
    """A repository in the Hub's cache as huggingface_hub lays it out: blobs, a snapshot of links, a ref."""
    place = root / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(COMMIT)
    (place / "blobs").mkdir()
    for number, file in enumerate(path for path in files.rglob("*") if path.is_file()):
        blob = place / "blobs" / f"{number:040x}"
        shutil.copyfile(file, blob)
        link = place / "snapshots" / COMMIT / file.relative_to(files)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)


def test_a_model_of_the_hub_is_taken_from_its_cache(made: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """No network here: the cache is made by hand."""
    files = shutil.copytree(made / "folder", tmp_path / "files")
    (files / "provenance.json").unlink()
    shutil.rmtree(files / "licences")
    (files / "README.md").write_text("---\nlicense: creativeml-openrail-m\n---\n")
    shutil.copy(made / "file.safetensors", files / "v1.safetensors")
    hub_cache(tmp_path / "hub", "somebody/model", files)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    file, folder = fetch("somebody/model/v1.safetensors"), fetch("somebody/model")
    assert {file.commit, folder.commit} == {COMMIT} and file.path == folder.path / "v1.safetensors"
    import_folder(folder.path, tmp_path / "out", Changes(), origin={"repository": "somebody/model", "commit": COMMIT})
    load_pipeline(tmp_path / "out")
    provenance = read_provenance(tmp_path / "out")
    assert provenance is not None and provenance.settings["source"]["commit"] == COMMIT
    licence = next((tmp_path / "out" / "licences").iterdir()).read_text()
    assert "SPDX-License-Identifier: LicenseRef-creativeml-openrail-m" in licence
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    for name, match in (
        ("nobody/nothing", "the cache has no copy: check the network"),
        ("somebody/model/v2.safetensors", "the cache has no copy"),
        ("nothing", "'nothing' is no model of the Hub: give OWNER/NAME"),
        ("a b/c d", "cannot be had from the Hub"),
    ):
        with pytest.raises(PocketfusionError, match=match):
            fetch(name)


def test_a_revision_is_of_the_hub(tmp_path: Path, cli: Any) -> None:
    done = cli("import", tmp_path / "a.safetensors", tmp_path / "out", "--revision", "v2")
    assert done.returncode == 2 and "give --from-hub with it" in done.stderr


def test_a_hub_that_does_not_answer_is_told_in_one_sentence(monkeypatch: Any, caplog: Any) -> None:
    logger, library = logging.getLogger("huggingface_hub.utils._http"), logging.getLogger("huggingface_hub")
    before = library.level

    def unanswered(*given: Any, **named: Any) -> None:
        logger.warning("Retrying in 8s [Retry 5/5].")
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(hub, "hf_hub_download", unanswered)
    library.addHandler(caplog.handler)  # the library's records go no further up
    try:
        with pytest.raises(
            PocketfusionError, match="x.safetensors cannot be had from the Hub: the Hub does not answer"
        ):
            fetch("somebody/model/x.safetensors")
    finally:
        library.removeHandler(caplog.handler)
    assert not caplog.records and library.level == before
