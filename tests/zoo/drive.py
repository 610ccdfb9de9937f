"""One member of the zoo through import, info, export and generate, against stock diffusers; as a script, their table.

PYTHONPATH=tests python tests/zoo/drive.py
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from members import MEMBERS, Member

from conversions import kept_in
from pocketfusion.errors import PocketfusionError
from pocketfusion.info import describe
from pocketfusion.mobile import export as module
from pocketfusion.models.bring.importer import import_file
from pocketfusion.quiet import quiet
from pocketfusion.runtime.denoise import NoiseStream
from pocketfusion.runtime.manifest import NETWORKS
from pocketfusion.runtime.pipeline import Pipeline

PROMPT, SEED, STEPS = "a red cat and <cat-toy>", 5, 4


@dataclass(frozen=True)
class Drawn:
    """What came of a member: `psnr` of the picture, dB, by the weights' form."""

    sampler: str
    psnr: dict[str, float]


def drive(member: Member, root: Path, forms: tuple[str, ...] = ("float32",)) -> Drawn:
    """Raises PocketfusionError where it is refused; every step must then leave nothing."""
    root.mkdir()
    path, stock = member.build(root)
    if path.is_file():
        import_file(path, root / "imported")
        path = root / "imported"
    problems = describe(path)["problems"]
    if problems:  # told by info, and refused by export
        with pytest.raises(PocketfusionError):
            module.export(path, root / "float32")
        raise PocketfusionError(problems[0])
    psnr = {}
    for form in forms:
        out = root / form
        with quiet():
            module.export(path, out, weights=dict.fromkeys(NETWORKS, form), gate_steps=1)
        bundle = Pipeline.load(out, 1)
        assert stock is not None
        psnr[form] = against(bundle, stock)
    return Drawn(bundle.manifest.sampler, psnr)


def against(bundle: Pipeline, stock: StableDiffusionPipeline) -> float:
    """PSNR of the bundle's picture to stock diffusers' from the same noise, 8 bits a channel, dB."""
    latents, defaults = bundle.manifest.latents, bundle.manifest.defaults
    steps = min(STEPS, defaults.num_inference_steps)
    picture = bundle.generate(PROMPT, num_inference_steps=steps, seed=SEED).images[0]
    stream = NoiseStream(SEED, latents.height, latents.width, latents.channels)

    def draw(*given: object, **named: object) -> torch.Tensor:
        return torch.from_numpy(stream.draw()).permute(2, 0, 1)[None]

    if bundle.manifest.sampler == "ddim":  # also for classes that the runtime lacks
        stock.scheduler = DDIMScheduler.from_config(stock.scheduler.config, clip_sample=False)
    stock.set_progress_bar_config(disable=True)
    with pytest.MonkeyPatch.context() as patch:  # noise at the steps: the bundle's
        patch.setattr(sys.modules[type(stock.scheduler).__module__], "randn_tensor", draw, raising=False)
        images = stock(
            PROMPT,
            num_inference_steps=steps,
            guidance_scale=defaults.guidance_scale,
            latents=draw(),
            output_type="np",
        ).images
    wanted, found = np.round(images[0] * 255), np.asarray(picture, np.float64)
    assert wanted.shape == found.shape and wanted.std() > 50  # a picture, no grey field: else any two are alike
    return float(10 * np.log10(255**2 / max(np.mean((wanted - found) ** 2), 1e-4)))


def main() -> None:
    forms = ("float32", "int8")
    print("| member | sampler | fp32 | int8 |\n|---|---|---|---|")
    convert: Callable = module._convert_network
    with tempfile.TemporaryDirectory() as work, pytest.MonkeyPatch.context() as patch:
        (Path(work) / "kept").mkdir()
        patch.setattr(module, "_convert_network", kept_in(Path(work) / "kept", convert))
        for number, member in enumerate(MEMBERS):
            if not all(word in member.name for word in sys.argv[1:]):
                continue
            try:
                drawn = drive(member, Path(work) / str(number), forms)
                cells = [drawn.sampler, *(f"{drawn.psnr[form]:.1f} dB" for form in forms)]
            except PocketfusionError as error:
                said = str(error).replace(f"{work}/{number}/", "")
                cells = ["refused", said, ""]
            print(f"| {member.name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
