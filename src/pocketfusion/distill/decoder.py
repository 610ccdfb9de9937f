"""`distill-decoder`: a smaller decoder that draws the teacher's pictures of sampled latents (SnapFusion 3.2, B.2)."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
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
from pocketfusion.distill.decoder_pool import EncodedPictures, LatentSampler, Pool, decode, decode_pool, pool_settings
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
from pocketfusion.locks import hold
from pocketfusion.models.dual_encoder import JudgeModel, load_judge
from pocketfusion.models.slim_autoencoder import DecoderShape, SlimAutoencoderKL, load_vae, to_tensor, to_uint8
from pocketfusion.models.writing import copy_folder
from pocketfusion.processes import process_state
from pocketfusion.recipe import DataSettings, DecoderDistillSettings, Recipe
from pocketfusion.safetensors_header import read_safetensors_header
from pocketfusion.train.autoencoder import PictureLoss, psnr
from pocketfusion.train.batch import Batch, BatchPlan, shared, spread
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
    """`PictureLoss` to the teacher's pictures of drawn latents (SnapFusion) and to training pictures that are encoded.

    `prepare` fills `latents` and `held_out` (fp16 [N, C, h, w]) before the first call. Raises PocketfusionError if a
    batch is too small for `encoded_share`, or the loss and the judge do not fit.
    """

    def __init__(
        self,
        settings: DecoderDistillSettings,
        pictures: DataSettings,
        data: CaptionedImages,
        teacher: AutoencoderKL,
        vae: Any,
        judge: JudgeModel | None = None,
    ):
        self.settings, self.data, self.teacher = settings, data, teacher
        self.model = DecoderNetwork(vae)
        self.picture_loss = PictureLoss(settings.loss, judge)
        self.scene_share = pictures.scene_share
        count, share = settings.samples, settings.encoded_share
        self.encoded = EncodedPictures(pictures, data) if share else None
        pools = [(np.arange(count), 1 - share)]
        if self.encoded is not None:  # the numbers from `count` on are its rows
            pools += [(count + rows, share * part) for rows, part in self.encoded.pools]
        self.plan = BatchPlan(pools, settings.train.batch_size, settings.train.seed)
        if share and self.plan.counts[0] == settings.train.batch_size:
            raise PocketfusionError(
                f"decoder.encoded_share {share:g} of a batch of {settings.train.batch_size} is less than one picture: "
                "choose a larger share, or 0"
            )
        self.device = torch.device("cpu")
        self.latents = self.held_out = np.empty(0)
        self.targets: np.ndarray | None = None

    def encode(self, encoder_hash: str, cache: Path, device: torch.device) -> None:
        """Encodes pictures, if they have a share; later runs find them. All processes must call it together."""
        if self.encoded is not None:
            self.encoded.prepare(self.teacher.to(device), encoder_hash, cache, device)

    def prepare(self, sampler: LatentSampler, vae_hash: str, cache: Path, device: torch.device) -> None:
        """Draws the latents and decodes them with the teacher; later runs find all but held-out ones.

        `vae_hash`: of the whole autoencoder. Raises PocketfusionError if there are no captions, the sampler's
        guidance does not fit or the teacher gives NaN.
        """
        settings, teacher = self.settings, self.teacher.to(device)
        how = pool_settings(settings, sampler.sampling)
        pool = Pool(sampler, how, self.data, (("train", 1 - self.scene_share), ("train_scene", self.scene_share)))
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
        self.real_latents = torch.cat(means)

    def to(self, device: torch.device) -> None:
        """The teacher is needed where its pictures are not kept."""
        self.device = device
        self.teacher.to(device)
        self.picture_loss.to(device)

    def pairs(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch's latents [B, C, h, w], unscaled, and wanted pictures [B, 3, H, W]; drawn ones first."""
        is_drawn = batch.indices < self.settings.samples
        drawn, rows = batch.indices[is_drawn], batch.indices[~is_drawn] - self.settings.samples
        found = []
        if len(drawn):
            latents = self.latents[drawn]
            if self.targets is None:
                with torch.autocast(self.device.type, enabled=False):
                    wanted = decode(self.teacher, latents, self.device)
            else:
                wanted = torch.from_numpy(self.targets[drawn]).float()
            found.append((torch.from_numpy(latents).float() / self.teacher.config.scaling_factor, wanted))
        if self.encoded is not None and len(rows):
            found.append(self.encoded.take(rows, batch, ~is_drawn))
        z, wanted = (torch.cat([part.to(self.device) for part in parts]) for parts in zip(*found, strict=True))
        return z, wanted

    def loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        """See the class; logs the terms unweighted."""
        z, wanted = self.pairs(batch)
        return self.picture_loss(model(z), wanted, batch.step / self.settings.train.steps)

    @torch.no_grad()
    def decoded(self, model: nn.Module, z: torch.Tensor) -> torch.Tensor:
        """Pictures [B, 3, H, W] of latents that are divided by the scaling factor."""
        return torch.cat([model(part.to(self.device)).float().cpu() for part in z.split(32)])

    @torch.no_grad()
    def validate(self, model: nn.Module) -> dict[str, float]:
        """Mean PSNR and SSIM to the teacher's pictures of held-out captions; PSNR to encoded held-out pictures.

        `val_colour_offset_share`: of the squared error to the teacher's pictures, see `error_parts`.
        """
        z = torch.from_numpy(np.asarray(self.held_out, dtype=np.float32)) / self.teacher.config.scaling_factor

        def to_teacher(rows: torch.Tensor) -> torch.Tensor:
            pictures, wanted = self.decoded(model, z[rows]), self.wanted[rows]
            scores = torch.stack([psnr(pictures, wanted), ssim(pictures, wanted)], 1)
            return torch.cat([scores, error_parts(pictures, wanted)], 1)

        def to_real(rows: torch.Tensor) -> torch.Tensor:
            return psnr(self.decoded(model, self.real_latents[rows]), self.real[rows])[:, None]

        teacher, similarity, whole, constant = shared(len(z), 4, to_teacher).mean(0).tolist()
        return {
            "val_psnr_db": teacher,
            "val_ssim": similarity,
            "val_colour_offset_share": constant / whole if whole else 0.0,
            "val_real_psnr_db": shared(len(self.real), 1, to_real).mean().item(),
        }

    def teacher_real_psnr(self) -> float:
        """What the teacher reaches in `val_real_psnr_db`."""
        network = DecoderNetwork(self.teacher)
        found = psnr(self.decoded(network, self.real_latents), self.real).mean().item()
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
    loss_judge: Path | None = None,
    cache: Path | None = None,
) -> Provenance:
    """Prunes `folder`'s decoder, trains it on latents that `sampler` (default `folder`) draws, writes a model folder.

    `loss_judge`: a judge folder for the feature distance. Raises PocketfusionError as `train` does, and if the two
    folders' latents differ, the pictures have another size than the folder draws, the shape cannot be, there are no
    captions, the teacher gives NaN, or the losses and the judge do not fit.
    """
    sampler = sampler or folder
    for path in {folder, sampler}:
        check_folder(path)
    check_latents(folder, sampler)
    teacher = load_vae(folder / "vae")
    check_finite(teacher, str(folder / "vae"))
    shape = decoder_shape(teacher, settings.preset, ratio)
    drawing = LatentSampler(sampler)
    side = drawing.shape[-1] * 2 ** (len(teacher.config.block_out_channels) - 1)
    if side != data.size:
        raise PocketfusionError(
            f"{sampler} draws pictures of {side} px and the recipe {recipe.name} is for {data.size}: use the recipe "
            "of that model"
        )
    how = pool_settings(settings, drawing.sampling)
    made_by = {
        "stage": "distill-decoder",
        "settings": settings.model_dump(mode="json")
        | {"num_inference_steps": how.num_inference_steps, "guidance_scale": list(how.guidance_scale)}
        | asdict(shape)
        | {"block_out_channels": list(shape.block_out_channels)}
        | {"data": recipe.data.model_dump(mode="json")},
        "parents": {"folder": folder_hash(folder), "sampler": folder_hash(sampler)}
        | ({"loss_judge": folder_hash(loss_judge)} if loss_judge else {}),
        "data": {"name": data.name, "fingerprint": data.fingerprint},
    }
    if (finished := finished_result(stage, made_by)) is not None:
        return finished
    slim = prune_decoder(teacher, shape)
    slim.requires_grad_(False)
    judge = load_judge(loss_judge, for_losses=True).model if loss_judge else None
    task = DecoderTask(settings, recipe.data, data, teacher, slim, judge)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae_hash = sha256(f"{weights_hash(folder / 'vae')}{teacher.config.scaling_factor}".encode()).hexdigest()
    hold(stage.run)  # the caches lie in it
    place = cache or stage.run / "cache"
    task.encode(weights_hash(folder / "vae", ENCODER), place, device)
    with process_state().main_process_first():  # one process fills the caches, the others find them
        task.prepare(drawing, vae_hash, place, device)

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


def error_parts(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Squared error of pictures in [-1, 1], [B, C, H, W], and what of it is one constant a channel → [B, 2].

    The colour that a picture is off by as a whole: about 0.02 of the error of a decoder that is merely blurred, a
    quarter for one that cannot carry a flat colour.
    """
    error = a.float().clamp(-1, 1) - b.float().clamp(-1, 1)
    whole, constant = error.square().mean((1, 2, 3)), error.mean((2, 3)).square().mean(1)
    return torch.stack([whole, constant], 1).cpu()


def ssim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Structural similarity (Wang et al. 2004) of pictures in [-1, 1], [B, C, H, W] → [B].

    11x11 Gaussian window of σ 1.5, K = (0.01, 0.03), mean over channels and positions; the edges are reflected.
    """
    a, b = a.float().clamp(-1, 1), b.float().clamp(-1, 1)
    x = torch.arange(-5.0, 6.0, device=a.device)
    line = torch.exp(-((x / 1.5) ** 2) / 2)
    line = line / line.sum()
    channels = a.shape[1]
    window = (line[:, None] * line).expand(channels, 1, 11, 11)

    def mean(values: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.pad(values, [5] * 4, mode="reflect"), window, groups=channels)

    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    score = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    score = score / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return score.flatten(1).mean(1).cpu()
