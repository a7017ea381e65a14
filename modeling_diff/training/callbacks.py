"""Callbacks of the Trainer: lambda in its log, and an end to training once the loss is not finite."""

import math
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from .cancellation import CancelledShare
from .lambda_values import (
    RunningLambda,
    differential_attentions,
    full_tensor,
    hold_lambda,
    layer_lambda,
    trained_module,
)


logger = logging.get_logger(__name__)


class LambdaCallback(TrainerCallback, ExportableState):
    """
    Adds lambda to every training log of a `DiffTrainer`: to `log_history`, to the integrations of `report_to`, and to
    the console, which leaves out single layers.

    | key | what |
    |---|---|
    | `lambda/layer_<l>/mean` | lambda (V1); its mean over heads and tokens, padding too, since the last log (V2) |
    | `lambda/layer_<l>/min`, `/max` | over the same tokens and heads (V2) |
    | `lambda/layer_<l>/distance` | mean minus its value at the first step, also after a resume |
    | `lambda/mean`, `lambda/min`, `lambda/max` | over layers |
    | `lambda/layer_<l>/cancelled`, `lambda/cancelled` | share of attention cancelled, see `CancelledShare` |
    | `lambda/grad_norm` | norm of all lambda parameters' gradients at the last step, after clipping |

    A negative lambda of V1 is warned of once: the maps are then added, not subtracted. With a plain Trainer, call
    `attach(trainer)` instead of passing the callback in `callbacks`.

    Args:
        floor: The smallest value of V1's lambda, to which it is raised after every optimizer step, unless it is
            frozen. None for no floor. V2's lambda is a sigmoid and needs none.

    Raises:
        ValueError: The floor is not finite; or, when training begins, the model has no differential layer, the floor
            is for V2, or FSDP1 is used.
    """

    def __init__(self, floor: float | None = None):
        if floor is not None and not math.isfinite(floor):
            raise ValueError(f"floor={floor}: must be finite, as in 0.02, or None for no floor.")
        self.floor = floor
        self.start: dict[str, float] = {}
        self.attached = False
        self.warned = False
        self.lambdas: dict[int, nn.Module] = {}
        self.running: dict[int, RunningLambda] = {}
        self.cancelled: dict[int, CancelledShare] = {}
        self.parameters: list[nn.Parameter] = []
        self.hooks: list[RemovableHandle] = []
        self.grad_norm: torch.Tensor | None = None

    def attach(self, trainer: Trainer) -> "LambdaCallback":
        """
        Inserts this callback into a Trainer's, before those that report.

        Args:
            trainer: The Trainer.

        Returns:
            The callback itself.
        """
        callbacks = trainer.callback_handler.callbacks
        callbacks[:] = [c for c in callbacks if c is not self and not isinstance(c, LayersOffConsole)]
        callbacks.insert(0, self)
        console = [index for index, c in enumerate(callbacks) if isinstance(c, (PrinterCallback, ProgressCallback))]
        if console:
            callbacks.insert(console[0], LayersOffConsole())
        self.attached = True
        return self

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps, so that a resumed run measures its distance from the first start."""
        return {"args": {"floor": self.floor}, "attributes": {"start": self.start}}

    def on_train_begin(self, args, state, control, model: nn.Module, **kwargs) -> None:
        if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
            raise ValueError("LambdaCallback reads lambda under FSDP2 only: set fsdp_version: 2.")
        if args.report_to and not self.attached:
            logger.warning_once(
                f"LambdaCallback: report_to={args.report_to} is called before it and will not see lambda; use a "
                "DiffTrainer, or attach(trainer)."
            )
        self.watch(model)
        saved = state.stateful_callbacks.get(type(self).__name__, {}) if state.global_step else {}
        self.start = saved.get("attributes", {}).get("start", {})

    def watch(self, model: nn.Module) -> None:
        """Registers forward hooks on a model's differential layers, instead of earlier ones."""
        attentions = differential_attentions(model)
        if not attentions:
            raise ValueError("model: no layer has differential attention, so there is no lambda to watch.")
        self.on_train_end()
        names = {
            layer: "diff_lambda" if hasattr(a, "diff_lambda") else "lambda_proj" for layer, a in attentions.items()
        }
        self.lambdas = {layer: getattr(attention, names[layer]) for layer, attention in attentions.items()}
        self.running = {layer: RunningLambda() for layer, name in names.items() if name == "lambda_proj"}
        if self.floor is not None and len(self.running) == len(self.lambdas):
            raise ValueError(f"floor={self.floor}: V2's lambda is a sigmoid of the token and needs none; use None.")
        self.hooks = [self.lambdas[layer].register_forward_hook(running) for layer, running in self.running.items()]
        self.cancelled = {layer: CancelledShare(attention) for layer, attention in attentions.items()}
        self.hooks += [hook for share in self.cancelled.values() for hook in share.hooks]
        self.parameters = [p for module in self.lambdas.values() for p in module.parameters() if p.requires_grad]

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        norms = [full_tensor(p.grad).detach().float().norm() for p in self.parameters if p.grad is not None]
        self.grad_norm = torch.stack(norms).norm() if norms else None
        if not self.start:
            self.start = {str(layer): summary["mean"] for layer, summary in self.summaries().items()}

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        for layer, module in self.lambdas.items():
            if layer in self.running:
                continue
            diff_lambda = trained_module(module)
            if self.floor is not None and all(p.requires_grad for p in diff_lambda.parameters()):
                hold_lambda(diff_lambda, self.floor)
            elif not self.warned and (value := layer_lambda(diff_lambda)) < 0:
                self.warned = True
                logger.warning(
                    f"lambda of layer {layer} is {value:.4f} at step {state.global_step + 1}: below 0 the negative "
                    "map is added, not subtracted. LambdaCallback(floor=0.02) keeps it positive where it trains."
                )

    def on_log(self, args, state, control, logs: dict[str, float], **kwargs) -> None:
        seen = self.start and all(running.count for running in self.running.values())
        if "loss" not in logs or not seen:
            return
        values = self.metrics()
        logs |= values
        if state.log_history:
            state.log_history[-1] |= values
        for running in self.running.values():
            running.reset()
        for share in self.cancelled.values():
            share.measure()

    def on_train_end(self, *args, **kwargs) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks = []

    def summaries(self) -> dict[int, dict[str, float]]:
        """Returns lambda's mean by layer, and in V2 its extremes, since the last log."""
        summaries = {layer: running.summary() for layer, running in self.running.items()}
        for layer, module in self.lambdas.items():
            if layer not in summaries:
                summaries[layer] = {"mean": layer_lambda(trained_module(module))}
        return summaries

    def metrics(self) -> dict[str, float]:
        """Returns the entries of the next log."""
        values: dict[str, float] = {}
        summaries = self.summaries()
        for layer, summary in summaries.items():
            values |= {f"lambda/layer_{layer}/{name}": value for name, value in summary.items()}
            values[f"lambda/layer_{layer}/distance"] = summary["mean"] - self.start[str(layer)]
        means = [summary["mean"] for summary in summaries.values()]
        values["lambda/mean"] = sum(means) / len(means)
        values["lambda/min"] = min(summary.get("min", summary["mean"]) for summary in summaries.values())
        values["lambda/max"] = max(summary.get("max", summary["mean"]) for summary in summaries.values())
        shares = {layer: float(share.value) for layer, share in self.cancelled.items() if share.value is not None}
        values |= {f"lambda/layer_{layer}/cancelled": share for layer, share in shares.items()}
        if shares:
            values["lambda/cancelled"] = sum(shares.values()) / len(shares)
        if self.grad_norm is not None:
            values["lambda/grad_norm"] = float(self.grad_norm)
        return values


class LayersOffConsole(TrainerCallback):
    """Removes single layers from the log just before it is printed: a hundred numbers would hide the loss."""

    def on_log(self, args, state, control, logs: dict[str, float], **kwargs) -> None:
        for name in [name for name in logs if name.startswith("lambda/layer_")]:
            del logs[name]


class FiniteLossCallback(TrainerCallback):
    """
    Stops training at the first logged loss or gradient norm that is NaN or infinite.

    Raises:
        ValueError: A logged number is not finite; or, when training begins, `logging_nan_inf_filter` is not False:
            the Trainer would log other numbers.
    """

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if args.logging_nan_inf_filter:
            raise ValueError("logging_nan_inf_filter=True hides NaN from the log; set it to False.")

    def on_log(self, args, state, control, logs: dict[str, float], **kwargs) -> None:
        for name in ("loss", "grad_norm", "eval_loss"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise ValueError(
                    f"{name} is {logs[name]} at step {state.global_step}: lower the learning rate, warm up, or look "
                    f"for rows without a label; checkpoints in {args.output_dir} are from before."
                )
