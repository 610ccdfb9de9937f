"""The reference values, and docs/port.md: a program of that page's rules alone draws the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pocketfusion.artefact import sha256_file
from pocketfusion.port.vectors import INDEX, UNICODE, sampler_table, write_vectors
from pocketfusion.runtime.manifest import Bundle, embedded_bundle
from pocketfusion.runtime.pipeline import Pipeline
from pocketfusion.runtime.samplers.sampler import resolve_sampler
from pocketfusion.runtime.specs import SAMPLERS, most_steps

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("vectors") / "kit"
    write_vectors(embedded_bundle(), out)
    return out


def from_page(*arguments: object, prompts: list[str] | None = None) -> None:
    """Runs the page's program, which fails if it imports anything of ours."""
    script = HERE / "from_page.py"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    text = None if prompts is None else json.dumps(prompts)
    command = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(command, env=environment, input=text, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


def pixels(pipeline: Pipeline, prompt: str, seed: int, *asked: object) -> np.ndarray:
    sampler, steps = asked if asked else (None, None)
    result = pipeline.generate(prompt, seed=seed, sampler=sampler, num_inference_steps=steps)  # type: ignore[arg-type]
    return np.asarray(result.images[0])


@pytest.mark.parametrize(
    ("prompt", "seed", "asked"),
    [("a red apple, noto style", 3, ()), ("ΣΊΣΥΦΟΣ 苹果 🍎 crème", 2**32 - 1, ("euler-ancestral", 3))],
)
def test_the_embedded_bundle_from_the_page(
    embedded: Pipeline, prompt: str, seed: int, asked: tuple, tmp_path: Path
) -> None:
    from_page(embedded_bundle(), UNICODE, tmp_path / "a.npy", prompt, seed, *asked)
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), pixels(embedded, prompt, seed, *asked))


@pytest.mark.parametrize("form", ["outside", "single", "folded", "embedded"])
def test_every_form_from_the_page(form: str, forms: dict[str, Path], tmp_path: Path) -> None:
    """`outside` is how a `litert-gpu` export's UNet takes its time."""
    asked = ("euler", 4) if form == "single" else ("ddim", 3)
    from_page(forms[form], UNICODE, tmp_path / "a.npy", "a red cat", 11, *asked)
    np.testing.assert_array_equal(
        np.load(tmp_path / "a.npy"), pixels(Pipeline.load(forms[form], 1), "a red cat", 11, *asked)
    )


def test_tokens_from_the_page(tokenizers: list[tuple[Path, list[dict]]], tmp_path: Path) -> None:
    """WordPiece and byte pairs, with learnt tokens."""
    for folder, rows in tokenizers:
        from_page(folder, UNICODE, tmp_path / "ids.json", prompts=[row["prompt"] for row in rows[:400]])
        for row, ours in zip(rows, json.loads((tmp_path / "ids.json").read_text()), strict=False):
            assert ours == [row["ids"], row["count"]], (folder, row["prompt"])


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_from_the_page(name: str) -> None:
    from from_page import Schedule
    from vectors import specs

    for spec in specs():
        manifest = Bundle.open(embedded_bundle(), verify=False).manifest.model_copy(update={"scheduler": spec})
        sampler = resolve_sampler(manifest, name)
        for steps in (1, 2, 8, 20, 48):
            if steps > most_steps(name, spec):
                continue
            wanted = sampler_table(sampler, steps)
            ours = Schedule(
                {**spec.model_dump(), "eta": spec.eta, "final_sigmas_type": spec.final_sigmas_type}, name, steps
            )
            assert ours.timesteps == wanted["timesteps"] and ours.scale == pytest.approx(
                wanted["initial_scale"], rel=1e-14
            )
            for key, theirs in (
                ("noise", "noise"),
                ("before", "previous_x_0"),
                ("alpha", "alpha"),
                ("sigma", "sigma"),
            ):
                assert [row[key] for row in ours.rows] == pytest.approx(wanted[theirs], rel=1e-10, abs=1e-13)
            assert [[row["a"], row["b"]] for row in ours.rows] == [pytest.approx(ab, rel=1e-10) for ab in wanted["ab"]]


def test_the_kit_holds_together(kit: Path, embedded: Pipeline) -> None:
    index, manifest = json.loads((kit / INDEX).read_text()), Bundle.open(embedded_bundle(), verify=False).manifest
    assert index["bundle"]["name"] == manifest.name and index["made_by"]["threads"] == 1
    prompt = index["picture"]["prompt"]
    np.testing.assert_array_equal(np.load(kit / "pixels.npy"), pixels(embedded, prompt, 0))
    tokens = json.loads((kit / "tokens.json").read_text())
    assert len({row["prompt"] for row in tokens}) == 50
    for row in tokens:
        assert sum(embedded.tokenizer.encode(row["prompt"]).attention_mask[0]) == row["count"]
    # each network's calls, and how they follow from each other
    latents, noise = np.load(kit / "latents.npy"), np.load(kit / "noise_0.npy")
    unet = {name: np.load(kit / file) for name, file in index["networks"]["unet"].items()}
    np.testing.assert_array_equal(unet["sample"][0], np.stack([noise[0]] * 2))
    np.testing.assert_array_equal(unet["sample"][1:, 0], latents[:-1])
    np.testing.assert_array_equal(np.load(kit / "decoder.latents.npy")[0, 0], latents[-1])
    states = np.load(kit / "text_encoder.prompt_embeds.npy")
    np.testing.assert_array_equal(unet["encoder_hidden_states"][0, 1], states[0, 0])
    tables = json.loads((kit / index["samplers"]).read_text())
    assert {table["sampler"] for table in tables} == set(SAMPLERS)
    own = next(t for t in tables if (t["sampler"], t["steps"]) == ("ddim", len(latents)))
    a, b = own["ab"][0]
    scale = np.float32(index["picture"]["guidance_scale"])
    row = unet["noise_pred"][0]
    guided = row[0] + scale * (row[1] - row[0])
    np.testing.assert_allclose(np.float32(a) * noise[0] + np.float32(b) * guided, latents[0], atol=1e-5)


def test_time_embeddings_are_in_the_kit(forms: dict[str, Path], tmp_path: Path) -> None:
    write_vectors(forms["outside"], tmp_path / "kit", prompt="ä")
    tables = json.loads((tmp_path / "kit" / "samplers.json").read_text())
    index = json.loads((tmp_path / "kit" / INDEX).read_text())
    used = np.load(tmp_path / "kit" / index["networks"]["unet"]["timestep_embedding"])
    own = next(t for t in tables if (t["sampler"], t["steps"]) == ("ddim", len(used)))
    np.testing.assert_array_equal(np.array(own["timestep_embedding"], np.float32), used[:, 0])
    assert index["picture"]["prompt"] == "ä"


def test_refusals(run, kit: Path, tmp_path: Path, tiny_bundle: Path) -> None:
    def refused(*arguments: object) -> str:
        code, _, err = run("vectors", *arguments)
        assert code == 2 and "Traceback" not in err, err
        return " ".join(err.split())

    other = tmp_path / "other"
    shutil.copytree(tiny_bundle, other)
    manifest = json.loads((other / "bundle.json").read_text())
    (other / "bundle.json").write_text(json.dumps(manifest | {"target": "of-tomorrow"}))
    said = refused(other, tmp_path / "new")
    assert "is a bundle for 'of-tomorrow'" in said and "export" in said
    del manifest["scheduler"]
    (other / "bundle.json").write_text(json.dumps(manifest))
    assert "scheduler: Field required" in refused(other, tmp_path / "new")
    before = sha256_file(kit / INDEX)
    assert "exists already" in refused(tiny_bundle, kit)
    assert "holds no vectors: it is not replaced" in refused(tiny_bundle, other, "--overwrite")
    assert "number of threads is 0" in refused(tiny_bundle, tmp_path / "new", "--threads", "0")
    assert sha256_file(kit / INDEX) == before and not (tmp_path / "new").exists()
    assert run("vectors", tiny_bundle, kit, "--overwrite")[0] == 0
    assert sha256_file(kit / INDEX) != before


@pytest.mark.slow  # a minute: it asks `tokenizers` of every code point
def test_the_tables_are_those_of_tokenizers() -> None:
    from unicode_data import FILE, written

    assert FILE.read_text() == written()
