"""What a user can ask: one config per command, from which the command line is derived. Imports neither torch nor
transformers."""

from conversion.options.calibration import CHOICE, EFFORTS, LAMBDA_FLOOR, STAGES, CalibrationText, parse_stages
from conversion.options.commands import (
    ExportConfig,
    HealFilesConfig,
    InspectConfig,
    PushConfig,
    UpdateCodeConfig,
    VerifyConfig,
)
from conversion.options.conversion import NEUTRAL_EPS, STRICT_EPS, ConversionConfig, ConversionOptions
from conversion.options.values import (
    DTYPES,
    chosen,
    chosen_dtype,
    config_of,
    dtype_option,
    option,
    parse_lambda_init,
    parse_layers,
    parse_size,
    torch_dtype,
    with_field_help,
)


__all__ = [
    "CHOICE",
    "DTYPES",
    "EFFORTS",
    "LAMBDA_FLOOR",
    "NEUTRAL_EPS",
    "STAGES",
    "STRICT_EPS",
    "CalibrationText",
    "ConversionConfig",
    "ConversionOptions",
    "ExportConfig",
    "HealFilesConfig",
    "InspectConfig",
    "PushConfig",
    "UpdateCodeConfig",
    "VerifyConfig",
    "chosen",
    "chosen_dtype",
    "config_of",
    "dtype_option",
    "option",
    "parse_lambda_init",
    "parse_layers",
    "parse_size",
    "parse_stages",
    "torch_dtype",
    "with_field_help",
]
