"""Reference values of a bundle as plain JSON and .npy: what a port in another language compares itself with.

`docs/port.md` says by which rules they come about, and is enough to compute them without this package.
"""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from pocketfusion import __version__
from pocketfusion.artefact import atomic_folder, check_new, write_json
from pocketfusion.errors import PocketfusionError
from pocketfusion.port.odd_prompts import odd_prompts
from pocketfusion.runtime.denoise import NoiseStream, guidance_embedding, timestep_embedding
from pocketfusion.runtime.manifest import NETWORKS, Bundle, embedded_bundle
from pocketfusion.runtime.networks import Array, Network
from pocketfusion.runtime.output import cpu_name, png_text, save_png
from pocketfusion.runtime.pipeline import MAX_SEED, Pipeline
from pocketfusion.runtime.samplers.sampler import Sampler, resolve_sampler
from pocketfusion.runtime.specs import most_steps
from pocketfusion.runtime.tokenizer import PromptTokenizer, clean_text

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
