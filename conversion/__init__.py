"""Checkpoints in, checkpoints out: LLaMA and DiffLlama to the Differential Transformer and back."""

import modeling_diff  # noqa: F401  # first: it says in one line when transformers or torch is too old
from conversion.convert import convert_checkpoint
from conversion.errors import ConversionError, FilesError
from conversion.evaluation.verification import VerificationReport
from conversion.export import export_checkpoint
from conversion.push import PushReport, push_checkpoint
from conversion.record import ConversionReport
from conversion.update_code import UpdateReport, update_checkpoint_code
from conversion.verify import verify_checkpoint
from modeling_diff import __version__  # noqa: F401


__all__ = [
    "ConversionError",
    "ConversionReport",
    "FilesError",
    "PushReport",
    "UpdateReport",
    "VerificationReport",
    "convert_checkpoint",
    "export_checkpoint",
    "push_checkpoint",
    "update_checkpoint_code",
    "verify_checkpoint",
]
