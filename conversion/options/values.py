"""Values as users write them: choices in any case, dtypes by their short names as well, sizes with a unit.

No torch and no transformers here: the command line reads its arguments with this module.
"""

import inspect
import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import field, fields, is_dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from conversion.errors import ConversionError, quote, typed


if TYPE_CHECKING:
    import torch


Config = TypeVar("Config")


DTYPES = ("float32", "bfloat16", "float16")
SHORT_NAMES = {"fp32": "float32", "float": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}
SIZE_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
SIZE_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
LEAST_SHARD_BYTES = 10**3  # below it every tensor gets a file of its own, which nobody means


def option(default: Any = None, *, help: str, **metadata: Any) -> Any:
    """Makes a field of a config that is an option of the command line as well.

    Args:
        default: Its value where nothing is given.
        help: A sentence for `--help` and for the reference.
        metadata: `flag`, the option as it is typed, where it is not the field's name; `parse`, what reads the text
            that is typed; `metavar`, what `--help` shows for the value; `python_only`, true for a field that no
            option stands for.

    Returns:
        A field of a dataclass.
    """
    return field(default=default, metadata={"help": help, **metadata})


def with_field_help(config_class: type[Config]) -> type[Config]:
    """Adds the help of a config's fields to its docstring, as the section `Args:`.

    Args:
        config_class: A dataclass whose fields are made by `option`. Fields that it has unchanged from a dataclass
            of another package, such as TrainingArguments, are left out.

    Returns:
        The same class.
    """
    package = __name__.partition(".")[0]
    foreign = [
        base for base in config_class.__mro__ if is_dataclass(base) and base.__module__.partition(".")[0] != package
    ]
    lines = ["Args:"]
    for own in fields(config_class):  # type: ignore[arg-type]
        if not any(base.__dataclass_fields__.get(own.name) is own for base in foreign):
            lines.append(f"    {own.name}: {own.metadata['help']}")
    text, raises, errors = inspect.cleandoc(config_class.__doc__ or "").partition("\n\nRaises:")
    config_class.__doc__ = "\n".join((f"{text}\n", *lines)) + raises + errors
    return config_class


def dtype_option(
    argument: str = "dtype", help: str = "Cast the weights. By default each tensor keeps its own dtype."
) -> Any:
    """Makes an option for a dtype, by any of its usual names.

    Args:
        argument: Name of the field, for messages.
        help: A sentence for `--help` and for the reference.

    Returns:
        A field of a dataclass, None by default.
    """
    return option(help=help, parse=lambda text: chosen_dtype(argument, text), metavar=f"<{'|'.join(DTYPES)}>")


def shard_size_option() -> Any:
    """Makes the option for the largest size of a weight file."""
    return option(
        "5GB", help="Largest size of a weight file, such as 5GB or 200MiB.", parse=checked_size, metavar="<size>"
    )


def allow_pickle_option() -> Any:
    """Makes the option that lets pickled weights be read."""
    return option(False, help="Also read pytorch_model.bin, of which only the tensors are taken.")


def overwrite_option() -> Any:
    """Makes the option to replace a target."""
    return option(False, help="Replace an existing OUTPUT, in one step at the end.")


def resume_option() -> Any:
    """Makes the option for work that a stopped run has kept."""
    return option(
        help="Continue from the work that a stopped run has kept, or discard it. By default the work of the same run "
        "is continued, and layers and checkpoints of another run are refused.",
        flag="--resume/--no-resume",
    )


def held_out_option() -> Any:
    """Makes the option for the text to measure on."""
    return option(help="Text or JSON lines to measure on. By default a standard text of this package.")


def config_of(config_class: type[Config], config: Config | None, options: Mapping[str, Any]) -> Config:
    """Returns the config that a call gives, as one object or as its fields.

    Args:
        config_class: Class of the config.
        config: The object, or None.
        options: The fields by name, empty where the object is given.

    Returns:
        The object, or one made of the fields.

    Raises:
        ConversionError: Both are given, or a value that the config refuses.
    """
    if config is None:
        return config_class(**options)
    if options:
        raise ConversionError(
            f"config and {next(iter(options))} are both given; put {next(iter(options))} into config"
        )
    return config


def torch_dtype(name: str) -> "torch.dtype":
    """Returns the dtype of one of the names in `DTYPES`.

    Args:
        name: "float32", "bfloat16" or "float16".

    Returns:
        The dtype of torch.
    """
    import torch

    return getattr(torch, name)


def chosen(argument: str, value: Any, choices: Iterable[str]) -> str:
    """Returns the choice that `value` names, in whatever case it is written.

    Args:
        argument: Name of the field, for messages.
        value: What a user gave.
        choices: The names to choose from, in lower case.

    Returns:
        One of `choices`.

    Raises:
        ConversionError: It names none of them; the message lists them.
    """
    name = str(value).strip().lower()
    if name not in choices:
        raise ConversionError(f"{typed(argument)} is {value!r}, expected one of {', '.join(choices)}")
    return name


def chosen_dtype(argument: str, value: Any) -> str:
    """Returns the name in `DTYPES` that `value` means.

    Args:
        argument: Name of the field, for messages.
        value: A dtype of torch, its name, or a short name such as bf16.

    Returns:
        "float32", "bfloat16" or "float16".

    Raises:
        ConversionError: It means none of them; the message lists them.
    """
    name = str(value).strip().lower().removeprefix("torch.")
    if (name := SHORT_NAMES.get(name, name)) in DTYPES:
        return name
    choices = f"{', '.join(DTYPES)} (or {', '.join(SHORT_NAMES)})"
    raise ConversionError(f"{typed(argument)} is {value!r}, expected one of {choices}")


def checked_size(text: str) -> str:
    """Returns a shard size as it was typed. ConversionError where `parse_size` cannot read it."""
    parse_size(text)
    return text


def parse_size(text: str | int) -> int:
    """Returns the bytes of a shard size.

    Args:
        text: A number and a unit, such as "5GB", "200MB" or "1.5GiB"; an int is bytes already.

    Returns:
        Bytes, at least `LEAST_SHARD_BYTES`.

    Raises:
        ConversionError: Anything else, a text without a unit, or less than that.
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


def parse_layers(text: str) -> list[int]:
    """Returns the layers that a text names: [0, 4, 5, 6, 7] for "0,4-7".

    Args:
        text: Indices and ascending ranges, separated by commas.

    Returns:
        Indices, ascending, each once.

    Raises:
        ConversionError: Anything else.
    """
    layers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,5})(?:\s*-\s*(\d{1,5}))?\s*", part)  # no model has 100,000 layers
        if not match:
            raise ConversionError(f"{typed('layers')} has {part!r}, expected layers and ranges such as 0,4-7")
        first = int(match[1])
        last = int(match[2] or match[1])
        if last < first:
            raise ConversionError(f"{typed('layers')} has {part!r}, expected a range upwards: {last}-{first}")
        layers |= set(range(first, last + 1))
    return sorted(layers)


def parse_lambda_init(text: str) -> Literal["paper"] | float | list[float]:
    """Returns the lambda_init that a text names.

    Args:
        text: "paper", a number, or one number per layer such as "0.05,0.1,0.2".

    Returns:
        "paper", the number, or the list.

    Raises:
        ConversionError: Anything else.
    """
    if text.strip().lower() == "paper":
        return "paper"
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConversionError(
            f"{typed('lambda_init')} is {text!r}, expected paper, a number, or one for each layer such as 0.05,0.1"
        ) from error
    return values[0] if len(values) == 1 else values
