"""
Least squares from Gram matrices in float64, whose size does not depend on the number of tokens.

N tokens, F features, C targets.
"""

import math

import torch

from conversion.errors import ConversionError


class NormalEquations:
    """Weighted sums X'X (F, F), X'Y (F, C) and Y'Y over tokens, gathered chunk by chunk."""

    def __init__(self, num_features: int, num_targets: int, device: torch.device):
        self.gram = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)
        self.cross = torch.zeros(num_features, num_targets, dtype=torch.float64, device=device)
        self.target_square = 0.0

    def add(self, features: torch.Tensor, targets: torch.Tensor, token_weights: torch.Tensor) -> None:
        """`features` (N, F), `targets` (N, C), `token_weights` (N,)."""
        features, targets = features.double(), targets.double()
        weighted = features * token_weights.double()[:, None]
        self.gram += weighted.t() @ features
        self.cross += weighted.t() @ targets
        self.target_square += float((targets.square().sum(-1) * token_weights).sum())

    def solve(self, ridge: float, prior: torch.Tensor | None = None) -> torch.Tensor:
        """
        W (F, C) that minimises |X W - Y|^2 + ridge |D (W - prior)|^2, D^2 the diagonal of X'X: whatever the scale of
        a feature, the ridge weighs on it alike.

        Directions in which the features do not vary keep the prior (zero without one), so a singular Gram matrix, as
        idle heads make it, is no obstacle. Raises ConversionError for sums that are not finite.
        """
        if not (self.gram.isfinite().all() and self.cross.isfinite().all()):
            raise ConversionError(
                "the sums over the calibration tokens are not finite; look for NaN or Inf in the source's weights, "
                "or convert without calibration"
            )
        prior = torch.zeros_like(self.cross) if prior is None else prior.double()
        diagonal = self.gram.diagonal()
        scale = torch.where(diagonal > 0, diagonal, 1.0).rsqrt()[:, None]  # (F, 1)
        values, vectors = torch.linalg.eigh(scale * self.gram * scale.t())
        inverse = torch.where(values > values[-1].clamp_min(0) * 1e-12, 1 / (values + ridge), 0.0)
        return prior + scale * (
            vectors @ (inverse[:, None] * (vectors.t() @ (scale * (self.cross - self.gram @ prior))))
        )

    def residual(self, weight: torch.Tensor) -> float:
        """|X W - Y|^2 over |Y|^2, for W (F, C)."""
        weight = weight.double()
        square = (weight * (self.gram @ weight - 2 * self.cross)).sum().item() + self.target_square
        return square / self.target_square if self.target_square else math.nan


def ridge_refit(
    fitted: NormalEquations, validation: NormalEquations, prior: torch.Tensor, ridges: tuple[float, ...]
) -> tuple[torch.Tensor, float]:
    """The weight (F, C) whose ridge leaves least on `validation`, and that residual; `prior` itself is a candidate."""
    candidates = [prior.double()] + [fitted.solve(ridge, prior) for ridge in ridges]
    residuals = [validation.residual(weight) for weight in candidates]
    best = min(range(len(candidates)), key=lambda index: residuals[index])
    return candidates[best], residuals[best]
