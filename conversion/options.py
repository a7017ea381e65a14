"""What a user can ask of a conversion, checked before anything is opened."""

import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import torch

from conversion.checkpoint.json_files import quote
from conversion.errors import ConversionError, typed
from conversion.mapping.heads import HeadPairing, Sizes
from modeling_diff.configuration_diff_llama import paper_lambda_init


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

SHORT_NAMES = {"fp32": "float32", "float": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}

SIZE_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}

LEAST_SHARD_BYTES = 10**3  # below it every tensor gets a file of its own, which nobody means


# Held-out loss of examples/assets/tiny-llama (3.10 nats) as a plain copy: 5.08 with lambda 0.05, 5.54 with the paper's
# (compare_conversions.py). Less is better only by not subtracting, and training can push it below 0. The strict norm
# is the paper's, trains as it is, and can be exported; the neutral one is the better start where epsilon is annealed
# afterwards.
LAMBDA_INIT = 0.05
STRICT_EPS = 1e-5
# An even power of two far above any mean square of a head's output: root and weight are exact, and the norm divides
# by the same 2^12 that its weight multiplies with, so that it is the identity to the last bits of float32.
NEUTRAL_EPS = 2.0**24


CALIBRATION_TOKENS = 65536
# Left alone lambda falls to 0 in most layers of a calibration, where the second map gets no gradient any more.
LAMBDA_FLOOR = 0.02
STAGES = ("copy", "pairing", "refit", "values", "local")  # of `calibrate.Stage`


@dataclass(frozen=True)
class CalibrationText:
    """Text on which V1 is fitted: a file or datasets folder, how many tokens of it, which stages (None: all).

    No stage takes lambda below `lambda_floor` in any layer; 0 allows layers that are not differential.
    """

    path: Path
    tokens: int = CALIBRATION_TOKENS
    stages: Sequence[str] | None = None
    lambda_floor: float = LAMBDA_FLOOR

    def __post_init__(self) -> None:
        if not isinstance(self.tokens, int) or self.tokens < 1:
            raise ConversionError(f"{typed('calibration_tokens')} is {self.tokens!r}, expected a whole number above 0")
        if not isinstance(self.lambda_floor, int | float) or not 0 <= self.lambda_floor < 1:
            raise ConversionError(
                f"{typed('lambda_floor')} is {self.lambda_floor!r}, expected a number from 0 to below 1"
            )
        for stage in self.stages or ():
            chosen("stages", stage, STAGES)


def _plain_lambda(given: Any) -> str | float | list[float]:
    if isinstance(given, str):
        return given
    plain = given.tolist() if hasattr(given, "tolist") else given  # as numpy and torch have it
    return float(plain) if isinstance(plain, int | float) else [float(value) for value in plain]


def _plain_seed(given: Any) -> int:
    seed = operator.index(given)
    if not 0 <= seed < 2**32:
        raise ValueError
    return seed


# field: what becomes of the numbers given, and what they should be where that fails
SETTLED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "layers": (lambda given: sorted(set(map(operator.index, given))), "indices of layers"),
    "lambda_init": (_plain_lambda, "'paper', a number, or one for each layer"),
    "lambda_start": (float, "a number between 0 and 1, as a sigmoid"),
    "pairings": (lambda given: {operator.index(layer): pair for layer, pair in given.items()}, "pairings by layer"),
    "seed": (_plain_seed, f"a whole number from 0 to {2**32 - 1}"),
}


@dataclass(frozen=True)
class ConversionOptions:
    """Choices that change what is written; all of them are recorded in conversion.json.

    layers: indices that become differential, None for all; the others keep LLaMA's attention.
    lambda_init (v1): one number for all layers, one a layer, or "paper" for the paper's schedule; None is 0.05, as
        lambda amplifies what two heads that were trained apart disagree on.
    norm (v1): "strict" for the paper's norm with weight 1, "neutral" for an epsilon so large that it is the identity.
    lambda_start (v2): the lambda all heads start at; 1/2 needs no bias and is bit-exact, others are exact to rounding.
    pairings (v1): by layer, where the default (adjacent heads) is not wanted.
    dtype: None keeps each tensor's own.
    source_layout: "unilm" for the authors' own V1 tensor names and rotary order.
    """

    variant: Literal["v1", "v2"]
    layers: Sequence[int] | None = None
    lambda_init: Literal["paper"] | float | Sequence[float] | None = None
    norm: Literal["strict", "neutral"] = "strict"
    lambda_start: float = 0.5
    pairings: Mapping[int, HeadPairing] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    seed: int = 0
    source_layout: Literal["auto", "unilm"] = "auto"
    backbone_only: bool = False
    allow_nonfinite: bool = False

    def __post_init__(self) -> None:
        choices: dict[str, tuple[Any, ...]] = {
            "variant": ("v1", "v2"),
            "norm": ("strict", "neutral"),
            "source_layout": ("auto", "unilm"),
        }
        for field, allowed in choices.items():
            object.__setattr__(self, field, chosen(field, getattr(self, field), allowed))
        if self.dtype is not None:
            object.__setattr__(self, "dtype", chosen_dtype("dtype", self.dtype))
        self._settle()
        if not 0 < self.lambda_start < 1:
            raise ConversionError(
                f"{typed('lambda_start')} is {self.lambda_start}, expected a number between 0 and 1, as a sigmoid"
            )
        v1_only = {"lambda_init": None, "norm": "strict", "pairings": None}
        given = [field for field, default in v1_only.items() if (getattr(self, field) or default) != default]
        if self.variant == "v2" and given:
            raise ConversionError(f"{typed(given[0])} belongs to variant v1; leave it out for v2")
        if self.variant == "v1" and self.lambda_start != 0.5:
            raise ConversionError(f"{typed('lambda_start')} belongs to variant v2; use {typed('lambda_init')} for v1")

    def _settle(self) -> None:
        """Every value as the kind of number that `recorded` can write, whatever kind was given."""
        for field, (settle, expected) in SETTLED.items():
            value = getattr(self, field)
            if value is None and self.__dataclass_fields__[field].default is None:
                continue
            try:
                object.__setattr__(self, field, settle(value))
            except (AttributeError, TypeError, ValueError) as error:
                raise ConversionError(f"{typed(field)} is {value!r}, expected {expected}") from error

    @property
    def torch_dtype(self) -> torch.dtype | None:
        return DTYPES[self.dtype] if self.dtype else None

    def differential_layers(self, num_layers: int) -> list[int]:
        """The layers that become differential, ascending. ConversionError for an index that does not exist."""
        layers = sorted(set(range(num_layers) if self.layers is None else self.layers))
        there = f"the model has {num_layers} layers, counted from 0"
        if not layers:
            raise ConversionError(f"{typed('layers')} names no layer; {there}")
        if absent := [layer for layer in layers if not 0 <= layer < num_layers]:
            raise ConversionError(
                f"{typed('layers')} names layer {absent[0]}, and {there}: give some of 0-{num_layers - 1}"
            )
        return layers

    def lambda_init_list(self, num_layers: int) -> list[float]:
        """lambda_init of every layer. ConversionError unless the numbers are finite, below 1 and one a layer."""
        if self.lambda_init == "paper":
            return [paper_lambda_init(layer) for layer in range(num_layers)]
        if isinstance(self.lambda_init, str):
            raise ConversionError(f"{typed('lambda_init')} is {self.lambda_init!r}, expected 'paper' or numbers")
        given = LAMBDA_INIT if self.lambda_init is None else self.lambda_init
        values = [given] * num_layers if isinstance(given, int | float) else list(given)
        if len(values) != num_layers:
            raise ConversionError(
                f"{typed('lambda_init')} has {len(values)} values, expected one for each of {num_layers} layers"
            )
        for value in values:
            if not math.isfinite(value) or value >= 1:
                raise ConversionError(f"{typed('lambda_init')} is {value}, expected a number below 1")
        return [float(value) for value in values]

    def sub_norm_eps(self) -> float:
        return NEUTRAL_EPS if self.norm == "neutral" else STRICT_EPS

    def norm_weights(self, lambda_init: Sequence[float]) -> list[float]:
        """What `sub_norm.weight` is filled with, one a layer: 1, or what undoes the epsilon and 1 - lambda_init."""
        if self.norm == "strict":
            return [1.0] * len(lambda_init)
        return [math.sqrt(NEUTRAL_EPS) / (1 - value) for value in lambda_init]

    def layer_pairings(self, sizes: Sizes) -> list[HeadPairing]:
        """One pairing a layer. ConversionError for one that is made for other head counts."""
        if unknown := sorted(set(self.pairings or {}) - set(range(sizes.num_layers))):
            raise ConversionError(f"pairings of layers {unknown}: expected indices from 0 to {sizes.num_layers - 1}")
        default = HeadPairing.adjacent(sizes.num_heads, sizes.num_kv_heads)
        pairings = [(self.pairings or {}).get(layer, default) for layer in range(sizes.num_layers)]
        for layer, pairing in enumerate(pairings):
            counts = len(pairing.query_heads), len(pairing.kv_heads)
            if counts != (sizes.num_heads, sizes.num_kv_heads):
                raise ConversionError(
                    f"pairing of layer {layer} is for {counts} heads, expected {sizes.num_heads, sizes.num_kv_heads}"
                )
        return pairings

    def recorded(self) -> dict[str, Any]:
        """As JSON."""
        values = {field: getattr(self, field) for field in self.__dataclass_fields__}
        pairings = {str(k): {"query_heads": p.query_heads, "kv_heads": p.kv_heads} for k, p in self.pairings.items()} \
            if self.pairings else None  # fmt: skip
        return values | {"pairings": pairings}


def parse_layers(text: str) -> list[int]:
    """ "0,4-7" -> [0, 4, 5, 6, 7]. ConversionError for anything else."""
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
    """ "paper", "0.05" or "0.05,0.1,0.2" (one per layer). ConversionError for anything else."""
    if text.strip().lower() == "paper":
        return "paper"
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConversionError(
            f"{typed('lambda_init')} is {text!r}, expected paper, a number, or one for each layer such as 0.05,0.1"
        ) from error
    return values[0] if len(values) == 1 else values


def parse_stages(text: str) -> list[str]:
    """ "pairing,refit" -> ["pairing", "refit"]. ConversionError for anything else."""
    return [chosen("stages", part, STAGES) for part in text.split(",")]


SIZE_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


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
