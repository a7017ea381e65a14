"""Lambda during training: behind PEFT's copies, sharded by FSDP2, a scalar per layer (V1) or one per token (V2)."""

import math
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def differential_attentions(model: nn.Module) -> dict[int, Any]:
    """Returns the attention modules of differential layers, by layer."""
    modules: list[Any] = [
        m for m in model.modules() if {"diff_lambda", "lambda_proj"} & dict(m.named_children()).keys()
    ]
    return {module.layer_idx: module for module in modules}


def trained_module(module: nn.Module) -> nn.Module:
    """Returns the module itself, or the copy that PEFT's modules_to_save uses instead."""
    copies: Any = getattr(module, "modules_to_save", {})
    active = [name for name in getattr(module, "active_adapters", ()) if name in copies]
    if active and not module.disable_adapters:
        return copies[active[0]]
    original = getattr(module, "original_module", module)
    assert isinstance(original, nn.Module)
    return original


def in_training(module: nn.Module) -> bool:
    """Returns whether the trained model runs, and not its reference: the model with its adapters disabled."""
    return module.training and not getattr(module, "disable_adapters", False)


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor of all ranks; a collective under FSDP2."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def layer_lambda(diff_lambda: Any) -> float:
    """Computes V1's lambda, exp(lambda_q1 . lambda_k1) - exp(lambda_q2 . lambda_k2) + lambda_init."""
    q1, k1, q2, k2 = (full_tensor(getattr(diff_lambda, f"lambda_{name}")) for name in ("q1", "k1", "q2", "k2"))
    return float(q1.dot(k1).exp() - q2.dot(k2).exp() + diff_lambda.lambda_init)


@torch.no_grad()
def hold_lambda(diff_lambda: Any, floor: float) -> None:
    """
    Raises V1's lambda to a floor, if it is below, by the smallest step of its four vectors (Newton's method).

    All four move, as under an optimizer: lambda_q1 alone would grow as long as lambda is held.

    Args:
        diff_lambda: The `diff_lambda` of a V1 layer, changed in place. Where all vectors are zero or one is not
            finite, it is unchanged.
        floor: The smallest value of lambda.
    """
    missing = floor - layer_lambda(diff_lambda)
    if not missing > 0:
        return
    margin = 1e-6  # outweighs rounding
    missing += margin
    for _ in range(20):  # three or four suffice
        slopes = []
        norm_squared = 0.0  # of the gradient of lambda
        for sign, index in ((1.0, 1), (-1.0, 2)):
            q = getattr(diff_lambda, f"lambda_q{index}")
            k = getattr(diff_lambda, f"lambda_k{index}")
            slope = sign * float(full_tensor(q).dot(full_tensor(k)).exp())
            slopes += [(q, k.clone(), slope), (k, q.clone(), slope)]
            norm_squared += slope**2 * float(full_tensor(q).square().sum() + full_tensor(k).square().sum())
        if not 0 < norm_squared < math.inf:
            return
        for vector, direction, slope in slopes:
            vector.add_(direction, alpha=missing * slope / norm_squared)
        missing = floor + margin - layer_lambda(diff_lambda)
        if abs(missing) < margin:
            return


class RunningLambda:
    """
    Mean, minimum and maximum of V2's lambda over tokens and heads, as a forward hook on `lambda_proj`.

    Padding tokens count, as the hook gets no mask.
    """

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        """Forgets all values."""
        self.total: Any = 0.0
        self.low: Any = math.inf
        self.high: Any = -math.inf
        self.count = 0

    @torch.no_grad()
    def __call__(self, module: nn.Module, inputs: Any, lambda_logits: torch.Tensor) -> None:
        if not in_training(module):
            return
        values = lambda_logits.detach().float().sigmoid()  # (B, T, H)
        # Kept as tensors on their device, so that nothing waits for it before a log is due.
        self.total = self.total + values.sum(dtype=torch.float64)
        self.count += values.numel()
        self.low = values.amin().clamp(max=self.low)
        self.high = values.amax().clamp(min=self.high)

    def summary(self) -> dict[str, float]:
        """Returns `mean`, `min` and `max`."""
        return {"mean": float(self.total) / self.count, "min": float(self.low), "max": float(self.high)}
