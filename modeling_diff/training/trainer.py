"""Trainers whose optimizer has groups for lambda, and whose log holds it."""

from typing import Any

import torch
from torch import nn
from transformers import Trainer

from .callbacks import LambdaCallback
from .optimizer import parameter_groups


def upcast_norms(model: nn.Module) -> nn.Module:
    """
    Upcasts V1's lambda, and the norms over heads that an adapter trains, to float32.

    Args:
        model: A model, with or without PEFT's wrapper, changed in place.

    Returns:
        The model.
    """
    for name, parameter in model.named_parameters():
        parts = set(name.split("."))
        if "diff_lambda" in parts or {"sub_norm", "modules_to_save"} <= parts:
            parameter.data = parameter.data.float()
    return model


class DiffTrainerMixin(Trainer):
    """
    A Trainer with `parameter_groups` and lambda in its log, for transformers' Trainer and its subclasses.

    Write `class DiffSFTTrainer(DiffTrainerMixin, SFTTrainer): ...`. Learning rate, weight decay, `optim` and schedule
    come from the training arguments as usual. A `LambdaCallback` among `callbacks` is called before the integrations
    of `report_to`, so that they receive what it adds. V1's lambda is upcast to float32, as TRL casts every trainable
    parameter of a quantized model to bfloat16, and so are the norms over heads that an adapter trains: near 1,
    bfloat16 rounds an optimizer's steps to zero.

    Args:
        args: The Trainer's own arguments.
        lambda_factor: Learning rate of lambda, as a multiple of `learning_rate`, above 0.
        query_factor: Learning rate of `q_proj` in V2's differential layers, as a multiple of `learning_rate`, above 0.
        kwargs: The Trainer's own keyword arguments.
    """

    def __init__(self, *args, lambda_factor: float = 1.0, query_factor: float = 1.0, **kwargs):
        self.lambda_factor = lambda_factor
        self.query_factor = query_factor
        super().__init__(*args, **kwargs)
        self.attach_lambda_callbacks()
        upcast_norms(self.model)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        return upcast_norms(super().call_model_init(trial))

    def attach_lambda_callbacks(self) -> None:
        """Moves every `LambdaCallback` before the callbacks that report."""
        for callback in [c for c in self.callback_handler.callbacks if isinstance(c, LambdaCallback)]:
            callback.attach(self)

    def _load_callback_state(self) -> None:
        super()._load_callback_state()
        self.attach_lambda_callbacks()  # a restored callback is a new one, and the last

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """
        Builds the Trainer's own optimizer over `parameter_groups`.

        Args:
            model: The model to optimize. Defaults to the Trainer's.

        Returns:
            The optimizer.

        Raises:
            ValueError: `optim` chooses its parameters itself (GaLore, APOLLO, LOMO, layer-wise ones).
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
            # The Trainer uses groups among the settings instead of its own.
            self.optimizer_cls_and_kwargs = (optimizer_cls, settings | {"params": groups})
        optimizer = super().create_optimizer(model)
        self.optimizer_cls_and_kwargs = given  # the next trial of a search has other settings
        return optimizer


class DiffTrainer(DiffTrainerMixin):
    """
    Trains with transformers' Trainer, `parameter_groups` and lambda in the log; a LLaMA as the Trainer does.

    It takes a model, training arguments, data and callbacks as the Trainer does; `LambdaCallback` is among those to
    give it. `DiffTrainerMixin` says what else it changes, and makes the same of TRL's trainers.

    Args:
        args: The Trainer's own arguments.
        lambda_factor: Learning rate of lambda, as a multiple of `learning_rate`, above 0.
        query_factor: Learning rate of `q_proj` in V2's differential layers, as a multiple of `learning_rate`, above 0.
        kwargs: The Trainer's own keyword arguments.

    Raises:
        ValueError: When the optimizer is built: a factor is not above 0, nothing is trainable, FSDP1 has flattened
            the parameters, or `optim` groups parameters itself.
    """
