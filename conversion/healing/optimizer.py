"""Muon for the matrices of the layers and AdamW for the rest, as one optimizer with one state."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from modeling_diff.training.optimizer import parameter_groups


class MuonWithAdamW(torch.optim.Optimizer):
    """
    torch's Muon and AdamW, each on its groups: those with `"algorithm": "muon"`, of matrices only, and all others.

    Groups and state are this optimizer's own, so that schedulers, checkpoints and FSDP2 see one optimizer.
    """

    def __init__(self, groups: Iterable[dict[str, Any]]):
        groups = list(groups)
        muon = [group for group in groups if group.get("algorithm") == "muon"]
        adamw = [group for group in groups if group.get("algorithm") != "muon"]
        # Rates of AdamW suit Muon, too, with its updates brought to the size of AdamW's.
        self.inner: dict[str, torch.optim.Optimizer] = {}
        if muon:
            self.inner["muon"] = torch.optim.Muon(muon, adjust_lr_fn="match_rms_adamw")
        if adamw:
            self.inner["adamw"] = torch.optim.AdamW(adamw, betas=(0.9, 0.95))
        for name, optimizer in self.inner.items():
            for group in optimizer.param_groups:
                group["algorithm"] = name
        super().__init__([group for optimizer in self.inner.values() for group in optimizer.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for name, optimizer in self.inner.items():
            # Bound again each time: loading a checkpoint replaces groups and state.
            optimizer.state = self.state
            optimizer.param_groups = [group for group in self.param_groups if group["algorithm"] == name]
            optimizer.step()
        return loss


def muon_groups(
    model: nn.Module, *, learning_rate: float, weight_decay: float, lambda_factor: float
) -> list[dict[str, Any]]:
    """Returns `parameter_groups` with the matrices of the decoder layers split off for Muon; adapters' are not.

    Args:
        model: The student.
        learning_rate: Learning rate of all but lambda.
        weight_decay: Weight decay where there is one.
        lambda_factor: Learning rate of lambda, as a multiple of `learning_rate`.
    """
    matrices = {
        id(parameter)
        for name, parameter in model.named_parameters()
        if parameter.dim() == 2 and ".layers." in name and name.endswith("_proj.weight") and "lambda" not in name
    }
    groups = parameter_groups(
        model, learning_rate=learning_rate, weight_decay=weight_decay, lambda_factor=lambda_factor
    )
    split = []
    for group in groups:
        for algorithm in ("muon", "adamw"):
            members = [p for p in group["params"] if (id(p) in matrices) == (algorithm == "muon")]
            if members:
                split.append(group | {"params": members, "algorithm": algorithm})
    return split
