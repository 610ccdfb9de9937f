"""How a drawn picture is compared with the wanted one while training: errors of pixels, of edges, of features."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from pocketfusion.errors import PocketfusionError
from pocketfusion.models.judge import JudgeModel
from pocketfusion.recipe import PictureLossSettings

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
