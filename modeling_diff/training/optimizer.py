"""Parameter groups of the optimizer: what decays, and what has a learning rate of its own."""

import math
from typing import Any

from torch import nn


LAMBDA_MODULES = {"diff_lambda", "lambda_proj"}


def parameter_groups(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    lambda_factor: float = 1.0,
    query_factor: float = 1.0,
) -> list[dict[str, Any]]:
    """
    Puts every trainable parameter into one group for a torch optimizer.

    Lambda (`diff_lambda`, `lambda_proj`), norms, biases and DoRA's magnitudes do not decay: decay would pull lambda
    towards lambda_init in V1 and 1/2 in V2. An adapter belongs to the group of its module. Wrappers (PEFT, DDP,
    FSDP2, torch.compile) change nothing.

    Args:
        model: A model, or any part of one; LLaMA's own as well.
        learning_rate: Learning rate of all other parameters.
        weight_decay: Weight decay where there is one.
        lambda_factor: Learning rate of lambda, as a multiple of `learning_rate`.
        query_factor: Learning rate of `q_proj` in V2's differential layers, as a multiple of `learning_rate`. The two
            copies of a LLaMA's queries there move apart at the learning rate under Adam; 1/3 is worth trying.

    Returns:
        Groups with `params`, `lr`, `weight_decay` and `name`. "rest" is the first, whose rate a Trainer logs.

    Raises:
        ValueError: Nothing is trainable, a factor is not above 0, or FSDP1 has flattened the parameters.
    """
    for name, factor in (("lambda_factor", lambda_factor), ("query_factor", query_factor)):
        if not (math.isfinite(factor) and factor > 0):
            raise ValueError(f"{name}={factor}: must be above 0; to freeze parameters, set requires_grad_(False).")
    rates = {"rest": learning_rate, "queries": query_factor * learning_rate, "lambda": lambda_factor * learning_rate}
    queries = mirrored_query_modules(model)
    members: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = parameter_kind(name, queries)
            members.setdefault((kind, kind != "lambda" and decays(name)), []).append(parameter)
    if not members:
        raise ValueError("model: no parameter has requires_grad=True, there is nothing to train.")
    return [
        {
            "params": members[kind, decayed],
            "lr": rates[kind],
            "weight_decay": weight_decay if decayed else 0.0,
            "name": kind if kind == "lambda" or decayed else f"{kind}, no decay",
        }
        for kind in rates
        for decayed in (True, False)
        if (kind, decayed) in members
    ]


def mirrored_query_modules(model: nn.Module) -> tuple[str, ...]:
    """Returns prefixes of the query projections of V2's differential layers: those next to a `lambda_proj`."""
    return tuple(
        f"{name}.q_proj." for name, module in model.named_modules() if "lambda_proj" in dict(module.named_children())
    )


def parameter_kind(name: str, mirrored_queries: tuple[str, ...]) -> str:
    """Returns "lambda", "queries" or "rest". Raises `ValueError` for FSDP1's flat parameters."""
    parts = name.split(".")
    if "_flat_param" in parts[-1]:
        raise ValueError(f"{name}: FSDP1 has flattened its parameters into one; use FSDP2 (fsdp_version: 2).")
    if LAMBDA_MODULES & set(parts):
        return "lambda"
    return "queries" if name.startswith(mirrored_queries) else "rest"


def decays(name: str) -> bool:
    """Returns whether a parameter decays: a matrix does; a norm's weight, a bias or a magnitude does not."""
    parts = name.split(".")
    return parts[-1] != "bias" and not any(part.endswith(("norm", "magnitude_vector")) for part in parts)
