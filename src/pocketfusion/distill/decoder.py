"""`distill-decoder`: a smaller decoder that draws the teacher's pictures of sampled latents (SnapFusion 3.2, B.2)."""

from __future__ import annotations

import shutil
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import nn
from torch.nn import functional as F

from pocketfusion.data.packed import CaptionedImages
from pocketfusion.distill.decoder_losses import EncoderFeatures, ssim
from pocketfusion.distill.decoder_pool import LatentSampler, Pool, PoolSettings, decode, decode_pool
from pocketfusion.distill.decoder_pruning import half_shape, prune_decoder, tiny_shape
from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import (
    ENCODER,
    PROVENANCE,
    Provenance,
    check_finite,
    check_folder,
    folder_hash,
    weights_hash,
)
from pocketfusion.info import read_safetensors_header
from pocketfusion.models.base import copy_folder
from pocketfusion.models.slim_autoencoder import DecoderShape, SlimAutoencoderKL, load_vae
from pocketfusion.processes import process_state
from pocketfusion.recipe import DecoderDistillSettings, Recipe
from pocketfusion.train.autoencoder import psnr, to_tensor, to_uint8
from pocketfusion.train.batch import Batch, BatchPlan
from pocketfusion.train.held_out import shared, spread
from pocketfusion.train.loop import TrainResult
from pocketfusion.train.place import StageRun
from pocketfusion.train.stage import finished_result, run_stage

_REAL = 256  #: held-out pictures that are encoded and decoded again


class DecoderNetwork(nn.Module):
    """What is trained: `post_quant_conv` and `decoder` of an autoencoder, behind one forward."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder
        self.requires_grad_(True)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Latents [B, C, h, w], divided by the scaling factor → pictures [B, 3, H, W]."""
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))


class DecoderTask:
    """Mean squared error to the teacher's picture (SnapFusion), and what `settings.loss` adds to it.

    `prepare` fills `latents` and `held_out` (fp16 [N, C, h, w]) before the first call.
    """

    def __init__(self, settings: DecoderDistillSettings, data: CaptionedImages, teacher: AutoencoderKL, vae: Any):
        self.settings, self.data, self.teacher = settings, data, teacher
        self.model = DecoderNetwork(vae)
        self.plan = BatchPlan([(np.arange(settings.samples), 1.0)], settings.train.batch_size, settings.train.seed)
        self.features = EncoderFeatures(teacher) if settings.loss == "mse+features" else None
        self.device = torch.device("cpu")
        self.latents = self.held_out = np.empty(0)
        self.targets: np.ndarray | None = None

    def prepare(
        self, sampler: LatentSampler, vae_hash: str, scene_share: float, cache: Path, device: torch.device
    ) -> None:
        """Draws the latents, decodes them with the teacher, encodes held-out pictures; later runs find all but these.

        Raises PocketfusionError if there are no captions or the teacher gives NaN.
        """
        settings, teacher = self.settings, self.teacher.to(device)
        how = PoolSettings(
            settings.num_inference_steps,
            settings.guidance_scale,
            settings.precision,
            settings.batch,
            settings.train.seed,
        )
        pool = Pool(sampler, how, self.data, (("train", 1 - scene_share), ("train_scene", scene_share)))
        self.latents = pool.latents(settings.samples, cache, device)
        if settings.cache_targets:
            self.targets = decode_pool(teacher, vae_hash, pool, self.latents, cache, device)
        held_out = Pool(sampler, replace(how, seed=how.seed + 1), self.data, (("val_combo", 1.0),))
        self.held_out = held_out.latents(min(settings.held_out, settings.train.held_out), cache, device)
        self.wanted = torch.cat([decode(teacher, part, device).cpu() for part in _parts(self.held_out)])
        chosen = self.data.indices(["val_combo"])
        pictures = self.data.images[spread(chosen, min(_REAL, settings.train.held_out))]
        self.real = torch.cat([to_tensor(part) for part in _parts(pictures)])
        with torch.no_grad():
            means = [teacher.encode(part.to(device)).latent_dist.mean.cpu() for part in self.real.split(32)]
        self.encoded = torch.cat(means)

    def to(self, device: torch.device) -> None:
        """The teacher is needed where its pictures are not kept; its encoder is the feature loss's network."""
        self.device = device
        self.teacher.to(device)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        """Logs the terms unweighted."""
        settings, latents = self.settings, self.latents[batch.indices]
        if self.targets is None:
            with torch.autocast(self.device.type, enabled=False):
                wanted = decode(self.teacher, latents, self.device)
        else:
            wanted = torch.from_numpy(self.targets[batch.indices]).to(self.device).float()
        z = torch.from_numpy(latents).to(self.device).float() / self.teacher.config.scaling_factor
        picture = model(z).float()
        mse = F.mse_loss(picture, wanted)
        logged = {"mse": mse.item()}
        if settings.loss == "mse+l1":
            more, weight = F.l1_loss(picture, wanted), settings.l1_weight
        elif self.features is not None:
            more, weight = self.features.distance(picture, wanted), settings.feature_weight
        else:
            return mse, logged
        return mse + weight * more, logged | {settings.loss.removeprefix("mse+"): more.item()}

    @torch.no_grad()
    def decoded(self, model: nn.Module, z: torch.Tensor) -> torch.Tensor:
        """Pictures [B, 3, H, W] of latents that are divided by the scaling factor."""
        return torch.cat([model(part.to(self.device)).float().cpu() for part in z.split(32)])

    @torch.no_grad()
    def validate(self, model: nn.Module) -> dict[str, float]:
        """Mean PSNR and SSIM to the teacher's pictures of held-out captions; PSNR to encoded held-out pictures."""
        z = torch.from_numpy(np.asarray(self.held_out, dtype=np.float32)) / self.teacher.config.scaling_factor

        def to_teacher(rows: torch.Tensor) -> torch.Tensor:
            pictures = self.decoded(model, z[rows])
            return torch.stack([psnr(pictures, self.wanted[rows]), ssim(pictures, self.wanted[rows])], 1)

        def to_real(rows: torch.Tensor) -> torch.Tensor:
            return psnr(self.decoded(model, self.encoded[rows]), self.real[rows])[:, None]

        teacher, similarity = shared(len(z), 2, to_teacher).mean(0).tolist()
        real = shared(len(self.real), 1, to_real).mean().item()
        return {"val_psnr_db": teacher, "val_ssim": similarity, "val_real_psnr_db": real}

    def teacher_real_psnr(self) -> float:
        """What the teacher reaches in `val_real_psnr_db`."""
        network = DecoderNetwork(self.teacher)
        found = psnr(self.decoded(network, self.encoded), self.real).mean().item()
        self.teacher.requires_grad_(False)
        return found

    def preview(self, model: nn.Module) -> Image.Image:
        """Held-out latents decoded by the teacher (upper rows) and the student (lower rows)."""
        count = min(24, len(self.wanted))
        z = torch.from_numpy(np.asarray(self.held_out[:count], dtype=np.float32)) / self.teacher.config.scaling_factor
        rows = []
        for first in range(0, count, 12):
            part = slice(first, first + 12)
            pair = (self.wanted[:count][part], self.decoded(model, z[part]))
            rows += [np.concatenate(list(to_uint8(pictures)), axis=1) for pictures in pair]
        rows = [np.pad(row, ((0, 0), (0, rows[0].shape[1] - row.shape[1]), (0, 0))) for row in rows]
        sheet = Image.fromarray(np.concatenate(rows))
        return sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.NEAREST)


def _parts(values: np.ndarray) -> list[np.ndarray]:
    return np.array_split(values, -(-len(values) // 32))


def check_latents(folder: Path, sampler: Path) -> None:
    """Raises PocketfusionError, naming what differs, unless `sampler` draws latents that `folder`'s decoder takes."""
    vaes = [AutoencoderKL.load_config(path / "vae") for path in (folder, sampler)]
    found = [
        f"{name.replace('_', ' ')} ({vaes[0].get(name)} and {vaes[1].get(name)})"
        for name in ("latent_channels", "scaling_factor")
        if vaes[0].get(name) != vaes[1].get(name)
    ]
    if weights_hash(folder / "vae", ENCODER) != weights_hash(sampler / "vae", ENCODER):
        found.append("the autoencoder's encoder")
    if found:
        raise PocketfusionError(
            f"{sampler} draws other latents than {folder} decodes, they differ in {', '.join(found)}: choose a "
            "--sampler with the same autoencoder"
        )


def copy_with_vae(source: Path, out: Path, vae: SlimAutoencoderKL) -> None:
    """`copy_folder` with `vae` in place of the source's own.

    Weights are saved in the type that the source's have, so that the encoder's are the same bits.
    """
    copy_folder(source, out, vae=[type(vae).__module__, type(vae).__name__])
    kinds = {tensor["dtype"] for file in (source / "vae").glob("*.safetensors") for tensor in _header(file).values()}
    vae.to(torch.float16 if kinds == {"F16"} else torch.float32)
    vae.save_pretrained(out / "vae", safe_serialization=True)
    vae.to(torch.float32)
    if (source / "vae" / PROVENANCE).is_file():  # the autoencoder's, whose encoder it still is
        shutil.copyfile(source / "vae" / PROVENANCE, out / "vae" / PROVENANCE)


def _header(file: Path) -> dict[str, dict[str, Any]]:
    return read_safetensors_header(file)[0]


def decoder_shape(vae: AutoencoderKL, preset: str, ratio: float | None) -> DecoderShape:
    """The student's shape; `ratio` None is the preset's. Raises PocketfusionError if it cannot be."""
    make = {"half": half_shape, "tiny": tiny_shape}[preset]
    return make(vae) if ratio is None else make(vae, ratio)


def distill_decoder(
    recipe: Recipe,
    data: CaptionedImages,
    folder: Path,
    stage: StageRun,
    settings: DecoderDistillSettings,
    *,
    ratio: float | None = None,
    sampler: Path | None = None,
    cache: Path | None = None,
) -> Provenance:
    """Prunes `folder`'s decoder, trains it on latents that `sampler` (default `folder`) draws, writes a model folder.

    Raises PocketfusionError as `train` does, and if the two folders' latents differ, the shape cannot be, there are no
    captions, or the teacher gives NaN.
    """
    sampler = sampler or folder
    for path in {folder, sampler}:
        check_folder(path)
    check_latents(folder, sampler)
    teacher = load_vae(folder / "vae")
    check_finite(teacher, str(folder / "vae"))
    shape = decoder_shape(teacher, settings.preset, ratio)
    made_by = {
        "stage": "distill-decoder",
        "settings": settings.model_dump(mode="json")
        | {"block_out_channels": list(shape.block_out_channels), "layers_per_block": shape.layers_per_block}
        | {"mid_block_add_attention": shape.mid_block_add_attention, "scene_share": recipe.data.scene_share},
        "parents": {"folder": folder_hash(folder), "sampler": folder_hash(sampler)},
        "data": {"name": data.name, "fingerprint": data.fingerprint},
    }
    if (finished := finished_result(stage, made_by)) is not None:
        return finished
    slim = prune_decoder(teacher, shape)
    slim.requires_grad_(False)
    task = DecoderTask(settings, data, teacher, slim)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae_hash = sha256(f"{weights_hash(folder / 'vae')}{teacher.config.scaling_factor}".encode()).hexdigest()
    with process_state().main_process_first():  # one process fills the caches, the others find them
        place = cache or stage.run / "cache"
        task.prepare(LatentSampler(sampler), vae_hash, recipe.data.scene_share, place, device)

    def write(out: Path, result: TrainResult) -> dict[str, Any]:
        copy_with_vae(folder, out, slim)
        task.preview(result.model).save(out / "preview.png")
        sizes = [sum(p.numel() for p in DecoderNetwork(vae).parameters()) for vae in (teacher, slim)]
        return {
            "teacher_real_psnr_db": task.teacher_real_psnr(),
            "parameters": sizes[1],
            "teacher_parameters": sizes[0],
        }

    def reopen(folder: Path) -> nn.Module:
        return DecoderNetwork(load_vae(folder / "vae"))

    return run_stage(stage, task, settings.train, made_by, write, reopen)
