"""Reference values of a bundle as plain JSON and .npy: what a port in another language compares itself with.

`docs/port.md` says by which rules they come about, and is enough to compute them without this package.
"""

from __future__ import annotations

import json
import platform
import random
import shutil
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from pocketfusion import __version__
from pocketfusion.artefact import atomic_folder, check_new, write_json
from pocketfusion.errors import PocketfusionError
from pocketfusion.runtime.denoise import NoiseStream, guidance_embedding, timestep_embedding
from pocketfusion.runtime.manifest import NETWORKS, Bundle, embedded_bundle
from pocketfusion.runtime.networks import Array, Network
from pocketfusion.runtime.output import cpu_name, png_text, save_png
from pocketfusion.runtime.pipeline import MAX_SEED, Pipeline
from pocketfusion.runtime.samplers.sampler import Sampler, resolve_sampler
from pocketfusion.runtime.specs import most_steps
from pocketfusion.runtime.tokenizer import PromptTokenizer, clean_text

_WORDS = "a red apple, noto style|two happy cats!|THE sun's 42nd don't|smiling-face #7|<toy>|[MASK] in text|x"
_SCRIPTS = (
    (0x20, 0x7F), (0xA0, 0x17F), (0x300, 0x370), (0x370, 0x400), (0x400, 0x530), (0x5D0, 0x5EB), (0x600, 0x700),
    (0x900, 0x980), (0xE00, 0xE60), (0x1100, 0x1200), (0x1E00, 0x2000), (0x2000, 0x2070), (0x2190, 0x2200),
    (0x2C00, 0x2C60), (0x3040, 0x3100), (0x4E00, 0x4F00), (0xA640, 0xA6A0), (0xAC00, 0xAD00), (0xE000, 0xE010),
    (0xF900, 0xFB00), (0xFB00, 0xFB50), (0xFE00, 0xFE30), (0xFF00, 0xFF70), (0x10400, 0x10450), (0x11380, 0x113D0),
    (0x16D40, 0x16D80), (0x17000, 0x17040), (0x1D400, 0x1D440), (0x1E900, 0x1E944), (0x1F300, 0x1F650),
    (0x1F900, 0x1F9FF), (0x20000, 0x20040), (0x2A6F0, 0x2A740), (0x2F800, 0x2F840), (0xE0000, 0xE0080), (0, 0x20),
)  # fmt: skip
_TELLING = [
    "", " ", "\n", "ΣΊΣΥΦΟΣ ΟΔΥΣΣΕΎΣ", "ΑΣ. ΑΣ", "İstanbul ISPARTA ıI", "ẞtraße", "ﬁﬂ ﬃ",
    "𠀀𪜀你好x你", "Ǆǅǆ Ωmega K Å",
    "👩🏽‍🚀 family 👨‍👩‍👧‍👦 🇩🇪",
    "e\u0301 é e\u0323\u0301 e\u0301\u0323 ệ", "각 각 \u1100\u1161\u11a8", "क्षि हिन्दी", "\u0344\u0390",
    "\x00a\x01b\u200bc\u200dd\ufeff", "a\u0085b\u00a0c\u3000d\u2028e\u2029f", "it's WE'RE i'd've 'S 'tis o'clock''s",
    "[CLS] [SEP] [PAD] [MASK][mask] [UNK]", "<|endoftext|> <|startoftext|> <|ENDOFTEXT|>a<|startoftext|>", "q" * 101,
    "q" * 100, "word " * 500, "苹果" * 300, "a\ud83cb \udf4e c", "😀" * 60, "١٢٣ ⅷ ½ ² 10,000.5", "foo_bar-baz/qux\\x",
    "<toy> and <other>", "a<toy>b<toy><toy>", "<TOY>", "ZAL\u0316\u0300\u0334GO" * 9, "\u0301\u0301", "\t\ttabs\tin\t",
]  # fmt: skip


def odd_prompts(count: int) -> list[str]:
    """`count` of them, always the same: telling ones, words, then random text of every script and of any."""
    chance = random.Random(14)
    made = [*_TELLING, *_WORDS.split("|")]
    while len(made) < count:
        kind = chance.randrange(4)
        parts: list[str] = []
        for _ in range(chance.randrange(1, 40)):
            first, last = chance.choice(_SCRIPTS) if kind else (0, 0x110000)
            if kind == 3:
                first, last = 0x20, 0x7F
            code = chance.randrange(first, last)
            parts.append(chance.choice(["", " ", ""]) + ("" if 0xD800 <= code < 0xE000 else chr(code)))
        made.append("".join(parts))
    return made[:count]


FORMAT, VERSION = "pocketfusion-vectors", 1
INDEX = "vectors.json"
#: What `tokenizers` takes each code point for: a system's own tables are of another version of Unicode.
UNICODE = Path(__file__).with_name("unicode.json")
PROMPT = "a red apple"
SEEDS = (0, 1, MAX_SEED)
STEPS = (1, 4, 8, 25)

Progress = Callable[[str], None]


def token_rows(tokenizer: PromptTokenizer, prompts: Iterable[str]) -> list[list[Any]]:
    """By prompt: its ids, how many of them are no padding, and the warning of what was cut (None if nothing)."""
    rows = []
    for prompt in prompts:
        tokens = tokenizer.encode(prompt)
        rows.append([tokens.input_ids[0].tolist(), int(tokens.attention_mask.sum()), tokens.warning])
    return rows


def sampler_table(sampler: Sampler, steps: int) -> dict[str, Any]:
    """All that a sampler knows before its first step: by step, x' = a x + b output + noise z + previous_x_0 x_0⁻."""
    timesteps = sampler.set_timesteps(steps).tolist()
    plan = sampler.schedule.steps
    return {
        "steps": steps,
        "timesteps": timesteps,
        "initial_scale": sampler.schedule.initial_scale,
        "ab": [list(sampler.coefficients(k)) for k in range(steps)],
        **{key: [getattr(step, key) for step in plan] for key in ("noise", "previous_x_0", "alpha", "sigma")},
    }


class _Recorded(Network):
    """A network that keeps what went in and what came out of every run."""

    def __init__(self, calls: list[dict[str, Array]], *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._calls, self._values = calls, dict[str, Array]()

    def write(self, **inputs: Array) -> None:
        super().write(**inputs)
        self._values.update({name: np.array(values) for name, values in inputs.items()})

    def run(self) -> None:
        super().run()
        self._calls.append({**self._values, self.spec.outputs[0].name: self.read()})

    def feed_back(self, name: str) -> None:
        super().feed_back(name)
        self._values[name] = self._calls[-1][self.spec.outputs[0].name]


class _Recording(Pipeline):
    """A pipeline that keeps every call of its networks, one of them in memory at a time."""

    def __init__(self, bundle: Bundle, num_threads: int) -> None:
        self.calls: dict[str, list[dict[str, Array]]] = {name: [] for name in NETWORKS}
        super().__init__(bundle, num_threads, mode="sequential")

    def _load_network(self, name: str) -> Network:
        spec = getattr(self.manifest.networks, name)
        return _Recorded(self.calls[name], self.bundle.file(name), spec, self.num_threads)


def write_vectors(
    bundle_path: Path | None,
    out: Path,
    *,
    prompt: str = PROMPT,
    num_threads: int = 1,
    overwrite: bool = False,
    progress: Progress = lambda what: None,
) -> dict[str, Any]:
    """Writes the folder `out` for the bundle at `bundle_path` (default: the embedded one); returns its index.

    Raises PocketfusionError for a bundle that cannot be run, and if `out` exists (without `overwrite`, or as anything
    but vectors).
    """
    check_replaced(out, INDEX, "vectors", overwrite)
    bundle = Bundle.open(embedded_bundle() if bundle_path is None else bundle_path)
    with atomic_folder(out, overwrite=overwrite) as partial:
        return _write(bundle, partial, prompt, num_threads, progress)


def _write(bundle: Bundle, folder: Path, prompt: str, num_threads: int, progress: Progress) -> dict[str, Any]:
    manifest = bundle.manifest
    progress("tokenizing")
    tokenizer = PromptTokenizer(bundle.file("tokenizer"), manifest.tokenizer)
    prompts = [clean_text(prompt) for prompt in odd_prompts(50)]  # half a pair is no text that JSON readers take
    rows = zip(prompts, token_rows(tokenizer, prompts), strict=True)
    keys = ("prompt", "ids", "count", "warning")
    write_json(folder / "tokens.json", [dict(zip(keys, (prompt, *row), strict=True)) for prompt, row in rows])
    shutil.copyfile(UNICODE, folder / UNICODE.name)
    shape = manifest.latents
    noise = {}
    for seed in SEEDS:
        stream = NoiseStream(seed, shape.height, shape.width, shape.channels)
        noise[str(seed)] = _save(folder, f"noise_{seed}", np.stack([stream.draw() for _ in range(2)]))
    write_json(folder / "samplers.json", _samplers(bundle))
    progress("drawing")
    pipeline = _Recording(bundle, num_threads)
    latents: list[Array] = []
    result = pipeline.generate(prompt, seed=0, callback=lambda k, t, sample: latents.append(sample[0]))
    pipeline.close()
    save_png(result.images[0], folder / "picture.png", png_text(pipeline, result, 0))
    index = {
        "format": FORMAT,
        "version": VERSION,
        "bundle": {"name": manifest.name, "sha256": bundle.hash, "target": manifest.target},
        "made_by": {
            "pocketfusion": __version__,
            "runtime": f"ai-edge-litert {version('ai-edge-litert')}",
            "cpu": cpu_name(),
            "machine": platform.machine(),
            "threads": num_threads,
        },
        "tokens": "tokens.json",
        "unicode": UNICODE.name,
        "samplers": "samplers.json",
        "noise": noise,
        "networks": {name: _calls(folder, name, pipeline.calls[name]) for name in NETWORKS},
        "picture": {
            "prompt": result.prompt,
            "seed": 0,
            "num_inference_steps": result.num_inference_steps,
            "guidance_scale": result.guidance_scale,
            "guidance": manifest.guidance,
            "sampler": result.sampler,
            "eta": result.eta,
            "latents": _save(folder, "latents", np.stack(latents)),
            "pixels": _save(folder, "pixels", np.asarray(result.images[0])),
            "png": "picture.png",
        },
    }
    write_json(folder / INDEX, index)
    return index


def _samplers(bundle: Bundle) -> list[dict[str, Any]]:
    """Every sampler that the bundle allows, at a few numbers of steps, with the embeddings of its times."""
    manifest, tables = bundle.manifest, []
    condition = manifest.networks.unet.input("timestep_cond")
    for name in manifest.allowed_samplers:
        sampler = resolve_sampler(manifest, name)
        most = most_steps(name, sampler.spec)
        for steps in sorted({n for n in (*STEPS, manifest.defaults.num_inference_steps) if n <= most}):
            table: dict[str, Any] = {"sampler": name, "eta": sampler.spec.eta, **sampler_table(sampler, steps)}
            if spec := manifest.time_embedding:
                table["timestep_embedding"] = [timestep_embedding(t, spec)[0].tolist() for t in table["timesteps"]]
            if condition:
                scale = manifest.defaults.guidance_scale
                table["timestep_cond"] = guidance_embedding(scale, condition.shape[1])[0].tolist()
            tables.append(table)
    return tables


def _calls(folder: Path, network: str, calls: list[dict[str, Array]]) -> dict[str, str]:
    """Saves the inputs and the output of every call, one file a tensor, calls first: the files by tensor."""
    names = calls[0] if calls else {}
    return {name: _save(folder, f"{network}.{name}", np.stack([call[name] for call in calls])) for name in names}


def _save(folder: Path, name: str, values: Array) -> str:
    np.save(folder / f"{name}.npy", np.ascontiguousarray(values), allow_pickle=False)
    return f"{name}.npy"


def check_replaced(out: Path, index: str, what: str, overwrite: bool) -> None:
    """Raises PocketfusionError unless `out` is new, or may be replaced and is such a folder, with its `index`."""
    if overwrite and out.is_dir() and not _is_ours(out / index, what):
        raise PocketfusionError(f"{out} exists and holds no {what}: it is not replaced, choose another folder")
    check_new(out, overwrite)


def _is_ours(file: Path, what: str) -> bool:
    try:
        return bool(json.loads(file.read_text(encoding="utf-8"))["format"] == f"pocketfusion-{what}")
    except (OSError, ValueError, KeyError, TypeError):
        return False
