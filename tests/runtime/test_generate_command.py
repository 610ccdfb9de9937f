"""`pocketfusion generate`: what it writes, and that every mistake costs one sentence, code 2 and no file."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from pocketfusion.runtime.networks import Network


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def test_a_picture_with_its_settings_in_it(run, tiny_bundle, out):
    code, printed, notes = run(
        "generate",
        "a red 🍎",
        "-o",
        out / "a.png",
        "--bundle",
        tiny_bundle,
        "--steps",
        3,
        "--seed",
        7,
        "--guidance",
        2,
    )
    assert (code, notes) == (0, "")
    assert f"{out / 'a.png'}  64×64  seed 7" in printed and "3 steps" in printed
    image = Image.open(out / "a.png")
    assert image.size == (64, 64)
    assert image.text["prompt"] == "a red 🍎" and image.text["seed"] == "7" and image.text["guidance_scale"] == "2.0"
    assert [file.name for file in out.iterdir()] == ["a.png"]


def test_same_seed_same_bytes(run, tiny_bundle, out):
    for name in ("a.png", "b.png", "c.png"):
        seed = 2 if name == "c.png" else 1
        run("generate", "cat", "-o", out / name, "--bundle", tiny_bundle, "--steps", 2, "--seed", seed)
    assert (out / "a.png").read_bytes() == (out / "b.png").read_bytes() != (out / "c.png").read_bytes()


def test_another_sampler_is_written_down_and_draws_again(run, tiny_bundle, out):
    settings = ("cat", "--bundle", tiny_bundle, "--steps", 2, "--seed", 1)
    for name, sampler in (("a", "euler-ancestral"), ("b", "euler-ancestral"), ("c", "ddim")):
        file = out / f"{name}.png"
        code, _, notes = run("generate", *settings, "-o", file, "--json", out / f"{name}.json", "--sampler", sampler)
        assert (code, notes) == (0, "") and Image.open(file).text["sampler"] == sampler
        assert json.loads((out / f"{name}.json").read_text())["sampler"] == sampler
    assert (out / "a.png").read_bytes() == (out / "b.png").read_bytes() != (out / "c.png").read_bytes()


def test_an_eta_is_written_down_and_changes_the_picture(run, bundle, edit, out):
    edit(lambda m: m["scheduler"].update(eta=0.5))
    given = ("generate", "cat", "--bundle", bundle, "--seed", 1, "--steps", 3, "--sampler", "tcd", "-o")
    for name, eta in (("a", ("--eta", 0.5)), ("b", ()), ("c", ("--eta", 0))):
        code, _, notes = run(*given, out / f"{name}.png", "--json", out / f"{name}.json", *eta)
        assert (code, notes) == (0, "")
    assert (out / "a.png").read_bytes() == (out / "b.png").read_bytes() != (out / "c.png").read_bytes()
    assert Image.open(out / "b.png").text["eta"] == "0.5" and json.loads((out / "c.json").read_text())["eta"] == 0


def test_samplers_that_cannot_draw(run, bundle, edit, out):
    arguments = ("generate", "cat", "-o", out / "a.png", "--bundle", bundle, "--sampler")
    refused(run(*arguments, "heun"), out, "the sampler 'heun' is not known: choose ddim or euler or euler-ancestral")
    refused(run(*arguments, ""), out, "the sampler '' is not known")
    refused(run(*arguments, "lcm", "--steps", 51), out, "the number of steps is 51: choose 1 to 50 with lcm")
    refused(run(*arguments, "tcd", "--eta", 1.5), out, "eta is 1.5: choose 0 (no noise between the steps) to 1")
    refused(run(*arguments, "lcm", "--eta", 0.3), out, "eta is 0.3, but the sampler is lcm: it is of tcd")
    edit(lambda m: m.update(samplers=["ddim"]))
    refused(
        run(*arguments, "euler"), out, "'euler' has timesteps that this bundle's UNet was not taught: choose ddim\n"
    )


def test_count_previews_sheet_and_record(run, tiny_bundle, out):
    code, printed, _ = run(
        *("generate", "cat", "-o", out / "a.png", "--bundle", tiny_bundle, "--steps", 2, "--seed", 1, "--count", 3),
        *("--preview", out / "steps", "--json", out / "a.json", "--threads", 1, "--negative", "dog"),
    )
    assert code == 0
    assert sorted(file.name for file in out.iterdir()) == [
        *("a.json", "a_0.png", "a_1.png", "a_2.png", "a_sheet.png", "steps")
    ]
    assert all(str(out / name) in printed for name in ("a_0.png", "a_2.png", "a_sheet.png"))
    previews = sorted((out / "steps").iterdir())
    assert [file.name for file in previews] == [f"{i}_step_{k}.png" for i in range(3) for k in (1, 2)]
    for i in range(3):  # the last preview is the picture
        last, picture = Image.open(previews[2 * i + 1]), Image.open(out / f"a_{i}.png")
        assert (np.asarray(last) == np.asarray(picture)).all()
    record = json.loads((out / "a.json").read_text())
    assert record["seeds"] == [1, 2, 3] and record["negative_prompt"] == "dog" and record["threads"] == 1
    assert record["seconds"]["step"]["count"] == 6 and record["seconds"]["decode"]["count"] == 3
    assert record["seconds"]["step"]["min"] <= record["seconds"]["step"]["median"] <= record["seconds"]["step"]["max"]
    assert record["images"] == [str(out / f"a_{i}.png") for i in range(3)]
    assert len(record["bundle"]["sha256"]) == 64 and record["runtime"].startswith("ai-edge-litert ")
    assert record["peak_rss"] > 0 and record["cpu"] and record["image_size"] == [64, 64]


def test_a_seed_is_printed_when_none_is_given(run, tiny_bundle, out):
    _, printed, _ = run("generate", "cat", "-o", out / "a.png", "--bundle", tiny_bundle, "--steps", 1)
    seed = Image.open(out / "a.png").text["seed"]
    assert f"seed {seed}" in printed


def test_a_prompt_of_10000_words_is_cut_with_a_warning(run, tiny_bundle, out):
    code, _, notes = run("generate", "red " * 10_000, "-o", out / "a.png", "--bundle", tiny_bundle, "--steps", 1)
    assert code == 0 and notes.startswith("warning: the prompt has 10,000 tokens and 30 fit: it is cut at word 31")


@pytest.mark.parametrize("prompt", ["", "تفاحة حمراء", "[bold]", "\udcff"])
def test_unusual_prompts(run, tiny_bundle, out, prompt):
    code, _, _ = run("generate", prompt, "-o", out / "a.png", "--bundle", tiny_bundle, "--steps", 1)
    assert code == 0 and (out / "a.png").is_file()


def refused(result, out, *parts):
    code, printed, notes = result
    assert code == 2 and printed == ""
    assert notes.startswith("error: ") and notes.count("\n") == 1 and "Traceback" not in notes
    assert all(part in notes for part in parts), notes
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--steps", 0), "number of steps is 0: choose 1 to 1000"),
        (("--steps", 1001), "number of steps is 1001"),
        (("--guidance", "nan"), "guidance scale is nan"),
        (("--guidance", "inf"), "guidance scale is inf"),
        (("--count", 0), "number of pictures is 0"),
        (("--seed", -1), "seed is -1: choose 0 to"),
        (("--seed", 2**64), f"seed is {2**64}"),
        (("--threads", 0), "number of threads is 0"),
    ],
)
def test_settings_out_of_range(run, tiny_bundle, out, options, part):
    refused(run("generate", "cat", "-o", out / "a.png", "--bundle", tiny_bundle, *options), out, part)


def test_outputs_that_cannot_be_written(run, tiny_bundle, out):
    bundle = ("--bundle", tiny_bundle, "--steps", 1)
    refused(run("generate", "cat", "-o", out / "no" / "a.png", *bundle), out, f"{out / 'no'} does not exist")
    refused(run("generate", "cat", "-o", out / "a.jpg", *bundle), out, "ends in .png")
    refused(run("generate", "cat", "-o", "/proc/a.png", *bundle), out, "cannot write into /proc")
    good = ("-o", out / "a.png")
    refused(run("generate", "cat", *good, *bundle, "--json", out / "no" / "a.json"), out, "does not exist")
    refused(run("generate", "cat", *good, *bundle, "--json", out), out, f"{out} is a folder")
    refused(run("generate", "cat", *good, *bundle, "--preview", out / "no" / "steps"), out, "does not exist")
    refused(run("generate", "cat", *good, *bundle, "--preview", tiny_bundle / "bundle.json"), out, "is a file")
    (out.parent / "folder.png").mkdir()
    refused(run("generate", "cat", "-o", out.parent / "folder.png", *bundle), out, "folder.png is a folder")


def test_bundle_missing_and_altered(run, bundle, out):
    refused(run("generate", "cat", "-o", out / "a.png", "--bundle", out.parent / "no"), out, "there is no bundle at")
    refused(run("generate", "cat", "-o", out / "a.png", "--bundle", out.parent / "[no]"), out, "[no]")
    (bundle / "unet.tflite").write_bytes(b"x" * (bundle / "unet.tflite").stat().st_size)
    refused(run("generate", "cat", "-o", out / "a.png", "--bundle", bundle), out, "unet.tflite is altered")


def test_nan_out_of_a_network(run, tiny_bundle, out, monkeypatch):
    real, calls = Network.read, []

    def broken(self):
        output = real(self)
        if self.path.name == "unet.tflite":
            calls.append(1)
            output *= np.nan if len(calls) == 2 else 1
        return output

    monkeypatch.setattr(Network, "read", broken)
    result = run("generate", "cat", "-o", out / "a.png", "--bundle", tiny_bundle, "--steps", 3)
    refused(result, out, "the network produced NaN at step 2 of 3")
