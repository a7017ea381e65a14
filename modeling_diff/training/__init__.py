"""
Fine-tuning and continued pretraining: adapters, optimizer groups, lambda in the log. Never in the bundle.

What is built on transformers' Trainer is imported when it is first asked for: the Trainer takes seconds to import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..diff_adapters import LORA_TARGETS
from .adapters import check_adapter, four_bit_config, lora_config
from .cancellation import CancelledShare
from .lambda_values import hold_lambda
from .optimizer import parameter_groups


if TYPE_CHECKING:
    from .callbacks import FiniteLossCallback, LambdaCallback
    from .trainer import DiffTrainer, DiffTrainerMixin


__all__ = [
    "CancelledShare",
    "DiffTrainer",
    "DiffTrainerMixin",
    "FiniteLossCallback",
    "LORA_TARGETS",
    "LambdaCallback",
    "check_adapter",
    "four_bit_config",
    "hold_lambda",
    "lora_config",
    "parameter_groups",
]

MODULES = {
    "DiffTrainer": "trainer",
    "DiffTrainerMixin": "trainer",
    "FiniteLossCallback": "callbacks",
    "LambdaCallback": "callbacks",
}


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{MODULES[name]}", __name__), name)
