"""Values as users write them: choices in any case, dtypes by their short names as well, sizes with a unit."""

import operator
import re
from collections.abc import Iterable
from decimal import Decimal
from typing import Any

import torch

from conversion.errors import ConversionError, typed
from conversion.safetensors_header import quote


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT_NAMES = {"fp32": "float32", "float": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}
SIZE_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
SIZE_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
LEAST_SHARD_BYTES = 10**3  # below it every tensor gets a file of its own, which nobody means


def chosen(argument: str, value: Any, choices: Iterable[str]) -> str:
    """Returns the choice that `value` names, in whatever case it is written.

    Raises:
        ConversionError: If it names none of them; the message lists them.
    """
    name = str(value).strip().lower()
    if name not in choices:
        raise ConversionError(f"{typed(argument)} is {value!r}, expected one of {', '.join(choices)}")
    return name


def chosen_dtype(argument: str, value: Any) -> str:
    """Returns the name in `DTYPES` that `value` means: a dtype of torch, its name, or a short name such as bf16.

    Raises:
        ConversionError: If it means none of them; the message lists them.
    """
    name = str(value).strip().lower().removeprefix("torch.")
    if (name := SHORT_NAMES.get(name, name)) in DTYPES:
        return name
    choices = f"{', '.join(DTYPES)} (or {', '.join(SHORT_NAMES)})"
    raise ConversionError(f"{typed(argument)} is {value!r}, expected one of {choices}")


def parse_size(text: str | int) -> int:
    """Returns the bytes of a shard size: '5GB', '200MB', '1.5GiB', or an int, which is bytes already.

    Raises:
        ConversionError: For anything else, a text without a unit, and less than `LEAST_SHARD_BYTES`.
    """
    name = typed("max_shard_size")
    if hasattr(text, "__index__") and not isinstance(text, bool):
        size = operator.index(text)
    else:
        match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?) ?([A-Z]{0,3})", str(text).strip().upper(), re.ASCII)
        if match and not match[2]:
            raise ConversionError(f"{name} {quote(text)} has no unit: {match[1]}GB, or {match[1]}MB?")
        if not match or match[2] not in SIZE_UNITS:
            raise ConversionError(f"{name} {quote(text)}: expected a number and a unit, such as 5GB, 200MB or 1GiB")
        size = int(Decimal(match[1]) * SIZE_UNITS[match[2]])
    if size < LEAST_SHARD_BYTES:
        raise ConversionError(f"{name} {quote(text)}: expected at least 1KB, such as 5GB, 200MB or 1GiB")
    return size
