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
from pocketfusion.folder import Provenance, folder_hash, read_provenance
from pocketfusion.models.dual_encoder import JudgeModel, load_judge
from pocketfusion.models.loading import load_part
from pocketfusion.models.slim_autoencoder import to_tensor, to_uint8
from pocketfusion.recipe import PictureLossSettings, Recipe
from pocketfusion.train.batch import Batch, BatchPlan, shared, spread
from pocketfusion.train.loop import TrainResult
from pocketfusion.train.place import StageRun
from pocketfusion.train.stage import finished_result, run_stage

COLOUR_BLOCK = 8  #: pixels of a side


def gradient_loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean absolute error of the differences of neighbours across and down, at full and half size; scalar, fp32.

    Edges count for what they are, where the mean error of pixels lets them be blurred. [B, C, H, W] each.
    """
    error = a.float() - b.float()  # differences are linear: those of the error are the error of the differences
    terms = []
    for e in (error, F.avg_pool2d(error, 2)):
        terms += [(e[..., 1:] - e[..., :-1]).abs().mean(), (e[..., 1:, :] - e[..., :-1, :]).abs().mean()]
    return torch.stack(terms).mean()


def colour_loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean absolute error of the means of 8x8 pixels; scalar, fp32. [B, C, H, W] each.

    Flat colours count for what they are: an autoencoder with few channels keeps edges and gives up the hues that are
    rare in the data, which a mean over pixels hardly notices and the eye does.
    """
    return F.avg_pool2d(a.float() - b.float(), COLOUR_BLOCK).abs().mean()


class PictureLoss(nn.Module):
    """The weighted sum of `PictureLossSettings`; every term is a mean, so parts of a batch average to the whole.

    The feature distance is LPIPS's (arXiv 1801.03924) without its learned weights: squared differences of a frozen
    judge's maps of unit length over channels, summed over channels, mean over positions and stages. Raises
    PocketfusionError if it has a weight and no judge is given, or a judge that scores.
    """

    def __init__(self, settings: PictureLossSettings, judge: JudgeModel | None = None):
        super().__init__()
        if settings.feature_weight and judge is None:
            raise PocketfusionError(
                f"feature_weight is {settings.feature_weight:g}, which needs a judge for losses: train one with "
                "'train-judge --for-losses' and give it as --loss-judge"
            )
        self.settings, self.judge = settings, judge if settings.feature_weight else None
        if self.judge is not None:
            if not self.judge.config.for_losses:
                raise PocketfusionError("the judge that scores must not be trained against: give one --for-losses")
            self.judge.requires_grad_(False).eval()

    def maps(self, pictures: torch.Tensor) -> list[torch.Tensor]:
        """[B, 3, H, W] in [-1, 1] → the judge's maps of unit length over channels, [B, C, h, w] each."""
        assert self.judge is not None
        return [F.normalize(found.float(), dim=1) for found in self.judge.maps(pictures)]

    def feature_distance(self, picture: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """See the class; no gradient reaches `wanted`."""
        with torch.no_grad():
            goal = self.maps(wanted)
        terms = [(a - b).square().sum(1).mean() for a, b in zip(self.maps(picture), goal, strict=True)]
        return torch.stack(terms).mean()

    def forward(
        self, picture: torch.Tensor, wanted: torch.Tensor, progress: float = 1.0
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """(loss, its terms unweighted) of pictures [B, 3, H, W] in [-1, 1]; `progress`: share of training done."""
        settings, picture, wanted = self.settings, picture.float(), wanted.float()
        terms: list[tuple[str, float, torch.Tensor]] = [("mse", settings.mse_weight, F.mse_loss(picture, wanted))]
        if settings.l1_weight:
            terms.append(("l1", settings.l1_weight, F.l1_loss(picture, wanted)))
        if settings.gradient_weight:
            terms.append(("gradient", settings.gradient_weight, gradient_loss(picture, wanted)))
        if settings.colour_weight:
            terms.append(("colour", settings.colour_weight, colour_loss(picture, wanted)))
        if self.judge is not None and progress >= settings.feature_start:
            terms.append(("features", settings.feature_weight, self.feature_distance(picture, wanted)))
        loss = torch.stack([weight * term for _, weight, term in terms]).sum()
        return loss, {name: term.item() for name, _, term in terms}


VALIDATION = ("val_combo", "val_concept")


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """PSNR in dB of each picture for values in [-1, 1] (peak 2), [B]; equal pictures give 100."""
    mse = (a.clamp(-1, 1) - b.clamp(-1, 1)).float().square().flatten(1).mean(1)
    return (10 * torch.log10(4 / mse.clamp_min(4e-10))).cpu()


class AutoencoderTask:
    """`PictureLoss` of the reconstruction + `kl_weight` × KL to the unit Gaussian per latent element.

    + `latent_colour_weight` × the mean absolute error of the mean colour of each latent's own pixels, as a linear map
    reads it there. Without it the latents may leave out a hue that is rare in the data and let the decoder guess it
    from the others (green against magenta: R² 0.05 of such a map, where brightness had 0.94).

    On random crops until `crop_until` of the steps (fully convolutional networks learn as much from them, several
    times faster), then on whole pictures, on which group norms and attention see what they will be used on.
    """

    def __init__(self, recipe: Recipe, data: CaptionedImages, model: AutoencoderKL, judge: JudgeModel | None = None):
        settings = recipe.autoencoder
        self.settings, self.data, self.model = settings, data, model
        self.factor = 2 ** (len(model.config.block_out_channels) - 1)
        crop = settings.crop_size
        if crop is not None and (crop % self.factor or crop > data.size):
            raise PocketfusionError(
                f"autoencoder.crop_size {crop} does not fit: give a multiple of {self.factor} up to {data.size}"
            )
        self.picture_loss = PictureLoss(settings.loss, judge)
        train = [(data.indices(["train"]), 1 - recipe.data.scene_share)]
        if "train_scene" in data.splits and recipe.data.scene_share:
            train.append((data.indices(["train_scene"]), recipe.data.scene_share))
        self.plan = BatchPlan(train, settings.train.batch_size, settings.train.seed)
        self.held_out = spread(data.indices(VALIDATION)[::4], settings.train.held_out)
        self.flip, self.device = recipe.data.flip, torch.device("cpu")

    def to(self, device: torch.device) -> None:
        """Pictures are moved batch by batch."""
        self.device = device
        self.picture_loss.to(device)

    def pictures(self, batch: Batch) -> torch.Tensor:
        """The batch's pictures [B, 3, H, W], mirrored at random; crops begin at multiples of the latents' factor."""
        pixels = to_tensor(self.data.images[batch.indices])
        if self.flip:  # every mirrored drawing is a good picture when no caption is involved
            mirrored = batch.rand() < 0.5
            pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
        crop = self.settings.crop_size
        if crop is None or batch.step >= self.settings.crop_until * self.settings.train.steps:
            return pixels
        places = (pixels.shape[-1] - crop) // self.factor + 1
        corners = zip(pixels, batch.randint(places) * self.factor, batch.randint(places) * self.factor, strict=True)
        return torch.stack([picture[:, y : y + crop, x : x + crop] for picture, x, y in corners])

    def loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        """See the class."""
        pixels = self.pictures(batch).to(self.device)
        height, width = (side // self.factor for side in pixels.shape[2:])
        noise = batch.randn(self.model.config.latent_channels, height, width).to(self.device)
        # encode and decode are reached through forward() so that accelerate's wrappers see the call
        posterior, image, colours = model(pixels, noise)
        loss, logged = self.picture_loss(image, pixels, batch.step / self.settings.train.steps)
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        loss, logged = loss + self.settings.kl_weight * kl, {**logged, "kl": kl.item()}
        if colours is not None:
            colour = F.l1_loss(colours.float(), F.avg_pool2d(pixels, self.factor))
            loss, logged = (
                loss + self.settings.latent_colour_weight * colour,
                {**logged, "latent_colour": colour.item()},
            )
        return loss, logged

    @torch.no_grad()
    def reconstruct(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Held-out pictures and their reconstructions from the latents' means, [-1, 1]."""
        pixels = [to_tensor(self.data.images[part]) for part in np.array_split(indices, max(1, len(indices) // 32))]
        images = [
            self.model.decode(self.model.encode(x.to(self.device)).latent_dist.mean).sample.cpu() for x in pixels
        ]
        return torch.cat(pixels), torch.cat(images)

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Mean of the pictures' PSNR on the held-out ones, and that of their means over 8x8 pixels: their colours."""

        def found(rows: torch.Tensor) -> torch.Tensor:
            both = self.reconstruct(self.held_out[rows.numpy()])
            return torch.stack([psnr(*both), psnr(*(F.avg_pool2d(one, COLOUR_BLOCK) for one in both))], 1)

        whole, colours = shared(len(self.held_out), 2, found).mean(0).tolist()
        return {"val_psnr_db": whole, "val_colour_psnr_db": colours}

    def preview(self, model: nn.Module) -> Image.Image:
        """Held-out pictures above their reconstructions."""
        pixels, images = self.reconstruct(self.held_out[:: max(1, len(self.held_out) // 10)][:10])
        rows = [np.concatenate(list(to_uint8(row)), axis=1) for row in (pixels, images)]
        return Image.fromarray(np.concatenate(rows)).resize((rows[0].shape[1] * 2, rows[0].shape[0] * 4), 0)


class TrainableAutoencoder(nn.Module):
    """AutoencoderKL whose forward takes the noise, so that sampling is the loop's and repeats to the sample.

    `colour`, where wanted, reads mean colours [B, 3, h, w] in latents; it is trained beside, not part of the result.
    """

    def __init__(self, vae: AutoencoderKL, colour: bool = False):
        super().__init__()
        self.vae = vae
        self.colour = nn.Conv2d(vae.config.latent_channels, 3, 1) if colour else None

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
        """(posterior, reconstruction from z = mean + std × noise, colours of z or None)."""
        posterior = self.vae.encode(pixels).latent_dist
        z = posterior.mean + posterior.std * noise
        return posterior, self.vae.decode(z).sample, self.colour(z) if self.colour else None


@torch.no_grad()
def latent_statistics(vae: AutoencoderKL, data: CaptionedImages, samples: int = 1024) -> tuple[torch.Tensor, ...]:
    """Means [C] and standard deviations [C] of the training latents' channels, and the deviation of all, scalar."""
    indices = data.indices(["train"])
    chosen = indices[:: max(1, len(indices) // samples)]
    device = next(vae.parameters()).device
    pixels = [to_tensor(data.images[part]).to(device) for part in np.array_split(chosen, -(-len(chosen) // 32))]
    means = torch.cat([vae.encode(x).latent_dist.mean for x in pixels]).double().cpu()
    return means.mean((0, 2, 3)).float(), means.std((0, 2, 3)).float(), means.std().float()


@torch.no_grad()
def fold_whitening(vae: AutoencoderKL, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Gives the latents' channels mean 0 and deviation 1, in place: z' = (z - mean) / std; pictures stay the same.

    A diffusion starts from N(0, 1) and adds the same noise to every channel, so channels should be alike; SD's one
    `scaling_factor` leaves them as uneven as they are. `quant_conv` gives means and log-variances, so its rows become
    W / std, (b - mean) / std and W, b - 2 log std; `post_quant_conv` takes the inverse. Exact, and stock diffusers.
    """
    before, after = vae.quant_conv, vae.post_quant_conv
    if before is None or after is None:
        raise PocketfusionError("autoencoder.whiten needs use_quant_conv and use_post_quant_conv in its config")
    mean, std = (values.to(before.weight) for values in (mean, std))
    channels = len(mean)
    before.weight[:channels] /= std[:, None, None, None]
    before.bias[:channels] = (before.bias[:channels] - mean) / std
    before.bias[channels:] -= 2 * std.log()
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= std[None, :, None, None]


def train_autoencoder(
    recipe: Recipe,
    data: CaptionedImages,
    stage: StageRun,
    init: Path | None = None,
    loss_judge: Path | None = None,
) -> Provenance:
    """Trains the recipe's autoencoder and writes a folder with diffusers' `config.json` and fp32 safetensors.

    `init` continues from an autoencoder folder's weights; `loss_judge` is a judge folder for the feature distance.
    Raises PocketfusionError as `train` does, and if the losses and the judge do not fit.
    """
    identity = {
        "stage": "train-autoencoder",
        "settings": recipe.autoencoder.model_dump(mode="json") | {"data": recipe.data.model_dump(mode="json")},
        "parents": {"loss_judge": folder_hash(loss_judge)} if loss_judge else {},
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
        vae = load_part(AutoencoderKL, init) if init else AutoencoderKL(**recipe.autoencoder.config)
    except (TypeError, ValueError) as error:
        raise PocketfusionError(f"the autoencoder cannot be made ({str(error).splitlines()[0]})") from None
    judge = load_judge(loss_judge, for_losses=True).model if loss_judge else None
    colour = recipe.autoencoder.latent_colour_weight > 0
    task = AutoencoderTask(recipe, data, TrainableAutoencoder(vae, colour), judge)  # type: ignore[arg-type]

    def write(folder: Path, result: TrainResult) -> dict:
        mean, std, overall = latent_statistics(vae, data)
        if recipe.autoencoder.whiten:
            fold_whitening(vae, mean, std)
        factor = 1.0 if recipe.autoencoder.whiten else 1 / overall.item()
        vae.register_to_config(scaling_factor=round(factor, 5))
        vae.save_pretrained(folder, safe_serialization=True)
        results: dict[str, float] = {"latent_scaling_factor": round(factor, 5)}
        for split in ("train", "val_combo", "test_combo", "test_concept"):
            if split in data.splits:
                chosen = data.splits[split][:: max(1, len(data.splits[split]) // 256)]
                results[f"{split}_psnr_db"] = round(psnr(*task.reconstruct(chosen)).mean().item(), 2)
        task.preview(vae).save(folder / "reconstructions.png")
        return {k: v for k, v in results.items() if math.isfinite(v)}

    def reopen(folder: Path) -> nn.Module:
        return TrainableAutoencoder(AutoencoderKL.from_pretrained(folder), colour)

    return run_stage(stage, task, recipe.autoencoder.train, identity, write, reopen, samples_before)
