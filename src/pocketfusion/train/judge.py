"""`train-judge`: the image-text judge, contrastively, on the training split alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from pocketfusion.data.packed import CaptionedImages
from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import Provenance
from pocketfusion.locks import hold
from pocketfusion.models.dual_encoder import Judge, JudgeModel
from pocketfusion.models.slim_autoencoder import to_tensor
from pocketfusion.models.text_encoder import TextEncoder, load_text_encoder
from pocketfusion.processes import gathered_rows, process_state
from pocketfusion.recipe import JudgeSettings, Recipe
from pocketfusion.train.batch import Batch, BatchPlan
from pocketfusion.train.cache import CaptionTable, cache_pooled
from pocketfusion.train.loop import TrainResult
from pocketfusion.train.place import StageRun
from pocketfusion.train.stage import finished_result, run_stage

MAX_SHIFT = 6 / 64  # of the side; position augmentation, since generated pictures are never placed exactly


def contrastive_loss(
    images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor, same: torch.Tensor
) -> torch.Tensor:
    """CLIP's symmetric cross-entropy; `same` [B, B] (symmetric) marks equal captions, which are positives too."""
    return both_ways(images, texts, images, texts, scale, same)


def both_ways(
    images: torch.Tensor,
    texts: torch.Tensor,
    all_images: torch.Tensor,
    all_texts: torch.Tensor,
    scale: torch.Tensor,
    same: torch.Tensor,
) -> torch.Tensor:
    """`contrastive_loss` of a part of the batch against all of it; `same` [part, all]. Its mean over parts is it."""
    positive = same / same.sum(1, keepdim=True)
    found = F.cross_entropy(scale * images @ all_texts.T, positive)
    return 0.5 * (found + F.cross_entropy(scale * texts @ all_images.T, positive))


class JudgeTask:
    """Pictures (shifted, mirrored where the caption allows, slightly blurred or noisy) against their captions."""

    def __init__(
        self, recipe: Recipe, settings: JudgeSettings, data: CaptionedImages, model: JudgeModel, text: TextEncoder
    ):
        self.settings, self.data, self.model, self.text = settings, data, model, text
        pools = [(data.indices(["train"]), 1 - recipe.data.scene_share)]
        if "train_scene" in data.splits:
            pools.append((data.indices(["train_scene"]), recipe.data.scene_share))
        self.plan = BatchPlan(pools, settings.train.batch_size, settings.train.seed)
        self.captions = CaptionTable(data.rows)
        self.flip = np.array([row["flip"] for row in data.rows]) & recipe.data.flip
        self.held_out = data.indices(["val_combo"])
        self.pooled = torch.empty(0)
        self.device = torch.device("cpu")

    def prepare(self, cache: Path) -> None:
        """Pools the training captions' token states; later runs find them."""
        needed = np.unique(np.concatenate([self.captions.choices[i] for i in np.concatenate(self.plan.pools)]))
        texts = [self.captions.captions[i] for i in needed]
        self.pooled = torch.zeros(len(self.captions.captions), self.text.width)
        pooled = cache_pooled(self.text, self.text.fingerprint, texts, cache)
        self.pooled[needed] = torch.from_numpy(np.asarray(pooled, dtype=np.float32))  # a copy: the cache is read-only

    def to(self, device: torch.device) -> None:
        """Pictures and pooled states are moved batch by batch."""
        self.device = device

    def augment(self, pixels: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Whole-pixel shift on a white margin, and a little noise for a half of the pictures."""
        size = pixels.shape[-1]
        reach = round(MAX_SHIFT * size)
        padded = F.pad(pixels, [reach] * 4, value=1.0)
        dx, dy = batch.randint(2 * reach + 1), batch.randint(2 * reach + 1)
        shifted = torch.stack([x[:, j : j + size, i : i + size] for x, i, j in zip(padded, dx, dy, strict=True)])
        strength = 0.1 * (batch.rand() - 0.5).clamp_min(0)[:, None, None, None]
        return shifted + strength * batch.randn(*pixels.shape[1:])

    def loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        """See `contrastive_loss`; also logs how often a picture finds its caption in the batch."""
        numbers = torch.from_numpy(self.captions.pick(batch.indices, batch.rand().numpy()))
        pixels = to_tensor(self.data.images[batch.indices])
        mirrored = (batch.rand() < 0.5) & torch.from_numpy(self.flip[batch.indices])
        pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
        pixels = self.augment(pixels, batch).to(self.device)
        images, texts, scale = model(pixels, self.pooled[numbers].to(self.device))
        # the whole batch is the set of negatives, whatever processes it is shared by
        all_images, all_texts = gathered_rows(images), gathered_rows(texts)
        everyone = gathered_rows(numbers.to(self.device)).cpu()
        same = (numbers[:, None] == everyone[None]).float().to(self.device)
        loss = both_ways(images, texts, all_images, all_texts, scale, same)
        top = (images @ all_texts.T).argmax(1).cpu()
        return loss, {"batch_top1": (everyone[top] == numbers).float().mean().item(), "scale": scale.item()}

    def scores(self, indices: np.ndarray) -> tuple[float, float]:
        """Share of pictures that find their plainest caption first, or among five, in pools of 256."""
        judge = Judge(self.model, self.text)
        chosen = indices[:: max(1, len(indices) // 256)][:256]
        images = judge.image_features(self.data.images[chosen])[1]
        texts = judge.text_embeddings([self.data.rows[i]["captions"][0] for i in chosen])
        similarity = images @ texts.T
        rank = (similarity > np.diag(similarity)[:, None]).sum(1)
        return float((rank < 1).mean()), float((rank < 5).mean())

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Retrieval on unseen pairs of seen concepts."""
        top1, top5 = self.scores(self.held_out)
        return {"val_combo_top1": top1, "val_combo_top5": top5}

    def preview(self, model: nn.Module) -> Image.Image:
        """Similarity of 24 held-out pictures (rows) with their captions (columns); a good judge shows the diagonal."""
        judge = Judge(self.model, self.text)
        chosen = self.held_out[:24]
        images = judge.image_features(self.data.images[chosen])[1]
        similarity = images @ judge.text_embeddings([self.data.rows[i]["captions"][0] for i in chosen]).T
        return Image.fromarray(np.uint8(np.clip(similarity, 0, 1) * 255)).resize((480, 480), Image.Resampling.NEAREST)


def train_judge(recipe: Recipe, data: CaptionedImages, stage: StageRun, *, for_losses: bool = False) -> Provenance:
    """Trains the recipe's `judge`, or with `for_losses` its `loss_judge`, and writes its folder.

    A batch is its own set of negatives, which processes can share and accumulation cannot. Raises PocketfusionError as
    `train` does, for a batch in parts, and if the recipe has no such section.
    """
    settings = recipe.loss_judge if for_losses else recipe.judge
    if settings is None:
        raise PocketfusionError(f"the recipe {recipe.name} has no section 'loss_judge': see recipes/emoji128.yaml")
    if settings.train.gradient_accumulation > 1 or settings.train.micro_batch is not None:
        raise PocketfusionError(
            "a judge's batch is its set of negatives, so it cannot be done in parts: leave gradient_accumulation and "
            "micro_batch out of its train"
        )
    identity = {
        "stage": "train-loss-judge" if for_losses else "train-judge",
        "settings": settings.model_dump(mode="json") | {"data": recipe.data.model_dump(mode="json")},
        "parents": {},
        "data": {"name": data.name, "fingerprint": data.fingerprint},
    }
    if (finished := finished_result(stage, identity)) is not None:
        return finished
    text = load_text_encoder(recipe.text)
    torch.manual_seed(settings.train.seed)
    model = JudgeModel(
        image_size=data.size,
        widths=settings.widths,
        text_width=text.width,
        embed_dim=settings.embed_dim,
        text=recipe.text.model_dump(),
        for_losses=for_losses,
    )
    task = JudgeTask(recipe, settings, data, model, text)
    hold(stage.run)  # the cache lies in it
    with process_state().main_process_first():  # one process fills the cache, the others find it
        task.prepare(stage.run / "cache")

    def write(folder: Path, result: TrainResult) -> dict:
        model.half().save_pretrained(folder, safe_serialization=True)
        model.float()
        results: dict[str, float] = {}
        for split in ("train", "test_combo", "test_concept"):
            if split in data.splits:
                top1, top5 = task.scores(data.splits[split])
                results |= {f"{split}_top1": round(top1, 4), f"{split}_top5": round(top5, 4)}
        return results

    return run_stage(stage, task, settings.train, identity, write, JudgeModel.from_pretrained)
