"""Optimiser groups: what decays, and what learns at a rate of its own."""

import math
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from .callbacks import LambdaCallback


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
    Every trainable parameter once, in groups for any torch optimiser: `params`, `lr`, `weight_decay` and a `name`.

    Lambda (`diff_lambda`, `lambda_proj`), norms, biases and DoRA's magnitudes do not decay: decay would pull lambda
    towards lambda_init in V1 and 1/2 in V2. `lambda_factor` multiplies the rate of lambda, `query_factor` that of
    `q_proj` in V2's differential layers, whose two copies of a LLaMA's queries move apart at the rate under Adam;
    1/3 is worth a try there. Adapters on a module are treated as the module is. LLaMA's own layers and models may be
    passed as well. Names are read by their parts, so wrappers (peft, DDP, FSDP2, torch.compile) change nothing. "rest"
    comes first: the rate that a Trainer logs is the first group's.

    Raises `ValueError` if nothing is trainable, for a factor that is not above 0, and for FSDP1's flat parameters.
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
    """Prefixes of the query projections of V2's differential layers: those that have a `lambda_proj` beside them."""
    return tuple(
        f"{name}.q_proj." for name, module in model.named_modules() if "lambda_proj" in dict(module.named_children())
    )


def parameter_kind(name: str, mirrored_queries: tuple[str, ...]) -> str:
    parts = name.split(".")
    if "_flat_param" in parts[-1]:
        raise ValueError(f"{name}: FSDP1 has flattened its parameters into one; use FSDP2 (fsdp_version: 2).")
    if LAMBDA_MODULES & set(parts):
        return "lambda"
    return "queries" if name.startswith(mirrored_queries) else "rest"


def decays(name: str) -> bool:
    """Whether weight decay is meant for the parameter: a matrix, and not a norm's weight, a bias or a magnitude."""
    parts = name.split(".")
    return parts[-1] != "bias" and not any(part.endswith(("norm", "magnitude_vector")) for part in parts)


def widen(model: nn.Module) -> nn.Module:
    """The model, with V1's lambda and the norms over heads that an adapter trains in float32."""
    for name, parameter in model.named_parameters():
        parts = set(name.split("."))
        if "diff_lambda" in parts or {"sub_norm", "modules_to_save"} <= parts:
            parameter.data = parameter.data.float()
    return model


class DiffTrainerMixin(Trainer):
    """
    A Trainer with these groups and a log that holds lambda; for transformers' Trainer and any that descends from it.

    `class DiffSFTTrainer(DiffTrainerMixin, SFTTrainer): ...`, then `lambda_factor` and `query_factor` as keywords,
    everything else as ever: rate, decay, `optim` and schedule come from the arguments. A `LambdaCallback` among
    `callbacks` is called before the integrations of `report_to`, so that they receive what it adds. V1's lambda is put
    back to float32, as TRL casts every trainable parameter of a quantised model to bfloat16, and the norms over heads
    that an adapter trains are put there: near 1 bfloat16 rounds an optimiser's steps to none.
    """

    def __init__(self, *args, lambda_factor: float = 1.0, query_factor: float = 1.0, **kwargs):
        self.lambda_factor, self.query_factor = lambda_factor, query_factor
        super().__init__(*args, **kwargs)
        self.attach_lambda_callbacks()
        widen(self.model)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        return widen(super().call_model_init(trial))

    def attach_lambda_callbacks(self) -> None:
        for callback in [c for c in self.callback_handler.callbacks if isinstance(c, LambdaCallback)]:
            callback.attach(self)

    def _load_callback_state(self) -> None:
        super()._load_callback_state()
        self.attach_lambda_callbacks()  # a restored callback is a new one, and the last

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """
        The Trainer's own optimiser over `parameter_groups`.

        Raises `ValueError` for an `optim` that chooses its parameters itself (GaLore, APOLLO, LOMO, layer-wise ones).
        """
        given = self.optimizer_cls_and_kwargs
        if self.optimizer is None:
            opt_model: Any = self.model if model is None else model
            optimizer_cls, settings = given or self.get_optimizer_cls_and_kwargs(self.args, opt_model)
            if not isinstance(optimizer_cls, type) or {"params", "model", "optimizer_dict"} & settings.keys():
                raise ValueError(f"optim={self.args.optim}: it groups parameters itself; use a plain Trainer with it.")
            groups = parameter_groups(
                opt_model,
                learning_rate=settings.get("lr", self.args.learning_rate),
                weight_decay=self.args.weight_decay,
                lambda_factor=self.lambda_factor,
                query_factor=self.query_factor,
            )
            # The Trainer takes groups that stand among the settings in the place of its own.
            self.optimizer_cls_and_kwargs = (optimizer_cls, settings | {"params": groups})
        optimizer = super().create_optimizer(model)
        self.optimizer_cls_and_kwargs = given  # the next trial of a search has other settings
        return optimizer


class DiffTrainer(DiffTrainerMixin):
    """transformers' Trainer with the mixin."""
