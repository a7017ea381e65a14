"""Fine-tuning and continued pretraining: adapters, optimiser groups, lambda in the log. Never in the bundle."""

from transformers.utils import is_peft_available

from .adapters import LORA_TARGETS, check_adapter, four_bit_config, lora_config, register_with_peft
from .callbacks import FiniteLossCallback, LambdaCallback
from .cancelled import CancelledShare
from .lambda_values import hold_lambda
from .optimizer import DiffTrainer, DiffTrainerMixin, parameter_groups


if is_peft_available():
    register_with_peft()


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
