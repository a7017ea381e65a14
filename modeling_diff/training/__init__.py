"""Fine-tuning and continued pretraining: adapters, optimiser groups, lambda in the log. Never in the bundle."""

from ..diff_adapters import LORA_TARGETS
from .adapters import check_adapter, four_bit_config, lora_config
from .callbacks import FiniteLossCallback, LambdaCallback
from .cancelled import CancelledShare
from .lambda_values import hold_lambda
from .optimizer import DiffTrainer, DiffTrainerMixin, parameter_groups


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
