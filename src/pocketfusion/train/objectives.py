"""What a denoiser learns: targets and weights, once, in fp32."""

from __future__ import annotations

import torch

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
