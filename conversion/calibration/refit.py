"""
Least squares from Gram matrices: products of float32 blocks, summed in float64, of a size that does not depend on the
number of tokens.

N tokens, F features, C targets.
"""

import math

import torch

from conversion.errors import ConversionError


COLUMNS = 512  # of a block of X'X: what lies above the diagonal is computed once
BLOCK_TOKENS = 1024  # summed in float32; float32 sums over more would lose what the smallest ridge is worth
LEAST_RIDGE = 1e-10  # of the diagonal: what keeps a Gram matrix with idle or repeated columns positive
RIDGE_STEP = 10.0


class NormalEquations:
    """Weighted sums X'X (F, F), X'Y (F, C) and Y'Y over tokens, gathered chunk by chunk."""

    def __init__(self, num_features: int, num_targets: int, device: torch.device):
        self.cross = torch.zeros(num_features, num_targets, dtype=torch.float64, device=device)
        self.target_square = 0.0
        self._upper = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)

    @property
    def gram(self) -> torch.Tensor:
        """X'X (F, F), of which blocks on and above the diagonal are gathered."""
        return self._upper.triu() + self._upper.triu(1).t()

    def add(self, features: torch.Tensor, targets: torch.Tensor, token_weights: torch.Tensor) -> None:
        """Adds tokens: `features` (N, F), `targets` (N, C), `token_weights` (N,), not negative."""
        root = token_weights.float().sqrt()[:, None]
        blocks = zip(
            (root * features.float()).split(BLOCK_TOKENS), (root * targets.float()).split(BLOCK_TOKENS), strict=True
        )
        for block, wanted in blocks:
            for start in range(0, block.shape[1], COLUMNS):
                end = start + COLUMNS
                self._upper[:end, start:end] += block[:, :end].t() @ block[:, start:end]
            self.cross += block.t() @ wanted
            self.target_square += float(wanted.double().square().sum())

    def solve(self, ridge: float, prior: torch.Tensor | None = None) -> torch.Tensor:
        """
        W (F, C) that minimizes |X W - Y|^2 + ridge |D (W - prior)|^2, D^2 the diagonal of X'X: whatever the scale of
        a feature, the ridge weighs on it alike.

        Directions in which the features do not vary keep the prior (zero without one), so a singular Gram matrix, as
        idle heads make it, is no obstacle. Where float32 products leave a matrix indefinite the ridge rises until it
        is not. Raises ConversionError for sums that are not finite.
        """
        gram = self.gram
        if not (gram.isfinite().all() and self.cross.isfinite().all()):
            raise ConversionError(
                "the sums over the calibration tokens are not finite; look for NaN or Inf in the source's weights, "
                "or convert without calibration"
            )
        prior = torch.zeros_like(self.cross) if prior is None else prior.double()
        diagonal = gram.diagonal()
        scale = torch.where(diagonal > 0, diagonal, 1.0).rsqrt()[:, None]  # (F, 1)
        scaled = scale * gram * scale.t()
        ridge = max(ridge, LEAST_RIDGE)
        while True:
            damped = scaled.clone()
            damped.diagonal().add_(ridge)
            factor, failed = torch.linalg.cholesky_ex(damped)
            if not failed:
                return prior + scale * torch.cholesky_solve(scale * (self.cross - gram @ prior), factor)
            ridge *= RIDGE_STEP

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
