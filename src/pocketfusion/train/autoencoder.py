"""`train-autoencoder`: SD's AutoencoderKL on the pictures alone (reconstruction, KL), with its scaling factor."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import nn
from torch.nn import functional as F

from pocketfusion.data.packed import CaptionedImages
from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import Provenance, read_provenance
from pocketfusion.recipe import Recipe
from pocketfusion.train.batch import Batch, BatchPlan
from pocketfusion.train.loop import TrainResult
from pocketfusion.train.place import StageRun
from pocketfusion.train.stage import finished_result, run_stage

VALIDATION = ("val_combo", "val_concept")


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 [B, H, W, 3] → fp32 [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """[B, 3, H, W] in [-1, 1] → uint8 [B, H, W, 3]."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """PSNR in dB of each picture for values in [-1, 1] (peak 2), [B]; equal pictures give 100."""
    mse = (a.clamp(-1, 1) - b.clamp(-1, 1)).float().square().flatten(1).mean(1)
    return (10 * torch.log10(4 / mse.clamp_min(4e-10))).cpu()


class AutoencoderTask:
    """Mean squared error + `l1_weight` × absolute error + `kl_weight` × KL to the unit Gaussian per latent element."""

    def __init__(self, recipe: Recipe, data: CaptionedImages, model: AutoencoderKL):
        settings = recipe.autoencoder
        self.settings, self.data, self.model = settings, data, model
        train = [(data.indices(["train"]), 1 - recipe.data.scene_share)]
        if "train_scene" in data.splits and recipe.data.scene_share:
            train.append((data.indices(["train_scene"]), recipe.data.scene_share))
        self.plan = BatchPlan(train, settings.train.batch_size, settings.train.seed)
        self.held_out = data.indices(VALIDATION)[::4]
        self.flip, self.device = recipe.data.flip, torch.device("cpu")

    def to(self, device: torch.device) -> None:
        """Pictures are moved batch by batch."""
        self.device = device

    def loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        """See the class."""
        pixels = to_tensor(self.data.images[batch.indices])
        if self.flip:  # every mirrored drawing is a good picture when no caption is involved
            mirrored = batch.rand() < 0.5
            pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
        pixels = pixels.to(self.device)
        height, width = (side // 2 ** (len(self.model.config.block_out_channels) - 1) for side in pixels.shape[2:])
        noise = batch.randn(self.model.config.latent_channels, height, width).to(self.device)
        # encode and decode are reached through forward() so that accelerate's wrappers see the call
        posterior, image = model(pixels, noise)
        mse, l1 = F.mse_loss(image, pixels), F.l1_loss(image, pixels)
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).float().mean()
        loss = mse + self.settings.l1_weight * l1 + self.settings.kl_weight * kl
        return loss, {"mse": mse.item(), "kl": kl.item()}

    @torch.no_grad()
    def reconstruct(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Held-out pictures and their reconstructions from the latents' means, [-1, 1]."""
        pixels = [to_tensor(self.data.images[part]) for part in np.array_split(indices, max(1, len(indices) // 32))]
        images = [
            self.model.decode(self.model.encode(x.to(self.device)).latent_dist.mean).sample.cpu() for x in pixels
        ]
        return torch.cat(pixels), torch.cat(images)

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Mean of the pictures' PSNR on a quarter of the validation pictures."""
        return {"val_psnr_db": psnr(*self.reconstruct(self.held_out)).mean().item()}

    def preview(self, model: nn.Module) -> Image.Image:
        """Held-out pictures above their reconstructions."""
        pixels, images = self.reconstruct(self.held_out[:: max(1, len(self.held_out) // 10)][:10])
        rows = [np.concatenate(list(to_uint8(row)), axis=1) for row in (pixels, images)]
        return Image.fromarray(np.concatenate(rows)).resize((rows[0].shape[1] * 2, rows[0].shape[0] * 4), 0)


class TrainableAutoencoder(nn.Module):
    """AutoencoderKL whose forward takes the noise, so that sampling is the loop's and repeats to the sample."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    @property
    def config(self):
        """The autoencoder's configuration."""
        return self.vae.config

    def encode(self, x: torch.Tensor):
        """`AutoencoderKL.encode`."""
        return self.vae.encode(x)

    def decode(self, z: torch.Tensor):
        """`AutoencoderKL.decode`."""
        return self.vae.decode(z)

    def forward(self, pixels: torch.Tensor, noise: torch.Tensor):
        """(posterior, reconstruction from mean + std × noise)."""
        posterior = self.vae.encode(pixels).latent_dist
        return posterior, self.vae.decode(posterior.mean + posterior.std * noise).sample


@torch.no_grad()
def latent_std(vae: AutoencoderKL, data: CaptionedImages, samples: int = 1024) -> float:
    """Standard deviation of the training latents: SD's `scaling_factor` is its inverse."""
    indices = data.indices(["train"])
    chosen = indices[:: max(1, len(indices) // samples)]
    device = next(vae.parameters()).device
    pixels = [to_tensor(data.images[part]).to(device) for part in np.array_split(chosen, min(32, len(chosen)))]
    return torch.cat([vae.encode(x).latent_dist.mean for x in pixels]).float().std().item()


def train_autoencoder(recipe: Recipe, data: CaptionedImages, stage: StageRun, init: Path | None = None) -> Provenance:
    """Trains the recipe's autoencoder and writes a folder with diffusers' `config.json` and fp32 safetensors.

    `init` continues from an autoencoder folder's weights. Raises PocketfusionError as `train` does.
    """
    identity = {
        "stage": "train-autoencoder",
        "settings": recipe.autoencoder.model_dump(mode="json") | {"data": recipe.data.model_dump(mode="json")},
        "parents": {},
        "data": {"name": data.name, "fingerprint": data.fingerprint},
    }
    samples_before = 0
    if init is not None:
        before = read_provenance(init)
        samples_before = before.samples_seen if before else 0
    if (finished := finished_result(stage, identity)) is not None:
        return finished
    torch.manual_seed(recipe.autoencoder.train.seed)
    try:
        vae = (
            AutoencoderKL.from_pretrained(init, torch_dtype=torch.float32)
            if init
            else AutoencoderKL(**recipe.autoencoder.config)
        )
    except (TypeError, ValueError, OSError) as error:
        raise PocketfusionError(f"the autoencoder cannot be made ({str(error).splitlines()[0]})") from None
    task = AutoencoderTask(recipe, data, TrainableAutoencoder(vae))  # type: ignore[arg-type]

    def write(folder: Path, result: TrainResult) -> dict:
        factor = 1 / latent_std(vae, data)
        vae.register_to_config(scaling_factor=round(factor, 5))
        vae.save_pretrained(folder, safe_serialization=True)
        results: dict[str, float] = {"latent_scaling_factor": round(factor, 5)}
        for split in ("train", "val_combo", "test_combo", "test_concept"):
            if split in data.splits:
                chosen = data.splits[split][:: max(1, len(data.splits[split]) // 256)]
                results[f"{split}_psnr_db"] = round(psnr(*task.reconstruct(chosen)).mean().item(), 2)
        task.preview(vae).save(folder / "reconstructions.png")
        return {k: v for k, v in results.items() if math.isfinite(v)}

    return run_stage(stage, task, recipe.autoencoder.train, identity, write, samples_before)
