"""What goes into a bundle beside its networks: licences, styles, known results, and a preview of latents.

- **Licences** travel with the weights: the folder's `licences/`, and an entry each in the manifest.
- **Styles** that a model was taught: for pages and apps that offer them with the prompt.
- **Known results**, with which a device is compared before it is trusted: a UNet's step and a decoding of fixed
  noise. A GPU's faults raise no exception. The browser's engine runs both networks on the known inputs at start-up
  and compares (`web/src/engine/selfcheck.ts` makes the same inputs); the results are LiteRT's on the CPU, in
  floating point as a GPU computes. The text encoder has its empty prompt.
- **The linear preview**, colours of latents without a decoder. The gate draws two pictures, too few to fit on (an
  emoji model's: 13 dB on other pictures). So the map is fitted on pictures of coloured discs, encoded by the
  folder's own autoencoder and decoded by the bundle's decoder (18.8 dB on the same pictures; on 24 drawn ones 19.1
  dB), and measured on the two.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from pocketfusion.bounded import MB, read_json
from pocketfusion.data.emoji.drawings import STYLES
from pocketfusion.errors import PocketfusionError
from pocketfusion.mobile.measure import GateInputs, Run
from pocketfusion.mobile.wrappers import nhwc
from pocketfusion.models.tiny_autoencoder import latents_of
from pocketfusion.runtime.denoise import NoiseStream, guidance_embedding, timestep_embedding
from pocketfusion.runtime.manifest import Licence, check_styles
from pocketfusion.runtime.specs import LinearPreview, SchedulerSpec, TensorSpec, TimeEmbedding

_SPDX = re.compile(r"SPDX-License-Identifier:\s*([\w.+-]+)")
_ATTRIBUTION = re.compile(r"^(?:Attribution:\s*(.+)|(Copyright .+))$", re.MULTILINE)


def copy_licences(folder: Path, bundle: Path) -> tuple[dict[str, Path], list[Licence]]:
    """Copies `folder/licences/*` and returns the copies by the manifest's file names (`licence:NAME`), and entries.

    An entry's SPDX identifier is the file's `SPDX-License-Identifier:` line, else `LicenseRef-NAME`, which in SPDX
    means "see that text"; its attribution is the file's `Attribution:` or `Copyright` lines.
    """
    sources = sorted(p for p in (folder / "licences").glob("*") if p.is_file())
    copies: dict[str, Path] = {}
    entries = []
    if sources:
        (bundle / "licences").mkdir()
    for source in sources:
        copy = bundle / "licences" / source.name
        shutil.copyfile(source, copy)
        copies[f"licence:{source.stem}"] = copy
        text = source.read_text(encoding="utf-8", errors="replace")
        spdx = _SPDX.search(text)
        reference = "LicenseRef-" + re.sub(r"[^\w.-]", "-", source.stem)
        attribution = "; ".join((a or b).strip() for a, b in _ATTRIBUTION.findall(text))
        entries.append(Licence.made(what=source.stem, spdx=spdx[1] if spdx else reference, attribution=attribution))
    return copies, entries


FILE = "styles.json"


def styles_of(folder: Path) -> list[str]:
    """What prompts end with: the folder's own `styles.json`, a list of texts, where it has one; else the styles of the
    emoji drawings that its licences name; else none. PocketfusionError for a file that is no such list."""
    file = folder / FILE
    if file.is_file():
        try:
            return check_styles(read_json(file, MB)[0])
        except (OSError, ValueError) as error:
            raise PocketfusionError(
                f"{file} cannot be used ({error}): make it a list of texts, or delete it"
            ) from None
    notes = {path.stem for path in (folder / "licences").glob("drawings-*.txt")}
    return [f"{style.words} style" for name, style in STYLES.items() if f"drawings-{name}" in notes]


def write_styles(folder: Path, bundle: Path) -> dict[str, Path]:
    """Writes the styles of `folder` into the bundle, and returns the file by its name in the manifest, if any."""
    if not (styles := styles_of(folder)):
        return {}
    (bundle / FILE).write_text(json.dumps(styles, ensure_ascii=False) + "\n", encoding="utf-8")
    return {"styles": bundle / FILE}


Array = npt.NDArray[np.float32]


def known_result(
    run: Run,
    inputs: Sequence[TensorSpec],
    output: str,
    scheduler: SchedulerSpec,
    guidance_scale: float,
    embedding: TimeEmbedding | None,
) -> Array:
    """What the file that `run` runs, a UNet's or a decoder's with these `inputs`, gives for the known ones.

    float32, in a row. Of a decoder's image the means over each latent's pixels.
    """
    given = known_inputs(inputs, scheduler, guidance_scale, embedding)
    values = run([given], output)[0]
    if output == "image":
        _, height, width, channels = values.shape
        _, rows, columns, _ = inputs[0].shape
        blocks = values.reshape(rows, height // rows, columns, width // columns, channels)
        values = blocks.mean((1, 3), dtype=np.float64)
    return values.astype(np.float32).ravel()


def known_inputs(
    inputs: Sequence[TensorSpec], scheduler: SchedulerSpec, guidance_scale: float, embedding: TimeEmbedding | None
) -> dict[str, Array]:
    """Noise of seed 0 (the text's of seed 1), equal in every row; the middle timestep; the default guidance scale."""
    timestep = float(scheduler.num_train_timesteps // 2)
    known: dict[str, Array] = {}
    for tensor in inputs:
        row = tensor.shape[1:]
        if tensor.name == "timestep":
            values = np.array([timestep], np.float32)
        elif tensor.name == "timestep_embedding" and embedding is not None:
            values = timestep_embedding(timestep, embedding)
        elif tensor.name == "timestep_cond":
            values = guidance_embedding(guidance_scale, row[0])
        elif tensor.name == "step_coefficients":
            values = np.array([[1, 0, 1]], np.float32)  # the prediction itself
        else:
            stream = NoiseStream(int(tensor.name == "encoder_hidden_states"), int(np.prod(row)), 1, 1)
            values = stream.draw().reshape(1, *row)
        known[tensor.name] = np.repeat(values, tensor.shape[0] // len(values), axis=0)
    return known


#: Pictures of so many latents a side, drawn with so many discs each, encoded so many at a time.
_PICTURES, _SIDE, _DISCS, _BATCH = 32, 8, 4, 8
_RIDGE = 1e-3  #: of the latents' mean square, on the map but not on its bias


def discs(count: int, side: int) -> torch.Tensor:
    """`count` pictures [N, 3, side, side] in [-1, 1]: discs of random colours on a random background."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:side, :side] / side
    pictures = np.empty((count, 3, side, side), np.float32)
    for picture in pictures:
        picture[:] = rng.uniform(-1, 1, (3, 1, 1))
        for _ in range(_DISCS):
            (y, x), radius = rng.uniform(0, 1, 2), rng.uniform(0.1, 0.4)
            picture[:, (rows - y) ** 2 + (columns - x) ** 2 < radius**2] = rng.uniform(-1, 1, (3, 1))
    return torch.from_numpy(pictures)


@torch.no_grad()
def fit_preview(vae: Any, decoder: nn.Module, factor: int, reference: GateInputs) -> LinearPreview | None:
    """The map from latents to the colours that `decoder` (the wrapped one, whole latents) gives them.

    `vae`: the autoencoder whose latents they are, not always the decoder's. `factor`: pixels of a latent's side. None
    where the network's numbers allow none.
    """
    latents, images = [], []
    for part in discs(_PICTURES, _SIDE * factor).split(_BATCH):
        z = nhwc(latents_of(vae, part))
        latents.append(z.numpy())
        images.append(decoder(latents=z)["image"].numpy())
    x, y = np.concatenate(latents).astype(np.float64), _averaged(np.concatenate(images), factor)
    x = np.concatenate([x, np.ones((*x.shape[:3], 1))], axis=3).reshape(-1, x.shape[3] + 1)
    y = y.reshape(-1, 3)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return None
    ridge = np.full(x.shape[1], _RIDGE * np.square(x[:, :-1]).sum() / (x.shape[1] - 1))
    ridge[-1] = 0
    solution = np.linalg.lstsq(x.T @ x + np.diag(ridge), x.T @ y, rcond=None)[0]
    if np.abs(solution).max() > 1e4:
        return None
    fitted = LinearPreview.made(
        matrix=np.round(solution[:-1], 5).tolist(), bias=np.round(solution[-1], 5).tolist(), psnr_db=0.0, r2=0.0
    )
    drawn = np.concatenate([one["latents"] for one in reference.inputs["decoder"]])
    expected = _averaged(np.concatenate(list(reference.outputs["decoder"])), factor)
    error = float(np.square(fitted.colours(drawn) - expected).mean())
    variance = float(np.square(expected - expected.mean(axis=(0, 1, 2))).mean())
    psnr = min(200.0, 10 * math.log10(4 / error)) if error else 200.0
    return fitted.model_copy(
        update={"psnr_db": round(psnr, 2), "r2": round(1 - error / variance, 4) if variance else 0.0}
    )


def _averaged(images: np.ndarray, factor: int) -> np.ndarray:
    """[N, f H, f W, 3] in the picture's range → [N, H, W, 3], each position's mean."""
    count, height, width, channels = images.shape
    parts = np.clip(images, -1, 1).reshape(count, height // factor, factor, width // factor, factor, channels)
    return parts.astype(np.float64).mean(axis=(2, 4))
