"""
Least squares from Gram matrices, whose size does not depend on the number of tokens: products of float32 blocks,
summed in float64.

N tokens, F features, C targets.
"""

import math

import torch

from conversion.errors import ConversionError


COLUMNS = 512  # of a block of X'X; blocks below the diagonal are not computed
BLOCK_TOKENS = 1024  # summed in float32; the rounding of longer sums would exceed the smallest ridge
IDLE_SHARE = 1e-14  # of the largest square: a feature below is of float32 rounding alone
LEAST_RIDGE = 1e-10  # over the diagonal: keeps a Gram matrix with idle or repeated columns positive
RIDGE_STEP = 10.0


class NormalEquations:
    """Weighted sums X'X (F, F), X'Y (F, C) and Y'Y over tokens, gathered chunk by chunk.

    Args:
        num_features: F.
        num_targets: C.
        device: Where the sums are kept.
    """

    def __init__(self, num_features: int, num_targets: int, device: torch.device):
        self.cross = torch.zeros(num_features, num_targets, dtype=torch.float64, device=device)
        self.target_square = 0.0
        self._upper = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)

    @property
    def gram(self) -> torch.Tensor:
        """X'X (F, F), of which blocks on and above the diagonal are gathered."""
        return self._upper.triu() + self._upper.triu(1).t()

    def add(self, features: torch.Tensor, targets: torch.Tensor, token_weights: torch.Tensor) -> None:
        """Adds tokens.

        Args:
            features: X (N, F).
            targets: Y (N, C).
            token_weights: Weight of each token (N,), not negative.
        """
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
        """Returns the W (F, C) that minimizes |X W - Y|^2 + ridge |D (W - prior)|^2, D^2 the diagonal of X'X.

        The ridge is relative to the scale of each feature. Directions in which the features do not vary, but for
        rounding, keep the prior, so a singular Gram matrix, as idle heads make it, can be solved. Where float32
        products leave the matrix indefinite, the ridge rises until it is definite.

        Args:
            ridge: At least LEAST_RIDGE is taken.
            prior: (F, C); zero by default.

        Raises:
            ConversionError: The sums are not finite.
        """
        gram = self.gram
        if not (gram.isfinite().all() and self.cross.isfinite().all()):
            raise ConversionError(
                "the sums over the calibration tokens are not finite; look for NaN or Inf in the source's weights, "
                "or convert without calibration"
            )
        prior = torch.zeros_like(self.cross) if prior is None else prior.double()
        diagonal = gram.diagonal()
        varies = diagonal > diagonal.max() * IDLE_SHARE
        scale = torch.where(varies, diagonal, torch.inf).rsqrt()[:, None]  # (F, 1)
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
        """Returns |X W - Y|^2 over |Y|^2, for W (F, C)."""
        weight = weight.double()
        square = (weight * (self.gram @ weight - 2 * self.cross)).sum().item() + self.target_square
        return square / self.target_square if self.target_square else math.nan


def ridge_refit(
    fitted: NormalEquations, validation: NormalEquations, prior: torch.Tensor, ridges: tuple[float, ...]
) -> tuple[torch.Tensor, float]:
    """Chooses the ridge that leaves least on other tokens; no change at all is a candidate as well.

    Args:
        fitted: Sums over the tokens to fit.
        validation: Sums over the tokens that judge.
        prior: The old weight (F, C).
        ridges: Ridges to try.

    Returns:
        The weight (F, C), and its residual on `validation`.
    """
    candidates = [prior.double()] + [fitted.solve(ridge, prior) for ridge in ridges]
    residuals = [validation.residual(weight) for weight in candidates]
    best = min(range(len(candidates)), key=lambda index: residuals[index])
    return candidates[best], residuals[best]
