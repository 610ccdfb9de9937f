"""What Python computes of what the browser's engine computes as well: made when the tests run, never committed."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pocketfusion.errors import PocketfusionError
from pocketfusion.port.vectors import odd_prompts, sampler_table, token_rows
from pocketfusion.runtime.denoise import guidance_embedding, timestep_embedding
from pocketfusion.runtime.manifest import TokenizerSpec, embedded_bundle
from pocketfusion.runtime.samplers.sampler import Sampler
from pocketfusion.runtime.specs import SAMPLERS, SchedulerSpec, TimeEmbedding, most_steps
from pocketfusion.runtime.tiles import starts
from pocketfusion.runtime.tokenizer import PromptTokenizer


def tokenizer_files(folder: Path) -> list[tuple[Path, TokenizerSpec]]:
    """The embedded bundle's tokenizer, CLIP's and ones with learnt tokens."""
    embedded = embedded_bundle() / "tokenizer.json"
    return [(embedded, TokenizerSpec(max_length=32, pad_token="[PAD]", pad_token_id=0)), *_clip(folder)]


def tokenizers(folder: Path) -> list[dict[str, Any]]:
    """Of each of them, ids, masks and warnings of odd prompts."""
    return [
        {
            "file": str(file),
            "spec": spec.model_dump(),
            "expected": token_rows(PromptTokenizer(file, spec), odd_prompts(2000)),
        }
        for file, spec in tokenizer_files(folder)
    ]


def _clip(folder: Path) -> list[tuple[Path, TokenizerSpec]]:
    """CLIP's tokenizer as export writes it, with learnt tokens: the real vocabulary where open_clip is installed."""
    from pocketfusion.models.learnt_tokens import spell_out
    from tiny import tiny_tokenizer
    from tiny_clip import clip_tokenizer

    made = []
    for name, tokenizer in (("clip", _real_clip() or clip_tokenizer()), ("tiny", tiny_tokenizer())):
        tokenizer.add_tokens(["<toy>", "<toy>_1", "<toy>_2", "<other>"])
        spell_out(tokenizer)
        backend = tokenizer.backend_tokenizer
        backend.no_padding()
        backend.no_truncation()
        file = folder / f"{name}.json"
        backend.save(str(file))
        length = min(tokenizer.model_max_length, 77)
        made.append(
            (
                file,
                TokenizerSpec(
                    max_length=length, pad_token=tokenizer.pad_token, pad_token_id=int(tokenizer.pad_token_id)
                ),
            )
        )
    return made


def _real_clip() -> Any:
    import gzip
    import importlib.util

    from transformers import CLIPTokenizer

    found = importlib.util.find_spec("open_clip")
    if found is None or found.origin is None:
        return None
    packed = Path(found.origin).with_name("bpe_simple_vocab_16e6.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    pieces = [*letters, *(c + "</w>" for c in letters), *("".join(m) for m in merges)]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def noise() -> dict[str, list[int]]:
    """By seed: the bits of the first numbers, of 72 seeds up to 2^160."""
    chance = random.Random(3)
    seeds = [0, 1, 2**32 - 1, 2**32, 2**64 - 1, 2**64, 2**96, 2**127, 2**128, 2**129 + 5, 2**160 - 1, 2**160]
    seeds += [chance.getrandbits(chance.choice([8, 16, 31, 32, 33, 64, 100, 128, 160])) for _ in range(60)]
    bits = {}
    for seed in seeds:
        generator = np.random.Generator(np.random.PCG64(seed))
        drawn = [generator.standard_normal(n, np.float32) for n in (4096, 1)]  # an odd count leaves half a word
        bits[str(seed)] = np.concatenate(drawn).view(np.uint32).tolist()
    return bits


def specs() -> list[SchedulerSpec]:
    """A schedule of every spacing, prediction and end, one of few timesteps, and other etas."""
    made = []
    for spacing, prediction in itertools.product(("leading", "trailing", "linspace"), ("epsilon", "v_prediction")):
        for final, one in (("zero", True), ("sigma_min", False)):
            made.append(
                SchedulerSpec(
                    num_train_timesteps=1000,
                    beta_start=0.00085,
                    beta_end=0.012,
                    beta_schedule="scaled_linear",
                    prediction_type=prediction,  # type: ignore[arg-type]
                    timestep_spacing=spacing,  # type: ignore[arg-type]
                    steps_offset=1,
                    set_alpha_to_one=one,
                    final_sigmas_type=final,  # type: ignore[arg-type]
                )
            )
    small = made[0].model_copy(
        update={"num_train_timesteps": 37, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    )
    return [*made, small, made[0].model_copy(update={"eta": 0.0}), made[1].model_copy(update={"eta": 0.85})]


def samplers() -> list[dict[str, Any]]:
    """Every sampler and schedule: timesteps of all counts of steps (one spec a spacing), and whole runs of some."""
    cases = []
    for number, spec in enumerate(specs()):
        ends = {"final_sigmas_type": spec.final_sigmas_type, "eta": spec.eta}  # defaults are not dumped
        for name in SAMPLERS:
            sampler, most = Sampler(name, spec), most_steps(name, spec)
            counts = list(range(1, most + 1)) if number in (0, 4, 8) else [1, 2, 4, 8, 25, most]
            counts = [n for n in counts if n <= most and (n < 64 or n == most)]
            timesteps = {str(n): sampler.set_timesteps(n).tolist() for n in counts}
            runs = [_run(sampler, n) for n in (1, 2, 4, 8, 20) if n <= most]
            cases.append({"name": name, "spec": {**spec.model_dump(), **ends}, "timesteps": timesteps, "runs": runs})
    return cases  # fmt: skip


def _run(sampler: Sampler, steps: int) -> dict[str, Any]:
    """Latents after each step for outputs that depend on them, as a network's do, in float32."""
    table = sampler_table(sampler, steps)
    chance = np.random.Generator(np.random.PCG64(steps))
    first, fresh = chance.standard_normal((2, 24), np.float32)
    latents, after = sampler.start(first), []
    for k in range(steps):
        output = (latents * np.float32(0.5) + np.float32(0.25)).astype(np.float32)
        latents = sampler.step(output, k, latents, lambda: fresh)
        after.append(latents.tolist())
    return {**table, "first": first.tolist(), "fresh": fresh.tolist(), "after": after}


def embeddings() -> dict[str, Any]:
    """Time and guidance embeddings."""
    times = []
    for dim, flip, shift in ((8, True, 0.0), (320, True, 0.0), (128, False, 1.0), (5, True, 0.5)):
        spec = TimeEmbedding(dim=dim, flip_sin_to_cos=flip, downscale_freq_shift=shift)
        values = {str(t): timestep_embedding(t, spec)[0].tolist() for t in (0.0, 1.0, 333.25, 500.0, 999.0)}
        times.append({"spec": spec.model_dump(), "values": values})
    asked = [(scale, dim) for scale in (1.0, 6.0, 7.5) for dim in (9, 256)]
    scales = [[scale, dim, guidance_embedding(scale, dim)[0].tolist()] for scale, dim in asked]
    return {"times": times, "scales": scales}


class _MadeUp:
    """Stands for a UNet of a manifest: a sum of its inputs in double precision, as the engine's test has it."""

    def __init__(self, spec: Any) -> None:
        self.spec, self.values = spec, dict[str, np.ndarray]()

    def write(self, **inputs: np.ndarray) -> None:
        self.values.update({name: np.asarray(values, np.float64) for name, values in inputs.items()})

    def feed_back(self, name: str) -> None:
        self.values[name] = self.result.astype(np.float64)

    def run(self) -> None:
        given = self.values
        added = 0.1 * given["encoder_hidden_states"].mean((1, 2))
        time = given.get("timestep_embedding")
        added = added + (0.001 * given["timestep"] if time is None else 0.05 * time.mean(1))
        if "timestep_cond" in given:
            added = added + 0.2 * given["timestep_cond"].mean(1)
        prediction = 0.3 * given["sample"] + added[:, None, None, None]
        if "step_coefficients" in given:
            scale, a, b = given["step_coefficients"][0]
            both = prediction if len(prediction) == 2 else np.concatenate([prediction] * 2)
            prediction = a * given["sample"] + b * (both[:1] + scale * (both[1:] - both[:1]))
        self.result = prediction.astype(np.float32)

    def read(self) -> np.ndarray:
        return self.result.copy()


def denoising() -> list[dict[str, Any]]:
    """Whole pictures' latents by every kind of guidance and form of UNet, of a made-up one."""
    from pocketfusion.runtime.denoise import Denoiser, NoiseStream
    from pocketfusion.runtime.manifest import Manifest
    from pocketfusion.runtime.samplers.sampler import resolve_sampler

    good = json.loads((embedded_bundle() / "bundle.json").read_text())
    cases = []
    for form, rows, extra, more in (
        ("two rows", 2, {}, {}),
        ("two calls", 1, {}, {}),
        ("time outside", 2, {"timestep_embedding": [2, 16]}, {"time_embedding": {"dim": 16}}),
        ("embedded", 1, {"timestep_cond": [1, 16]}, {"guidance": "embedded"}),
        ("folded guidance", 1, {}, {"guidance": "folded"}),
        ("step in the graph", 2, {"step_coefficients": [1, 3]}, {}),
    ):
        values = json.loads(json.dumps(good))
        one = 1 if "step_coefficients" in extra else rows
        time = {} if "timestep_embedding" in extra else {"timestep": [rows]}
        shapes = {"sample": [one, 8, 8, 16], **time, "encoder_hidden_states": [rows, 32, 384], **extra}
        unet = values["networks"]["unet"]
        unet["inputs"] = [{"name": n, "shape": s, "dtype": "float32"} for n, s in shapes.items()]
        unet["outputs"][0]["shape"] = [one, 8, 8, 16]
        manifest = Manifest.model_validate(values | more)
        chance = np.random.Generator(np.random.PCG64(5))
        count = 2 if manifest.guidance == "classifier-free" else 1
        states = np.repeat(chance.standard_normal((count, 32, 1), np.float32), 384, axis=2)
        for sampler, scale in ((None, 6.0), ("euler-ancestral", 6.0), ("lcm", 1.0), ("tcd", 0.5), ("ddim", 0.0)):
            chosen = resolve_sampler(manifest, sampler)
            chosen.set_timesteps(4)
            denoiser = Denoiser(_MadeUp(manifest.networks.unet), manifest, chosen, states, scale)  # type: ignore[arg-type]
            stream = NoiseStream(7, 8, 8, 16)
            denoiser.start(stream.draw()[None], stream)
            latents = [denoiser.step(k).ravel()[::61].tolist() for k in range(4)]
            about = {"form": form, "sampler": chosen.name, "scale": scale, "states": states[:, :, 0].tolist()}
            cases.append({**about, "manifest": values | more, "latents": latents})
    return cases


def previews() -> dict[str, Any]:
    """A linear preview and the decoder's pixels: levels at and around every rounding."""
    from pocketfusion.runtime.specs import LinearPreview

    chance = np.random.Generator(np.random.PCG64(9))
    matrix, bias = chance.normal(0, 0.4, (16, 3)), chance.normal(0, 0.2, 3)
    preview = LinearPreview(matrix=matrix.tolist(), bias=bias.tolist(), psnr_db=20, r2=0.9)
    latents = chance.standard_normal((1, 8, 8, 16), np.float32)
    levels = np.concatenate([np.arange(-3, 515, dtype=np.float32) / 255 - 1, chance.normal(0, 1, 1000)])
    pixels = np.round(np.clip(levels.astype(np.float32) / 2 + 0.5, 0, 1) * 255).astype(np.uint8)
    picture = np.asarray(preview.image(latents, (8, 8))).tolist()
    about = {"matrix": preview.matrix, "bias": preview.bias, "latents": latents.ravel().tolist(), "picture": picture}
    return {**about, "levels": levels.astype(np.float32).tolist(), "pixels": pixels.tolist()}


def tiles() -> list[list[Any]]:
    return [[length, tile, starts(length, tile)] for tile in (1, 3, 8, 16, 64) for length in range(tile, 150, 7)]


def picture(folder: Path) -> dict[str, Any]:
    """A PNG of Pillow's with settings as `generate` writes them, and a plain one."""
    pixels = np.random.Generator(np.random.PCG64(1)).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    settings = {
        "prompt": 'a "red" apple, ΣΊΣΥΦΟΣ 苹果 🍎\nnoto style',
        "negative_prompt": "",
        "seed": 4294967295,
        "num_inference_steps": 8,
        "guidance_scale": 6.0,
        "sampler": "dpmpp-2m-karras",
        "bundle": "emoji64 " + "0" * 64,
        "Software": "pocketfusion 0.1.0",
    }
    info = PngInfo()
    for key, value in settings.items():
        info.add_itxt(key, str(value))
    Image.fromarray(pixels).save(folder / "pillow.png", pnginfo=info)
    Image.fromarray(pixels).save(folder / "plain.png")
    return {"settings": settings, "pixels": pixels.tolist()}


def check_ours(folder: Path, expected: dict[str, Any]) -> None:
    """The PNG that the engine wrote of the same picture, as Pillow reads it."""
    with Image.open(folder / "ours.png") as image:
        image.load()
        assert image.mode == "RGB"
        assert np.asarray(image).tolist() == expected["pixels"]
        assert image.text == {key: str(value) for key, value in expected["settings"].items()}  # type: ignore[attr-defined]


def manifests() -> list[dict[str, Any]]:
    """Manifests that Python refuses, by one change each, beside the good one; and whether Python does."""
    from pocketfusion.runtime.manifest import Manifest

    good = json.loads((embedded_bundle() / "bundle.json").read_text())
    changes: list[tuple[str, Any]] = [
        ("name", "x" * 2001), ("surplus", 1), ("files.unet.path", "../unet.tflite"),
        ("files.unet.path", "/unet.tflite"), ("files.unet.path", "a\\b"), ("files.unet.path", "c:unet"),
        ("files.unet.path", "a\nb"), ("files.unet.sha256", "0"),
        ("files.unet.size", -1), ("files.tokenizer", None), ("files.empty_prompt_embeds.size", 4),
        ("latents.height", 9), ("latents.channels", 4), ("image.width", 63), ("networks.unet.outputs", []),
        ("networks.unet.inputs.0.shape", [2, 8, 8, 4]), ("networks.unet.inputs.1.name", "time"),
        ("networks.unet.inputs.1.dtype", "int32"), ("networks.text_encoder.outputs.0.shape", [1, 31, 384]),
        ("networks.decoder.inputs.0.shape", [1, 16, 16, 16]), ("networks.unet.weights", "int2"),
        ("tokenizer.max_length", 0), ("scheduler.beta_end", 1), ("scheduler.steps_offset", 1000),
        ("scheduler.timestep_spacing", "karras"), ("scheduler.num_train_timesteps", 0), ("sampler", "plms"),
        ("samplers", ["euler"]), ("defaults.num_inference_steps", 1001), ("defaults.guidance_scale", 1e9),
        ("guidance", "embedded"), ("guidance", "folded"), ("guidance_range", [7, 3]), ("time_embedding", {"dim": 320}),
        ("target", "coreml"), ("licences", [{"what": "x"}]), ("sampler", "euler"), ("samplers", ["ddim", "lcm"]),
        ("target", "litert-gpu"), ("defaults.num_inference_steps", 1000), ("scheduler.final_sigmas_type", "sigma_min"),
        ("networks.unet.gpu_precision", "fp32"), ("scheduler.beta_start", 0.99999),
        ("files.selfcheck", {"path": "s.f32", "sha256": "0" * 64, "size": 4 * (2 * 8 * 8 * 16 + 3 * 8 * 8)}),
        ("files.selfcheck", {"path": "s.f32", "sha256": "0" * 64, "size": 4 * 2 * 8 * 8 * 16}),
    ]  # fmt: skip
    cases = [{"manifest": good, "change": "none", "holds": True}]
    for path, value in changes:
        made = json.loads(json.dumps(good))
        *way, last = path.split(".")
        place = made
        for key in way:
            place = place[int(key)] if isinstance(place, list) else place[key]
        if value is None:
            del place[last]
        else:
            place[last] = value
        try:
            Manifest.model_validate(made)
            holds = True
        except (ValueError, PocketfusionError):
            holds = False
        cases.append({"manifest": made, "change": f"{path} = {value!r}"[:80], "holds": holds})
    return cases


def write(folder: Path) -> None:
    """Everything, as one JSON file a kind."""
    (folder / "prompts.json").write_text(json.dumps(odd_prompts(2000)))
    for kind, values in (
        ("tokenizers", tokenizers(folder)),
        ("noise", noise()),
        ("samplers", samplers()),
        ("embeddings", embeddings()),
        ("tiles", tiles()),
        ("denoising", denoising()),
        ("previews", previews()),
        ("picture", picture(folder)),
        ("manifests", manifests()),
    ):
        (folder / f"{kind}.json").write_text(json.dumps(values))
