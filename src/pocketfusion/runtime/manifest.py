"""The bundle: a folder of networks beside `bundle.json`, a validated, versioned manifest of all that is in it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError, field_validator, model_validator

from pocketfusion.artefact import sha256_file
from pocketfusion.bounded import MB, check_numbers, read_json
from pocketfusion.errors import PocketfusionError
from pocketfusion.runtime.specs import (
    MULTISTEP,
    SAMPLERS,
    BundleFile,
    CoreMLSpec,
    Defaults,
    ImageSpec,
    LatentSpec,
    Licence,
    LinearPreview,
    Networks,
    OnnxSpec,
    SamplerName,
    SchedulerSpec,
    Strict,
    Text,
    TimeEmbedding,
    TokenizerSpec,
    first_fault,
    most_steps,
)
from pocketfusion.runtime.specs import Network as Network  # this and TensorSpec: for those who write manifests
from pocketfusion.runtime.specs import TensorSpec as TensorSpec
from pocketfusion.runtime.trust.agreement import check_agreement

MANIFEST = "bundle.json"
FORMAT: Final = "pocketfusion-bundle"
VERSION: Final = 1
_LIMIT = 8 * MB
NETWORKS = ("text_encoder", "unet", "decoder")
#: A file that a bundle of classifier-free guidance may have: what its text encoder gives for the empty prompt, of the
#: shape and type of the encoder's output, little-endian and nothing else. An older reader runs the encoder instead.
EMPTY_PROMPT = "empty_prompt_embeds"
#: A file that a bundle may have: the styles that its model was taught, a JSON list of what prompts end with. An older
#: reader compares its hash and leaves it, as it does with every file that it does not know.
STYLES = "styles"
#: A file that a bundle for GPUs has: what its UNet and decoder give for fixed noise (`mobile.bundle_extras`), float32,
#: little-endian. A reader that does not know it trusts the GPU unseen.
SELF_CHECK = "selfcheck"
#: What the name of the file behind an ONNX file ends with, of weights that a protobuf's 2 GB do not hold.
ONNX_DATA = "_data"

#: What guidance costs. `classifier-free`: two predictions a step; `embedded`: one, of a UNet with the scale as its
#: input `timestep_cond` [B, E] (Meng et al., arXiv 2210.03142; `runtime.denoise` makes it); `folded`: one, of a UNet
#: that was distilled at one scale, `defaults.guidance_scale`.
Guidance = Literal["classifier-free", "embedded", "folded"]

#: What the files were made for. `litert-gpu`: every operation is one that LiteRT's GPU delegate takes; the CPU runs
#: such files as well. `coreml`: packages that Apple's devices alone can run. `onnx`: files for ONNX Runtime and its
#: like.
Target = Literal["litert-cpu", "litert-gpu", "coreml", "onnx"]


class Manifest(Strict):
    """`bundle.json`, version 1. Unknown keys are refused: a reader must not ignore what it does not understand."""

    format: Literal["pocketfusion-bundle"] = FORMAT
    version: Literal[1] = VERSION
    name: Text
    created_by: Text
    files: dict[str, BundleFile] = Field(max_length=10_000)
    networks: Networks
    tokenizer: TokenizerSpec
    latents: LatentSpec
    image: ImageSpec
    scheduler: SchedulerSpec
    sampler: SamplerName = "ddim"
    samplers: list[SamplerName] | None = None  #: those that the UNet was taught for; all where it does not say
    defaults: Defaults
    guidance: Guidance = "classifier-free"
    guidance_range: tuple[float, float] | None = None  #: the scales that an embedded one was distilled for
    target: Target = "litert-cpu"
    coreml: CoreMLSpec | None = None  #: given exactly where the target is coreml
    onnx: OnnxSpec | None = None  #: given exactly where the target is onnx
    time_embedding: TimeEmbedding | None = None  #: given exactly where the UNet takes `timestep_embedding`
    preview: LinearPreview | None = None  #: colours of latents without a decoder; bundles of before it have none
    licences: list[Licence] = []
    provenance: dict[str, Any] = {}

    @field_validator("provenance")
    @classmethod
    def _provenance_can_be_shown(cls, value: dict[str, Any]) -> dict[str, Any]:
        return dict(check_numbers(value, 1e300))

    @model_validator(mode="after")
    def _required_files(self) -> Manifest:
        missing = [name for name in (*NETWORKS, "tokenizer") if name not in self.files]
        if missing:
            raise ValueError(f"no file is given for {', '.join(missing)}")
        sizes = [4 * math.prod(tensor.shape) for tensor in self.networks.text_encoder.outputs[:1]]
        if EMPTY_PROMPT in self.files and [self.files[EMPTY_PROMPT].size] != sizes:
            raise ValueError(f"files.{EMPTY_PROMPT} is not of the size of the text encoder's output")
        if SELF_CHECK in self.files and self.files[SELF_CHECK].size != 4 * self._self_check_floats():
            raise ValueError(f"files.{SELF_CHECK} is not of the size of what it has results of")
        if self.defaults.num_inference_steps > self.scheduler.num_train_timesteps:
            raise ValueError("defaults.num_inference_steps is above scheduler.num_train_timesteps")
        return self

    @model_validator(mode="after")
    def _packages_are_files(self) -> Manifest:
        for key, spec in (("coreml", self.coreml), ("onnx", self.onnx)):
            if (self.target == key) != (spec is not None):
                raise ValueError(f"the target is {self.target}, and {key} is {'missing' if spec is None else 'there'}")
        for network, packages in self.coreml.packages.items() if self.coreml else ():
            paths = [file.path for file in self.files.values()]
            for package in packages:
                if not any(path.startswith(f"{package}/") for path in paths):
                    raise ValueError(f"coreml.packages.{network} has {package!r}, of which no file is given")
        return self

    def network_size(self, network: str) -> int:
        """Bytes of a network's files."""
        if self.coreml is None:  # large ONNX files have their weights in another, called so as well
            own = self.files[network].path
            return sum(f.size for f in self.files.values() if f.path == own or f.path == own + ONNX_DATA)
        packages = tuple(f"{package}/" for package in self.coreml.packages[network])  # type: ignore[index]
        return sum(file.size for file in self.files.values() if file.path.startswith(packages))

    def _self_check_floats(self) -> int:
        """The UNet's output, and three colours for each position of the decoder's latents."""
        return math.prod(self.networks.unet.outputs[0].shape) + 3 * math.prod(
            self.networks.decoder.inputs[0].shape[1:3]
        )

    @property
    def allowed_samplers(self) -> tuple[SamplerName, ...]:
        """The samplers that the bundle can be drawn with."""
        folded = self.networks.unet.input("step_coefficients") is not None
        taught = SAMPLERS if self.samplers is None else self.samplers
        return tuple(name for name in taught if not (folded and name in MULTISTEP))

    @model_validator(mode="after")
    def _sampler_can_draw(self) -> Manifest:
        if self.sampler not in self.allowed_samplers:
            raise ValueError(f"sampler is {self.sampler}, which samplers or the UNet's step_coefficients rule out")
        if (steps := self.defaults.num_inference_steps) > (most := most_steps(self.sampler, self.scheduler)):
            raise ValueError(f"defaults.num_inference_steps is {steps}, but {self.sampler} has {most} at most")
        return self

    @model_validator(mode="after")
    def _guidance_has_its_input(self) -> Manifest:
        has = any(tensor.name == "timestep_cond" for tensor in self.networks.unet.inputs)
        if has != (self.guidance == "embedded"):
            raise ValueError(f"the guidance is {self.guidance} and the UNet {'has' if has else 'lacks'} timestep_cond")
        if self.guidance != "classifier-free" and any(t.shape[:1] != [1] for t in self.networks.unet.inputs):
            raise ValueError(f"the guidance is {self.guidance} but the UNet takes more than one sample")
        return self

    @model_validator(mode="after")
    def _unet_has_its_inputs(self) -> Manifest:
        unet = self.networks.unet
        embedding = unet.input("timestep_embedding")
        if (embedding is None) != (self.time_embedding is None):
            raise ValueError("time_embedding and the UNet's input timestep_embedding go together, and one is missing")
        if embedding and self.time_embedding and embedding.shape[1:] != [self.time_embedding.dim]:
            raise ValueError(f"time_embedding.dim is {self.time_embedding.dim}, the UNet takes {embedding.shape}")
        if unet.input("step_coefficients"):
            states = unet.input("encoder_hidden_states")
            if self.guidance == "classifier-free" and states and states.shape[0] != 2:
                raise ValueError("the UNet takes step_coefficients but lacks the second row that guidance needs")
        return self

    @model_validator(mode="after")
    def _decoder_is_no_larger_than_the_latents(self) -> Manifest:
        tile = self.networks.decoder.input("latents")
        if tile is None or len(tile.shape) != 4:
            return self  # told below
        if tile.shape[1] > self.latents.height or tile.shape[2] > self.latents.width:
            raise ValueError(
                f"the decoder takes tiles of {tile.shape[1]}x{tile.shape[2]} latents, "
                f"larger than the picture's {self.latents.height}x{self.latents.width}"
            )
        return self

    @model_validator(mode="after")
    def _networks_agree(self) -> Manifest:
        check_agreement(self)
        return self

    def contents(self) -> dict[str, Any]:
        """What `bundle.json` holds: keys that version 1 began without only where they say something."""
        values = self.model_dump(mode="json", exclude_none=True)
        if self.guidance == "classifier-free":  # older readers refuse the key, and this is all that they can draw
            del values["guidance"]
        if self.target == "litert-cpu":
            del values["target"]
        if self.sampler == "ddim":
            del values["sampler"]
        return values


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose manifest is valid and whose files all lie inside its folder."""

    path: Path
    manifest: Manifest
    hash: str  #: SHA-256 of bundle.json, which holds every other file's: it names the bundle's whole content

    @classmethod
    def open(
        cls, path: Path | str, *, verify: bool = True, drawable: bool = False, any_runtime: bool = False
    ) -> Bundle:
        """Reads the manifest of the bundle at `path`; `verify` also checks every file's size and SHA-256.

        A bundle is LiteRT's; with `drawable` another that this machine can draw with; with `any_runtime` any.
        Raises PocketfusionError for a missing, damaged or newer manifest, a path that leaves the bundle, a bundle of
        another runtime and, if `verify`, a missing, truncated or altered file.
        """
        path = Path(path)
        manifest, digest = read_manifest(path)
        if not any_runtime:
            _check_runtime(path, manifest, drawable)
        bundle = cls(path, manifest, digest)
        for name in manifest.files:
            bundle.file(name)
        if verify:
            for problem in bundle.problems():
                raise PocketfusionError(f"{problem}: restore the bundle from its source or export it again")
        return bundle

    def file(self, name: str) -> Path:
        """Path of the file called `name` in the manifest; PocketfusionError if a link leads it out of the bundle.

        The Hub's cache is a folder of links into its own store of blobs, and counts as inside.
        """
        return _inside(self.path, self.manifest.files[name].path)

    def empty_prompt_embeds(self) -> npt.NDArray[np.float32] | None:
        """The text encoder's output for the empty prompt if the bundle keeps it; raises PocketfusionError if it cannot
        be read or is not finite."""
        if EMPTY_PROMPT not in self.manifest.files:
            return None
        file, shape = self.file(EMPTY_PROMPT), self.manifest.networks.text_encoder.outputs[0].shape
        try:
            values = np.frombuffer(file.read_bytes(), "<f4").reshape(shape)
        except (OSError, ValueError):
            raise PocketfusionError(
                f"{file} cannot be read or is not of the shape {shape}: restore the bundle from its source"
            ) from None
        if not np.isfinite(values).all():
            raise PocketfusionError(f"{file} holds NaN or infinity: the bundle is unsound")
        return values.astype(np.float32)

    def styles(self) -> list[str]:
        """What prompts for this model may end with, such as "noto style"; none where the bundle does not say.

        Raises PocketfusionError if its list cannot be used.
        """
        if STYLES not in self.manifest.files:
            return []
        file = self.file(STYLES)
        try:
            return check_styles(read_json(file, _LIMIT)[0])
        except (OSError, ValueError) as error:
            raise PocketfusionError(f"{file} cannot be used ({error}): restore the bundle from its source") from None

    def problems(self) -> Iterator[str]:
        """One sentence without its end for each file that is missing, cut short or altered."""
        for name, expected in self.manifest.files.items():
            file = self.file(name)
            if not file.is_file():
                yield f"{file} is missing"
            elif (size := file.stat().st_size) != expected.size:
                what = "truncated" if size < expected.size else "altered"
                yield f"{file} is {what}: it has {size:,} bytes, not {expected.size:,}"
            elif sha256_file(file) != expected.sha256:
                yield f"{file} is altered: its SHA-256 differs from the manifest's"


def _check_runtime(path: Path, manifest: Manifest, drawable: bool) -> None:
    """Raises PocketfusionError for a bundle that is not LiteRT's or, if `drawable`, not for a runtime that is here."""
    if manifest.target == "coreml":
        raise PocketfusionError(
            f"{path} was exported for Core ML, on Apple's devices and cannot be run here: export the model "
            f"with --target litert-cpu to draw with it, or compare its numbers with pocketfusion check {path}"
        )
    if manifest.onnx and manifest.onnx.layout != "bundle":
        raise PocketfusionError(
            f"{path} was exported in the layout of diffusers' OnnxStableDiffusionPipeline: draw with it there, or "
            "export the model with --layout bundle"
        )
    if manifest.onnx and not drawable:
        raise PocketfusionError(
            f"{path} was exported for ONNX Runtime, and this takes bundles for LiteRT: export the model with --target "
            "litert-cpu or litert-gpu for it (generate, bench, evaluate and compare take both)"
        )


def check_styles(value: Any) -> list[str]:
    """`value` as a list of styles; ValueError if it is none."""
    if not isinstance(value, list) or len(value) > 100:
        raise ValueError("it is not a list of at most 100 styles")
    for style in value:
        if not (isinstance(style, str) and 0 < len(style) <= 60 and style.isprintable() and style == style.strip()):
            raise ValueError(f"{str(style)[:60]!r} is not a style of 1 to 60 letters")
    return value


def _inside(bundle: Path, name: str) -> Path:
    """The path of `name` in the folder `bundle`; PocketfusionError if a link leads it out of it."""
    file = bundle / name
    try:
        root, target = bundle.resolve(), file.resolve()
        stores = [p.parent / "blobs" for p in root.parents if p.name == "snapshots" and "--" in p.parent.name]
        inside = target.is_relative_to(root) or target.parent in stores
    except (OSError, RuntimeError):  # links in a circle
        inside = False
    if not inside:
        raise PocketfusionError(
            f"{bundle / MANIFEST} names {name!r}, a link that leaves the bundle: "
            "it is not read; get the bundle from a source that you trust"
        )
    return file


def _instead(path: Path) -> str:
    """What is wrong with a path that has no manifest, by what it looks like."""
    made = f"make one of it with pocketfusion export {path} OUT"
    if (path / "model_index.json").is_file():
        return f"it is a model folder; {made}"
    if path.suffix.lower() in (".safetensors", ".ckpt"):
        return f"it is a file of weights; if it is a checkpoint, {made}"
    return f"it has no {MANIFEST}"


def read_manifest(path: Path) -> tuple[Manifest, str]:
    """The validated manifest of the bundle folder `path` and its SHA-256; raises PocketfusionError."""
    try:
        if not path.exists():
            raise PocketfusionError(f"there is no bundle at {path}: check the path")
        file = _inside(path, MANIFEST)
        if not file.is_file():
            raise PocketfusionError(f"{path} is not a bundle: {_instead(path)}")
        raw, content = read_json(file, _LIMIT)
    except OSError as error:
        raise PocketfusionError(
            f"{path / MANIFEST} cannot be read ({error.strerror}): check the path and its permissions"
        ) from None
    except ValueError as error:
        raise PocketfusionError(f"{path / MANIFEST}: {error}: restore the bundle from its source") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise PocketfusionError(f'{file} is not a bundle\'s manifest: its "format" is not "{FORMAT}"')
    version = raw.get("version")
    if isinstance(version, int) and version > VERSION:
        raise PocketfusionError(
            f"{file} is of version {version}, made by a newer pocketfusion (this one reads {VERSION}): "
            "upgrade pocketfusion"
        )
    if isinstance(target := raw.get("target"), str) and target not in get_args(Target):
        raise PocketfusionError(
            f"{path} is a bundle for {target[:40]!r}, which this version does not know: "
            "export its model with --target litert-cpu or litert-gpu"
        )
    try:
        return Manifest.model_validate(raw), hashlib.sha256(content).hexdigest()
    except ValidationError as error:
        raise PocketfusionError(
            f"{file} is not a valid manifest ({first_fault(error)}): restore the bundle from its source"
        ) from None


def embedded_bundle() -> Path:
    """The bundle that ships inside the package; raises PocketfusionError if this installation has none."""
    path = Path(__file__).parents[1] / "bundles" / "emoji"
    if not (path / MANIFEST).is_file():
        raise PocketfusionError(f"this installation holds no embedded bundle at {path}: pass the path of a bundle")
    return path
