"""What is compared: model folders and bundles, each with its steps and sampler, as the command line names them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from pocketfusion.artefact import sha256_folder
from pocketfusion.errors import PocketfusionError
from pocketfusion.evaluate.generate import BundleSystem, ModelFolder, Precision, System
from pocketfusion.folder import COMPONENTS, PROVENANCE, check_folder, folder_hash
from pocketfusion.models.sampling import Guidance, usual_sampling
from pocketfusion.runtime.manifest import MANIFEST, Bundle
from pocketfusion.runtime.samplers.sampler import resolve_sampler
from pocketfusion.runtime.specs import SAMPLERS, SamplerName


@dataclass(frozen=True)
class SystemSpec:
    """One system before it is opened: enough to find its pictures in a store."""

    path: Path
    kind: Literal["model folder", "bundle"]
    sha256: str  #: of the whole folder or bundle, for the result file
    networks: str  #: of what the pictures depend on alone: a changed card, provenance or default draws nothing again
    num_inference_steps: int
    guidance: Guidance
    fixed_scale: float | None  #: the only guidance scale of a folded one
    precision: str
    guidance_range: tuple[float, float] | None = None  #: scales that an embedded one was distilled for
    sampler: SamplerName = "ddim"

    @property
    def name(self) -> str:
        """Folder name, steps and a sampler that is not DDIM."""
        return self.path.resolve().name + self.drawing

    @property
    def drawing(self) -> str:
        """Steps and sampler as the command line has them: `@8`, `@8:euler`."""
        return f"@{self.num_inference_steps}" + ("" if self.sampler == "ddim" else f":{self.sampler}")

    @property
    def sampling(self) -> str:
        """The sampler for result files and keys."""
        return f"{'DDIM, eta 0' if self.sampler == 'ddim' else self.sampler}; noise by numpy PCG64"

    def scales(self, wanted: Sequence[float]) -> tuple[float, ...]:
        """The guidance scales that it is drawn at: a folded one has only its own."""
        return tuple(wanted) if self.fixed_scale is None else (self.fixed_scale,)

    def open(self, num_threads: int | None = None) -> System:
        """The system, ready to draw; `num_threads` is for bundles (None: all cores). Raises PocketfusionError."""
        if self.kind == "bundle":
            return BundleSystem(self.path, num_threads)
        folder = ModelFolder(self.path, "bf16" if self.precision == "bf16" else "fp32")
        if self.sampler != "ddim":
            folder.with_sampler(self.sampler, self.num_inference_steps)  # refuses steps that it does not have
        return folder

    def drawn_with(self) -> dict[str, Any]:
        """All that its pictures depend on besides prompt, seed and guidance scale: the key of its shelf."""
        return {
            "kind": self.kind,
            "networks": self.networks,
            "guidance": self.guidance,
            "num_inference_steps": self.num_inference_steps,
            "precision": self.precision,
            "sampler": self.sampling,
        }

    def identity(self) -> dict[str, Any]:
        """What a result file says of it."""
        return {"name": self.path.resolve().name, "sha256": self.sha256, **self.drawn_with()}


def _digest(parts: dict[str, Any]) -> str:
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _folder_spec(path: Path, steps: int | None, precision: Precision, sampler: SamplerName) -> SystemSpec:
    check_folder(path)
    sampling = usual_sampling(path)
    parts = {name: sha256_folder(path / name, exclude=(PROVENANCE, "README.md")) for name in COMPONENTS}
    return SystemSpec(
        path=path,
        kind="model folder",
        sha256=folder_hash(path),
        networks=_digest(parts),
        num_inference_steps=steps or sampling.num_inference_steps,
        guidance=sampling.guidance,
        fixed_scale=sampling.guidance_scale if sampling.guidance == "folded" else None,
        precision=precision,
        guidance_range=sampling.guidance_range,
        sampler=sampler,
    )


def _bundle_spec(path: Path, steps: int | None, sampler: SamplerName | None) -> SystemSpec:
    bundle = Bundle.open(path, drawable=True)
    manifest = bundle.manifest
    sampler = sampler or manifest.sampler
    steps = steps or manifest.defaults.num_inference_steps
    resolve_sampler(manifest, sampler).set_timesteps(steps)
    parts: dict[str, Any] = {name: file.sha256 for name, file in manifest.files.items()}
    parts |= {"scheduler": manifest.scheduler.model_dump(), "tokenizer_spec": manifest.tokenizer.model_dump()}
    return SystemSpec(
        path=path,
        kind="bundle",
        sha256=bundle.hash,
        networks=_digest(parts),
        num_inference_steps=steps,
        guidance=manifest.guidance,
        fixed_scale=manifest.defaults.guidance_scale if manifest.guidance == "folded" else None,
        precision=manifest.networks.unet.weights,
        guidance_range=manifest.guidance_range,
        sampler=sampler,
    )


def system_spec(
    path: Path, steps: int | None = None, precision: Precision = "fp32", sampler: SamplerName | None = None
) -> SystemSpec:
    """A model folder or a bundle at `steps` sampling steps (None: its own default).

    A `sampler` of None is DDIM for a folder and its own for a bundle: a few-step bundle draws as it was made to.

    Raises PocketfusionError if it is neither, or damaged, or a bundle that cannot be drawn so.
    """
    if (path / MANIFEST).is_file():
        return _bundle_spec(path, steps, sampler)
    return _folder_spec(path, steps, precision, sampler or "ddim")


def _parse_steps(text: str | None, count: int) -> list[int | None]:
    """Reads `--steps`: one number for all systems or one for each, with commas; None is each one's default."""
    if text is None:
        return [None] * count
    values = [_steps(part.strip(), f"--steps {text!r}") for part in text.split(",")]
    if len(values) not in (1, count):
        raise PocketfusionError(
            f"--steps {text!r} has {len(values)} numbers for {count} systems: give one for all, or one for each"
        )
    return [values[0]] * count if len(values) == 1 else [*values]


def _steps(text: str, where: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1000:
        raise PocketfusionError(f"{where} holds {text!r}: give the number of steps, 1 to 1000, such as 25 or 50,8")
    return int(text)


def _drawing(text: str, name: str) -> tuple[int, SamplerName | None]:
    """Steps and sampler of what follows @ in `name`."""
    steps, colon, wanted = text.partition(":")
    if not colon:
        return _steps(steps, name), None
    for sampler in SAMPLERS:
        if sampler == wanted:
            return _steps(steps, name), sampler
    raise PocketfusionError(f"{name} names the sampler {wanted!a}: choose {' or '.join(SAMPLERS)}, as PATH@8:euler")


def named_systems(
    names: Sequence[str],
    steps: str | None = None,
    precision: str = "fp32",
    opened: Callable[[Path], Path] = lambda path: path,
) -> list[SystemSpec]:
    """The systems of a command line: PATH, PATH@STEPS or PATH@STEPS:SAMPLER each, these steps before `--steps`.

    `opened` gives the folder for a path: a checkpoint's file is imported. Where no sampler is named, it is
    `system_spec`'s. Raises PocketfusionError if a path is no model folder or bundle, a system is named twice at the
    same steps, or a sampler or the precision is unknown.
    """
    specs: list[SystemSpec] = []
    if precision not in ("fp32", "bf16"):
        raise PocketfusionError(f"--precision {precision} is unknown: choose fp32 or bf16")
    for name, given in zip(names, _parse_steps(steps, len(names)), strict=True):
        path, own = Path(name), given
        sampler: SamplerName | None = None
        if "@" in name and not path.exists():
            before, _, after = name.rpartition("@")
            path, (own, sampler) = Path(before), _drawing(after, name)
        spec = system_spec(opened(path), own, "bf16" if precision == "bf16" else "fp32", sampler)
        if _key(spec) in map(_key, specs):
            raise PocketfusionError(
                f"{path} at {spec.num_inference_steps} steps is named twice: name each system once, or with other "
                "steps or another sampler, as FOLDER@50 FOLDER@8 FOLDER@8:euler"
            )
        specs.append(spec)
    return specs


def _key(spec: SystemSpec) -> tuple[Path, str]:
    return spec.path.resolve(), spec.drawing


def labels(specs: Sequence[SystemSpec]) -> list[str]:
    """Folder names with steps and sampler, as base@50, with as much of the path in front as tells folders apart."""
    paths = {spec.path.resolve() for spec in specs}
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(spec.path.resolve().parts[-depth:]) + spec.drawing for spec in specs]
