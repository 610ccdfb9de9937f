"""`train-teacher`: the base text-to-image UNet on cached latents and prompt states, and what a denoiser learns."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from PIL import Image
from torch import nn

from pocketfusion.data.packed import CaptionedImages
from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import ENCODER, Provenance, folder_hash, read_provenance, weights_hash
from pocketfusion.locks import hold
from pocketfusion.models.guided import sample_images
from pocketfusion.models.loading import load_part
from pocketfusion.models.sampling import Sampling
from pocketfusion.models.text_encoder import TextEncoder, check_text_encoder, load_text_encoder
from pocketfusion.models.writing import write_base_folder
from pocketfusion.recipe import Recipe, TrainSettings
from pocketfusion.train.batch import Batch, BatchPlan, in_buckets, of_one_bucket, shared, spread
from pocketfusion.train.cache import CachedStates, CaptionStates, LiveStates, cache_latents
from pocketfusion.train.loop import TrainResult
from pocketfusion.train.place import StageRun
from pocketfusion.train.stage import finished_result, run_stage

PREDICTION_TYPES = ("epsilon", "v_prediction")


def _column(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return values.to(like.device).view(-1, *[1] * (like.ndim - 1))


class DenoisingObjective:
    """ε- or v-prediction with min-SNR-γ weighting (Hang et al. 2023, eq. 6 and its v form).

    z_t = α_t x + σ_t ε; v = α_t ε − σ_t x (Salimans & Ho 2022). The weight of the mean squared error is
    min(SNR, γ)/SNR for ε and min(SNR, γ)/(SNR + 1) for v, with SNR = α²/σ²; both weigh the error of x by min(SNR, γ).
    Without γ the weight is 1.
    """

    def __init__(self, alphas_cumprod: torch.Tensor, prediction_type: str, min_snr_gamma: float | None):
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type '{prediction_type}' is not one of {', '.join(PREDICTION_TYPES)}")
        self.alpha, self.sigma = alphas_cumprod.float().sqrt(), (1 - alphas_cumprod.double()).sqrt().float()
        self.prediction_type, self.min_snr_gamma = prediction_type, min_snr_gamma

    def add_noise(self, x: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """z_t, same shape as x."""
        return _column(self.alpha[timesteps], x) * x + _column(self.sigma[timesteps], x) * noise

    def target(self, x: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the network shall predict, same shape as x."""
        if self.prediction_type == "epsilon":
            return noise
        return _column(self.alpha[timesteps], x) * noise - _column(self.sigma[timesteps], x) * x

    def weight(self, timesteps: torch.Tensor) -> torch.Tensor:
        """[B] weights of each sample's mean squared error."""
        if self.min_snr_gamma is None:
            return torch.ones(len(timesteps))
        snr = (self.alpha[timesteps] / self.sigma[timesteps]) ** 2
        clipped = snr.clamp(max=self.min_snr_gamma)
        return clipped / snr if self.prediction_type == "epsilon" else clipped / (snr + 1)

    def loss(
        self, prediction: torch.Tensor, x: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(weighted loss, plain mean squared error), both scalars in fp32."""
        error = (prediction.float() - self.target(x, noise, timesteps)).square().flatten(1).mean(1)
        return (error * self.weight(timesteps).to(error.device)).mean(), error.mean()


PREVIEW_PROMPTS = (
    "red apple, noto style",
    "grinning face, fluent 3d style",
    "dog face, twemoji style",
    "rocket, fluent flat style",
    "red heart, emojione style",
    "tree, fxemoji style",
    "a cat, fluent contrast style",
    "a blue car, noto style",
    "pizza, twemoji style",
    "sun, noto v1 style",
    "a dog left of a red apple on a yellow background, noto style",
    "two of grinning face on a blue background, twemoji style",
)


class Noised(NamedTuple):
    """A training batch on the device: latents [B, C, h, w], their noise and z_t, timesteps [B], states [B, T, D]."""

    x: torch.Tensor
    noise: torch.Tensor
    z_t: torch.Tensor
    timesteps: torch.Tensor
    states: torch.Tensor


class TeacherTask:
    """SD's training objective: a noised latent, its caption's states (dropped with `prompt_dropout`), the target.

    Until `half_size_until` of the steps the pictures are those of half the size, at a third of the time a sample (as
    SD was trained at 256 px before 512): captions, forms and colours are learnt there, detail after.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: CaptionedImages,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        text: TextEncoder,
        settings: TrainSettings | None = None,
        half_size_until: float = 0.0,
    ):
        settings = settings or recipe.teacher.train
        self.half_steps = round(half_size_until * settings.steps)
        self.halved = False  #: whether held-out figures and previews are of pictures of half the size
        self.settings, self.data, self.model, self.vae, self.text = recipe.teacher, data, unet, vae, text
        self.scheduler = DDIMScheduler(**recipe.teacher.scheduler)
        self.objective = DenoisingObjective(
            self.scheduler.alphas_cumprod, self.scheduler.config.prediction_type, recipe.teacher.min_snr_gamma
        )
        pools = [(data.indices(["train"]), 1 - recipe.data.scene_share)]
        if "train_scene" in data.splits and recipe.data.scene_share:
            pools.append((data.indices(["train_scene"]), recipe.data.scene_share))
        train = np.concatenate([indices for indices, _ in pools])
        self.held_out = spread(of_one_bucket(data.indices(["val_combo"]), data.buckets), settings.held_out)
        self.indices = np.concatenate([train, self.held_out])  # what a row is of
        rows = np.split(np.arange(len(train)), np.cumsum([len(indices) for indices, _ in pools])[:-1])
        plan_pools = [(part, share) for part, (_, share) in zip(rows, pools, strict=True)]
        self.plan: BatchPlan = in_buckets(plan_pools, settings.batch_size, settings.seed, data.buckets[self.indices])
        self.flip = data.flips[self.indices] & recipe.data.flip
        self.cache_states = recipe.text.cache_states
        self.device = torch.device("cpu")
        self.sampling = Sampling(  #: how previews are drawn
            num_inference_steps=recipe.teacher.num_inference_steps, guidance_scale=recipe.teacher.guidance_scale
        )

    def prepare(self, cache: Path, vae_hash: str, text_hash: str, device: torch.device) -> None:
        """Fills the caches, all processes together; later runs find them."""
        self.latents = cache_latents(self.vae, vae_hash, self.data, cache, device, halved=bool(self.half_steps))
        self.text.encoder.to(device)
        rows = self.data.rows
        if self.cache_states:
            self.states: CaptionStates = CachedStates(self.text, text_hash, [rows[i] for i in self.indices], cache)
        else:
            self.states = LiveStates(self.text, rows, self.indices)
        self.null = self.text.encode([""])[0][0].cpu()

    def to(self, device: torch.device) -> None:
        """Only the preview needs the other networks on the device."""
        self.device = device
        self.vae.to(device)
        self.text.encoder.to(device)

    def reached(self, step: int) -> None:
        """Held-out figures and previews from here on are of the size that was trained on up to now."""
        self.halved = step <= self.half_steps > 0

    def clean(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch's latents x (mirrored at random where allowed) and caption states, some dropped; on the CPU."""
        mirrored = (batch.rand() < 0.5).numpy() & self.flip[batch.indices]
        latents = self.latents.latents(self.indices[batch.indices], mirrored, batch.step < self.half_steps)
        mean, std = torch.from_numpy(latents).float().chunk(2, dim=1)
        x = (mean + std * batch.randn(*mean.shape[1:])) * self.vae.config.scaling_factor
        states = self.states.take(batch.indices, batch.rand().numpy())
        dropped = batch.rand() < self.settings.prompt_dropout
        states[dropped] = self.null
        return x, states

    def noised(self, batch: Batch) -> Noised:
        """`clean`, noised at random timesteps."""
        x, states = self.clean(batch)
        timesteps = batch.randint(self.scheduler.config.num_train_timesteps)
        noise = batch.randn(*x.shape[1:])
        z_t = self.objective.add_noise(x, noise, timesteps)
        return Noised(*(value.to(self.device) for value in (x, noise, z_t, timesteps, states)))

    def loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        """See `DenoisingObjective`; logs the plain mean squared error."""
        made = self.noised(batch)
        prediction = model(made.z_t, made.timesteps, made.states).sample
        loss, mse = self.objective.loss(prediction, made.x, made.noise, made.timesteps.cpu())
        return loss, {"mse": mse.item()}

    def held_out_pairs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The held-out latents x, their fixed noise and caption states; on the CPU."""
        rows = np.arange(len(self.indices) - len(self.held_out), len(self.indices))
        mean = torch.from_numpy(self.latents.latents(self.held_out, halved=self.halved)).float().chunk(2, dim=1)[0]
        x = mean * self.vae.config.scaling_factor
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        states = self.states.take(rows, np.zeros(len(rows)))
        return x, noise, states

    @torch.no_grad()
    def validate(self, model: nn.Module) -> dict[str, float]:
        """Plain mean squared error of every held-out pair, at its fixed noise, once in each quarter of the timesteps.

        `val_mse` is the mean; `val_mse_t250` that of timesteps 250 to 499 of 1000, and so on. Inside a quarter the
        pairs are spread evenly over its timesteps.
        """
        x, noise, states = self.held_out_pairs()
        ends = [self.scheduler.config.num_train_timesteps * quarter // 4 for quarter in range(5)]

        def errors(rows: torch.Tensor) -> torch.Tensor:
            found = []
            for low, high in pairwise(ends):
                timesteps = low + rows * (high - low) // len(x)
                z_t = self.objective.add_noise(x[rows], noise[rows], timesteps)
                made = (value.to(self.device) for value in (z_t, timesteps, states[rows]))
                apart = model(*made).sample.cpu() - self.objective.target(x[rows], noise[rows], timesteps)
                found.append(apart.square().flatten(1).mean(1))
            return torch.stack(found, 1)

        quarters = shared(len(x), 4, errors).mean(0)
        by_level = {f"val_mse_t{low}": mse.item() for low, mse in zip(ends, quarters, strict=False)}
        return {"val_mse": quarters.mean().item()} | by_level

    def preview(self, model: nn.Module) -> Image.Image:
        """Fixed prompts, two seeds each, drawn as `sampling` says."""
        prompts = [prompt for prompt in PREVIEW_PROMPTS for _ in range(2)]
        seeds = list(range(len(prompts)))
        unet: UNet2DConditionModel = model  # type: ignore[assignment]
        drawn = self.sampling.model_dump(exclude={"guidance_range"})
        side = unet.config.sample_size // (2 if self.halved else 1)
        batch = max(1, 2**14 // side**2)  # 4 pictures of 512 px: looking must fit where a step does
        parts = unet, self.vae, self.text, self.scheduler
        images = sample_images(*parts, prompts, seeds, batch=batch, side=side, **drawn)
        rows = np.concatenate([np.concatenate(list(row), axis=1) for row in images.reshape(3, 8, *images.shape[1:])])
        scale = 4 if self.halved else 2
        return Image.fromarray(rows).resize((rows.shape[1] * scale, rows.shape[0] * scale), Image.Resampling.NEAREST)


def fast_attention(unet: UNet2DConditionModel, device: torch.device) -> None:
    """On a CPU the explicit attention trains faster: torch's flash backward took 35 % of a step at 16x16 latents."""
    unet.set_attn_processor(AttnProcessor() if device.type == "cpu" else AttnProcessor2_0())


def check_shapes(
    unet: Mapping[str, Any], recipe: Recipe, vae: AutoencoderKL, text: TextEncoder, where: str = "teacher.unet"
) -> None:
    """Raises PocketfusionError if the UNet's shapes do not fit the autoencoder, the pictures or the text encoder."""
    side = recipe.data.size // 2 ** (len(vae.config.block_out_channels) - 1)
    wanted = {
        "in_channels": vae.config.latent_channels,
        "out_channels": vae.config.latent_channels,
        "sample_size": side,
        "cross_attention_dim": text.width,
    }
    for name, value in wanted.items():
        if unet.get(name) != value:
            raise PocketfusionError(
                f"{where}.{name} is {unet.get(name)}, but the other networks need {value}: edit the recipe"
            )


def train_teacher(
    recipe: Recipe,
    data: CaptionedImages,
    autoencoder: Path,
    stage: StageRun,
    init: Path | None = None,
    cache: Path | None = None,
) -> Provenance:
    """Trains the recipe's UNet and writes a whole model folder in the diffusers layout, fp16 safetensors.

    `autoencoder` is a folder that `train_autoencoder` wrote. `init` continues from a model folder's UNet. `cache`
    keeps latents and prompt states (default: in the run folder). Raises PocketfusionError as `train` does, and if
    shapes do not fit.
    """
    if not (autoencoder / "config.json").is_file():
        raise PocketfusionError(f"there is no autoencoder at {autoencoder}: train one with train-autoencoder")
    vae_hash = folder_hash(autoencoder)
    parents = {"autoencoder": vae_hash}
    before = None
    if init is not None:
        before, parents = read_provenance(init), {**parents, "init": folder_hash(init)}
    text = load_text_encoder(recipe.text)
    if recipe.text.source != "minilm":  # which its package's version pins; a folder's content may change
        parents["text_encoder"] = text.fingerprint
    identity = {
        "stage": "train-teacher",
        "settings": recipe.teacher.model_dump(mode="json")
        | {"data": recipe.data.model_dump(mode="json"), "text": recipe.text.model_dump()},
        "parents": parents,
        "data": {"name": data.name, "fingerprint": data.fingerprint},
    }
    if (finished := finished_result(stage, identity)) is not None:
        return finished
    vae = load_part(AutoencoderKL, autoencoder).requires_grad_(False).eval()
    check_shapes(recipe.teacher.unet, recipe, vae, text)
    torch.manual_seed(recipe.teacher.train.seed)
    if init is None:
        unet = UNet2DConditionModel(**recipe.teacher.unet)
    else:
        check_text_encoder(recipe.text, text, init)
        unet = load_part(UNet2DConditionModel, init / "unet")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fast_attention(unet, device)
    task = TeacherTask(recipe, data, unet, vae, text, half_size_until=recipe.teacher.half_size_until)
    hold(stage.run)  # the caches lie in it
    encoder_hash = weights_hash(autoencoder, ENCODER)
    task.prepare(cache or stage.run / "cache", encoder_hash, text.fingerprint, device)

    def write(folder: Path, result: TrainResult) -> dict:
        write_base_folder(folder, unet, vae, text, task.scheduler, autoencoder, data.licences)
        task.preview(unet).save(folder / "preview.png")
        made = read_provenance(autoencoder)
        return {"autoencoder": {"samples_seen": made.samples_seen, **made.results}} if made else {}

    samples_before = before.samples_seen if before else 0

    def reopen(folder: Path) -> nn.Module:
        return UNet2DConditionModel.from_pretrained(folder, subfolder="unet")

    return run_stage(stage, task, recipe.teacher.train, identity, write, reopen, samples_before)
