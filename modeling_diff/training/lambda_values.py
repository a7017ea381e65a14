"""Lambda where training finds it: behind peft's copies, sharded by FSDP2, a scalar (V1) or one a token (V2)."""

import math
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def differential_attentions(model: nn.Module) -> dict[int, Any]:
    """Attention modules by layer, of those layers that subtract a second map."""
    modules: list[Any] = [
        m for m in model.modules() if {"diff_lambda", "lambda_proj"} & dict(m.named_children()).keys()
    ]
    return {module.layer_idx: module for module in modules}


def trained_module(module: nn.Module) -> nn.Module:
    """The module itself, or the copy that peft's modules_to_save uses in its place."""
    copies: Any = getattr(module, "modules_to_save", {})
    active = [name for name in getattr(module, "active_adapters", ()) if name in copies]
    if active and not module.disable_adapters:
        return copies[active[0]]
    original = getattr(module, "original_module", module)
    assert isinstance(original, nn.Module)
    return original


def in_training(module: nn.Module) -> bool:
    """Whether this is a pass of what is trained, and not of its reference: the model with its adapters disabled."""
    return module.training and not getattr(module, "disable_adapters", False)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor of all ranks; a collective under FSDP2."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def layer_lambda(diff_lambda: Any) -> float:
    """V1's lambda = exp(lambda_q1 . lambda_k1) - exp(lambda_q2 . lambda_k2) + lambda_init, read from its vectors."""
    q1, k1, q2, k2 = (whole(getattr(diff_lambda, f"lambda_{name}")) for name in ("q1", "k1", "q2", "k2"))
    return float(q1.dot(k1).exp() - q2.dot(k2).exp() + diff_lambda.lambda_init)


@torch.no_grad()
def hold_lambda(diff_lambda: Any, floor: float) -> None:
    """
    If V1's lambda is below `floor`, the smallest step of its four vectors that brings it there, by Newton's method.

    All four move, as an optimiser moves them all: were it lambda_q1 alone, it would grow as long as lambda is held.
    """
    short = floor - layer_lambda(diff_lambda)
    if not short > 0:
        return
    margin = 1e-6  # outweighs rounding
    short += margin
    for _ in range(20):  # three or four suffice
        slopes, size = [], 0.0
        for sign, index in ((1.0, 1), (-1.0, 2)):
            q, k = getattr(diff_lambda, f"lambda_q{index}"), getattr(diff_lambda, f"lambda_k{index}")
            slope = sign * float(whole(q).dot(whole(k)).exp())
            slopes += [(q, k.clone(), slope), (k, q.clone(), slope)]
            size += slope**2 * float(whole(q).square().sum() + whole(k).square().sum())
        if not 0 < size < math.inf:
            return  # all vectors zero, or not finite: nothing can be held
        for vector, direction, slope in slopes:
            vector.add_(direction, alpha=short * slope / size)
        short = floor + margin - layer_lambda(diff_lambda)
        if abs(short) < margin:
            return


class RunningLambda:
    """
    Mean, minimum and maximum of V2's lambda over the tokens and heads seen; a forward hook on `lambda_proj`.

    Padding is among these tokens: no mask comes this way.
    """

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self.total: Any = 0.0
        self.low: Any = math.inf
        self.high: Any = -math.inf
        self.count = 0

    @torch.no_grad()
    def __call__(self, module: nn.Module, inputs: Any, lambda_logits: torch.Tensor) -> None:
        if not in_training(module):
            return
        values = lambda_logits.detach().float().sigmoid()  # (B, T, H)
        # Tensors, added up where they are: nothing waits for the device before a log is due.
        self.total, self.count = self.total + values.sum(dtype=torch.float64), self.count + values.numel()
        self.low, self.high = values.amin().clamp(max=self.low), values.amax().clamp(min=self.high)

    def summary(self) -> dict[str, float]:
        return {"mean": float(self.total) / self.count, "min": float(self.low), "max": float(self.high)}
