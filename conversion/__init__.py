"""Checkpoints in, checkpoints out: LLaMA and DiffLlama to the Differential Transformer and back.

Names are imported when they are first asked for, so that the command line answers at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from conversion.calibration.calibrate import calibrate
    from conversion.convert import convert_checkpoint
    from conversion.errors import ConversionError, FilesError
    from conversion.evaluation.certificate import Certificate
    from conversion.evaluation.certification import certify
    from conversion.evaluation.verification import VerificationReport
    from conversion.export import export_checkpoint
    from conversion.heal import HealingReport, heal_checkpoint
    from conversion.healing.config import HealingConfig
    from conversion.healing.options import HealingOptions
    from conversion.healing.trainer import HealingTrainer
    from conversion.options import ConversionConfig
    from conversion.push import PushReport, push_checkpoint
    from conversion.record import ConversionReport
    from conversion.update_code import UpdateReport, update_checkpoint_code
    from conversion.verify import verify_checkpoint


MODULES = {
    "Certificate": "evaluation.certificate",
    "ConversionConfig": "options",
    "ConversionError": "errors",
    "ConversionReport": "record",
    "FilesError": "errors",
    "HealingConfig": "healing.config",
    "HealingOptions": "healing.options",
    "HealingReport": "heal",
    "HealingTrainer": "healing.trainer",
    "PushReport": "push",
    "UpdateReport": "update_code",
    "VerificationReport": "evaluation.verification",
    "calibrate": "calibration.calibrate",
    "certify": "evaluation.certification",
    "convert_checkpoint": "convert",
    "export_checkpoint": "export",
    "heal_checkpoint": "heal",
    "push_checkpoint": "push",
    "update_checkpoint_code": "update_code",
    "verify_checkpoint": "verify",
}
__all__ = [
    "Certificate",
    "ConversionConfig",
    "ConversionError",
    "ConversionReport",
    "FilesError",
    "HealingConfig",
    "HealingOptions",
    "HealingReport",
    "HealingTrainer",
    "PushReport",
    "UpdateReport",
    "VerificationReport",
    "calibrate",
    "certify",
    "convert_checkpoint",
    "export_checkpoint",
    "heal_checkpoint",
    "push_checkpoint",
    "update_checkpoint_code",
    "verify_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("modeling_diff").__version__
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name not in ("ConversionError", "FilesError"):
        import_module("modeling_diff")  # first: it says in one line when transformers or torch is too old
    return getattr(import_module(f"conversion.{MODULES[name]}"), name)
