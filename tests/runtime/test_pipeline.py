"""From prompt to picture: the same as stock diffusers, repeatable, cancellable, and loud when a network fails."""

from __future__ import annotations

import io
import threading

import numpy as np
import pytest
from PIL import Image

import pocketfusion
from pocketfusion.errors import PocketfusionError
from pocketfusion.runtime.networks import Network
from pocketfusion.runtime.pipeline import MAX_SEED, Cancelled, Pipeline


@pytest.fixture(scope="module")
def pipeline(tiny_bundle) -> Pipeline:
    return pocketfusion.load(tiny_bundle, num_threads=1)


def pixels(image) -> np.ndarray:
    return np.asarray(image, np.float32)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(np.mean((a - b) ** 2), 1e-9)))


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_draws_what_stock_diffusers_draws(pipeline, tiny_folder, guidance_scale):
    import torch

    from pocketfusion.models.loading import load_pipeline

    latents = pipeline.noise(3)
    settings = {"num_inference_steps": 6, "guidance_scale": guidance_scale, "negative_prompt": "a blue cat"}
    stock = load_pipeline(tiny_folder)
    expected = stock("a red apple", latents=torch.from_numpy(latents.transpose(0, 3, 1, 2)), **settings).images[0]
    ours = pipeline.generate("a red apple", latents=latents, **settings).images[0]
    other = pipeline.generate("a red apple", latents=pipeline.noise(4), **settings).images[0]
    assert psnr(pixels(ours), pixels(expected)) > 40 > 30 > psnr(pixels(other), pixels(expected))


def test_guidance_prompt_and_negative_prompt_all_matter(pipeline):
    draw = lambda prompt="cat", **settings: pixels(  # noqa: E731
        pipeline.generate(prompt, seed=0, num_inference_steps=3, **settings).images[0]
    )
    base = draw(guidance_scale=4)
    assert (base != draw(guidance_scale=1)).any()
    assert (base != draw("dog", guidance_scale=4)).any()
    assert (base != draw(guidance_scale=4, negative_prompt="dog")).any()
    # a prompt against itself leaves nothing to guide by
    np.testing.assert_allclose(draw(guidance_scale=9, negative_prompt="cat"), draw(guidance_scale=1), atol=1)


def test_same_seed_same_pixels_and_picture_i_takes_seed_plus_i(pipeline):
    three = pipeline.generate("a red apple", seed=5, num_images=3, num_inference_steps=3)
    assert three.seeds == [5, 6, 7]
    again = pipeline.generate("a red apple", seed=6, num_inference_steps=3)
    assert (pixels(again.images[0]) == pixels(three.images[1])).all()
    assert (pixels(again.images[0]) != pixels(three.images[0])).any()


def test_a_seed_is_chosen_and_told_when_none_is_given(pipeline):
    first, second = (pipeline.generate("cat", num_inference_steps=2) for _ in range(2))
    assert first.seeds != second.seeds
    again = pipeline.generate("cat", seed=first.seeds[0], num_inference_steps=2)
    assert (pixels(again.images[0]) == pixels(first.images[0])).all()


def test_noise_is_standard_normal_and_golden(pipeline):
    noise = np.concatenate([pipeline.noise(seed) for seed in range(100)])
    assert noise.dtype == np.float32 and noise.shape == (100, 8, 8, 4)
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03
    # the first draws of numpy's PCG64(0), so that a seed keeps its picture from release to release
    np.testing.assert_allclose(pipeline.noise(0).flat[:3], [1.117622, -1.387125, -0.426572], atol=1e-6)


def test_result_tells_settings_times_and_memory(pipeline):
    result = pipeline.generate("", num_images=2)
    assert result.num_inference_steps == pipeline.manifest.defaults.num_inference_steps
    assert result.guidance_scale == pipeline.manifest.defaults.guidance_scale
    times = result.timings
    assert len(times.steps) == 2 * result.num_inference_steps and len(times.decode) == 2
    assert times.load > 0 and times.text > 0
    assert sum(times.steps) + sum(times.decode) + times.text <= times.total
    assert result.peak_rss > 10 << 20
    assert [image.size for image in result.images] == [(64, 64)] * 2
    assert result.warnings == []


def test_a_cut_prompt_warns(pipeline):
    assert "10,000 tokens" in pipeline.generate("red " * 10_000, num_inference_steps=1).warnings[0]


@pytest.mark.parametrize("prompt", ["", "🍎", "تفاحة", "\ud83c", "ตัวอักษร"])
def test_any_prompt_draws(pipeline, prompt):
    pipeline.generate(prompt, num_inference_steps=1).prompt.encode()


def encoder_states(pipeline: Pipeline, text: str) -> np.ndarray:
    tokens = pipeline.tokenizer.encode(text)
    with pipeline._networks.use("text_encoder") as encoder:
        return encoder(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)


@pytest.mark.parametrize("settings", [{"num_threads": 1}, {"num_threads": 2}, {"mode": "sequential"}])
@pytest.mark.parametrize("folder", ["tiny", "embedded"])  # float32, and int8
def test_the_empty_prompts_states_are_the_encoders_to_the_bit(tiny_bundle, folder, settings):
    pipeline = pocketfusion.load(tiny_bundle if folder == "tiny" else None, **settings)
    kept = pipeline.bundle.empty_prompt_embeds()
    assert kept is not None and kept.dtype == np.float32
    assert np.array_equal(kept, encoder_states(pipeline, ""))
    assert np.array_equal(pipeline.encode(" "), kept)  # what is tokenized alike is encoded alike
    assert np.array_equal(pipeline.encode("cat"), encoder_states(pipeline, "cat"))
    assert not np.array_equal(pipeline.encode("cat"), kept)


def test_a_picture_is_one_text_call_and_in_an_older_bundle_two(tiny_bundle, bundle, edit, monkeypatch):
    edit(lambda manifest: (bundle / manifest["files"].pop("empty_prompt_embeds")["path"]).unlink())
    calls, run = [], Network.run
    monkeypatch.setattr(Network, "run", lambda network: (calls.append(network.path.stem), run(network)))
    pictures = []
    for path, negative, count in ((tiny_bundle, "", 1), (bundle, "", 2), (tiny_bundle, "dog", 2)):
        pipeline = pocketfusion.load(path, num_threads=1)
        calls.clear()
        pictures.append(pipeline.generate("cat", negative_prompt=negative, seed=1, num_inference_steps=2).images[0])
        assert calls.count("text_encoder") == count
    assert pictures[0].tobytes() == pictures[1].tobytes() != pictures[2].tobytes()


def test_kept_states_that_are_not_finite_are_refused(bundle, sign):
    file = bundle / "empty_prompt.f32"
    values = np.frombuffer(file.read_bytes(), "<f4").copy()
    values[5] = np.nan
    file.write_bytes(values.tobytes())
    with pytest.raises(PocketfusionError, match=r"empty_prompt\.f32 is altered: its SHA-256 differs"):
        pocketfusion.load(bundle)
    sign("empty_prompt_embeds")
    with pytest.raises(PocketfusionError, match=r"empty_prompt\.f32 holds NaN or infinity"):
        pocketfusion.load(bundle)


def test_callback_sees_each_step_and_its_latents_decode_to_the_picture(pipeline):
    seen = []
    result = pipeline.generate(
        "cat", seed=1, num_images=2, num_inference_steps=3, callback=lambda *step: seen.append(step)
    )
    assert [(step, t) for step, t, _ in seen] == [(0, 999), (1, 666), (2, 332)] * 2
    for (_, _, latents), image in zip(seen[2::3], result.images, strict=True):
        assert latents.shape == (1, 8, 8, 4)
        assert (pixels(pipeline.decode(latents)) == pixels(image)).all()


def test_callback_cancels_by_false_or_by_raising(pipeline):
    calls = []

    def stop(step, timestep, latents):
        calls.append(step)
        return step < 1

    with pytest.raises(Cancelled, match="step 2 of 5"):
        pipeline.generate("cat", num_inference_steps=5, callback=stop)
    assert calls == [0, 1]

    def fail(step, timestep, latents):
        raise Cancelled("enough")

    with pytest.raises(Cancelled, match="enough"):
        pipeline.generate("cat", num_inference_steps=5, callback=fail)
    pipeline.generate("cat", num_inference_steps=1)  # and the pipeline still works


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"num_inference_steps": 0}, "number of steps is 0: choose 1 to 1000"),
        ({"num_inference_steps": 1001}, "number of steps is 1001"),
        ({"guidance_scale": float("nan")}, "guidance scale is nan"),
        ({"guidance_scale": float("-inf")}, "guidance scale is -inf"),
        ({"num_images": 0}, "number of pictures is 0"),
        ({"num_images": 1001}, "number of pictures is 1001"),
        ({"seed": -1}, "seed is -1: choose 0 to"),
        ({"seed": MAX_SEED + 1}, f"choose 0 to {MAX_SEED}"),
        ({"seed": MAX_SEED, "num_images": 2}, f"choose 0 to {MAX_SEED - 1}"),
        ({"latents": np.zeros((1, 4, 8, 8), np.float32)}, r"latents are \[1, 4, 8, 8\].*\[1, 8, 8, 4\]"),
        ({"latents": np.full((1, 8, 8, 4), np.nan, np.float32)}, "finite numbers"),
        ({"guidance_scale": 1e300}, "produced infinity at step 1 of .*guidance is too high"),
    ],
)
def test_settings_out_of_range(pipeline, settings, match):
    with pytest.raises(PocketfusionError, match=match):
        pipeline.generate("cat", **settings)


def test_a_callback_may_look_and_not_draw(pipeline):
    alone = pipeline.generate("a red apple", seed=3, num_inference_steps=3).images[0]
    seen = []

    def callback(step, timestep, latents):
        with pytest.raises(PocketfusionError, match="a callback can neither draw with it nor close it: load a second"):
            pipeline.generate("a blue cat", seed=4, num_inference_steps=1)
        with pytest.raises(PocketfusionError, match="a callback can neither draw"):
            pipeline.close()
        seen.append(pipeline.decode(latents))
        pipeline.encode("something else")

    drawn = pipeline.generate("a red apple", seed=3, num_inference_steps=3, callback=callback).images[0]
    assert (pixels(drawn) == pixels(alone)).all() and (pixels(seen[-1]) == pixels(alone)).all() and len(seen) == 3


def test_other_threads_are_refused_and_harm_nothing(pipeline):
    alone = pipeline.generate("a red apple", seed=3, num_inference_steps=3).images[0]
    inside, go_on, drawn = threading.Event(), threading.Event(), []

    def callback(step, timestep, latents):
        inside.set()
        assert go_on.wait(60)

    def draw():
        drawn.append(pipeline.generate("a red apple", seed=3, num_inference_steps=3, callback=callback).images[0])

    thread = threading.Thread(target=draw)
    thread.start()
    assert inside.wait(60)
    for call in (
        lambda: pipeline.generate("a blue cat", seed=4),
        lambda: pipeline.decode(pipeline.noise(1)),
        lambda: pipeline.encode("a blue cat"),
        pipeline.close,
    ):
        with pytest.raises(PocketfusionError, match="at work in another thread: wait for its end, or load a pipeline"):
            call()
    go_on.set()
    thread.join()
    assert (pixels(drawn[0]) == pixels(alone)).all()
    assert (pixels(pipeline.generate("a red apple", seed=3, num_inference_steps=3).images[0]) == pixels(alone)).all()


def test_after_a_failure_it_draws_again(pipeline):
    def callback(step, timestep, latents):
        raise Cancelled("enough")

    with pytest.raises(Cancelled):
        pipeline.generate("cat", seed=1, num_inference_steps=2, callback=callback)
    assert pipeline.generate("cat", seed=1, num_inference_steps=2).images


def test_threads_below_one(tiny_bundle):
    with pytest.raises(PocketfusionError, match="number of threads is 0"):
        pocketfusion.load(tiny_bundle, num_threads=0)


@pytest.mark.parametrize(
    ("network", "match"),
    [
        ("text_encoder", "text encoder produced NaN"),
        ("unet", r"unet.tflite: the network produced NaN at step 3 of 5 \(timestep 599\)"),
        ("decoder", "decoder produced NaN"),
    ],
)
def test_nan_out_of_a_network(pipeline, monkeypatch, network, match):
    real, calls = Network.read, []

    def broken(self):
        output = real(self)
        if self.path.stem == network:
            calls.append(1)
            if len(calls) >= (3 if network == "unet" else 1):
                output.flat[0] = np.nan
        return output

    monkeypatch.setattr(Network, "read", broken)
    with pytest.raises(PocketfusionError, match=match):
        pipeline.generate("cat", num_inference_steps=5)


def test_a_callback_cannot_change_the_latents_under_the_sampler(pipeline):
    def callback(step, timestep, latents):
        with pytest.raises(ValueError, match="read-only"):
            latents[:] = 0

    pipeline.generate("a red apple", seed=3, num_inference_steps=2, callback=callback)


@pytest.mark.parametrize("mode", ["resident", "pipelined"])
def test_a_closed_pipeline_says_so(tiny_bundle, mode):
    with pocketfusion.load(tiny_bundle, num_threads=1, mode=mode) as pipeline:
        pipeline.generate("a red apple", num_inference_steps=1)
    with pytest.raises(PocketfusionError, match="this pipeline is closed: load another to draw with"):
        pipeline.generate("a cat")
    with pytest.raises(PocketfusionError, match="this pipeline is closed"):
        pipeline.encode("a cat")
    pipeline.close()


def test_a_notebook_shows_the_pictures(pipeline):
    one = pipeline.generate("a red apple", seed=3, num_inference_steps=2)
    shown = Image.open(io.BytesIO(one._repr_png_()))
    assert (pixels(shown) == pixels(one.images[0])).all()
    assert repr(one).startswith("<GenerationResult: 1 of 'a red apple', ") and "seeds 3, " in repr(one)
    two = pipeline.generate("a red apple", seed=3, num_inference_steps=2, num_images=2)
    assert Image.open(io.BytesIO(two._repr_png_())).width > 2 * one.images[0].width and "seeds 3 to 4" in repr(two)
    assert repr(pipeline).startswith("<Pipeline ") and "1 thread" in repr(pipeline)
