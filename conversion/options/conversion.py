"""What a user can ask of a conversion, checked before anything is opened."""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from conversion.errors import ConversionError, typed
from conversion.mapping.heads import HeadPairing, Sizes
from conversion.options.calibration import (
    EFFORTS,
    LAMBDA_FLOOR,
    SELF,
    STAGES,
    CalibrationText,
    parse_calibration,
    parse_stages,
)
from conversion.options.values import (
    allow_pickle_option,
    chosen,
    chosen_dtype,
    dtype_option,
    held_out_option,
    option,
    overwrite_option,
    parse_lambda_init,
    parse_layers,
    resume_option,
    shard_size_option,
    torch_dtype,
    with_field_help,
)


if TYPE_CHECKING:
    import torch


# Held-out loss of examples/assets/tiny-llama (3.10 nats/token) as a plain copy: 5.08 with lambda 0.05, 5.54 with the
# paper's (examples/studies/compare_conversions.py). Less is better only by not subtracting, and training can push it
# below 0. The strict norm is the paper's, trains well, and can be exported; the neutral one is the better start where
# epsilon is annealed afterwards.
LAMBDA_INIT = 0.05
STRICT_EPS = 1e-5
# An even power of two far above any mean square of a head's output: root and weight are exact, and the norm divides
# by the same 2^12 that its weight multiplies with, so that it is the identity to the last bits of float32.
NEUTRAL_EPS = 2.0**24


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
    "heads": (lambda given: [sorted(set(map(operator.index, heads))) for heads in given], "a list of heads per layer"),
    "lambda_init": (_plain_lambda, "'paper', a number, or one for each layer"),
    "lambda_start": (float, "a number between 0 and 1, as a sigmoid"),
    "share": (float, "a number above 0 and at most 1"),
    "max_kl": (float, "a number above 0, in nats per token"),
    "pairings": (lambda given: {operator.index(layer): pair for layer, pair in given.items()}, "pairings by layer"),
    "seed": (_plain_seed, f"a whole number from 0 to {2**32 - 1}"),
}


@with_field_help
@dataclass(frozen=True)
class ConversionOptions:
    """Configures what a conversion writes; all of it is recorded in conversion.json.

    Raises:
        ConversionError: A value is out of range, or two do not go together.
    """

    variant: Literal["v1", "v2"] | None = option(
        help="Needed for a LLaMA. v2: the same function exactly, with more query weights. v1: the same size, near "
        "the function once calibrated.",
    )
    layers: Sequence[int] | None = option(
        help="Layers to make differential, counted from 0. All by default.", parse=parse_layers, metavar="0,4-7"
    )
    share: float | None = option(
        help="v1, calibrated: share of all heads to make differential, such as 0.5. Those that change the model least "
        "are taken, by KL measured at its end.",
    )
    max_kl: float | None = option(
        help="v1, calibrated: as many heads as change the model by at most this KL (nats/token) before the last "
        "stages of the calibration, those that change it least first.",
    )
    heads: Sequence[Sequence[int]] | None = option(
        help="v1: heads to make differential, a list per layer, in the order of the pairings.", python_only=True
    )
    lambda_init: Literal["paper"] | float | Sequence[float] | None = option(
        help="v1: lambda at the start, one number for all layers or one per layer. 0.05 by default.",
        parse=parse_lambda_init,
        metavar="paper|FLOAT|LIST",
    )
    norm: Literal["strict", "neutral"] = option(
        "strict", help="v1: strict is the paper's norm over heads; neutral has an epsilon that makes it the identity."
    )
    lambda_start: float = option(
        0.5, help="v2: lambda at the start, between 0 and 1. Other values than 0.5 add a bias.", flag="--lambda"
    )
    pairings: Mapping[int, HeadPairing] | None = option(
        help="v1: which heads become one, by layer. Neighbors by default.", python_only=True
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = dtype_option()
    seed: int = option(0, help="v1: seed from which the lambda vectors are drawn.")
    source_layout: Literal["auto", "unilm"] = option(
        "auto", help="unilm: the tensor names and interleaved rotary order of the authors' own V1 code."
    )
    backbone_only: bool = option(False, help="Convert the model without its head (lm_head or a task head).")
    allow_nonfinite: bool = option(False, help="Carry NaN and Inf in the weights over, in place of refusing them.")
    pad_heads: bool = option(
        False, help="v1: add idle heads until heads and key-value heads pair, where their counts are odd."
    )

    def __post_init__(self) -> None:
        choices: dict[str, tuple[Any, ...]] = {
            "variant": ("v1", "v2"),
            "norm": ("strict", "neutral"),
            "source_layout": ("auto", "unilm"),
        }
        for field, allowed in choices.items():
            if (value := getattr(self, field)) is not None:
                object.__setattr__(self, field, chosen(field, value, allowed))
        if self.dtype is not None:
            object.__setattr__(self, "dtype", chosen_dtype("dtype", self.dtype))
        self._settle()
        if not 0 < self.lambda_start < 1:
            raise ConversionError(
                f"{typed('lambda_start')} is {self.lambda_start}, expected a number between 0 and 1, as a sigmoid"
            )
        self._check_amount()
        unset = dict.fromkeys(("share", "max_kl", "heads", "lambda_init", "pairings"))
        v1_only: dict[str, Any] = unset | {"norm": "strict", "pad_heads": False}
        given = [field for field, default in v1_only.items() if (getattr(self, field) or default) != default]
        if self.variant == "v2" and given:
            raise ConversionError(f"{typed(given[0])} belongs to variant v1; leave it out for v2")
        if self.variant == "v1" and self.lambda_start != 0.5:
            raise ConversionError(f"{typed('lambda_start')} belongs to variant v2; use {typed('lambda_init')} for v1")

    def _check_amount(self) -> None:
        """Checks how much is to be differential: given in one way, and possible."""
        given = [field for field in ("layers", "heads", "share", "max_kl") if getattr(self, field) is not None]
        if len(given) > 1:
            raise ConversionError(
                f"{typed(given[0])} and {typed(given[1])} both say which heads become differential; give one of them"
            )
        if self.share is not None and not 0 < self.share <= 1:
            raise ConversionError(f"{typed('share')} is {self.share}, expected a number above 0 and at most 1")
        if self.max_kl is not None and not (math.isfinite(self.max_kl) and self.max_kl > 0):
            raise ConversionError(f"{typed('max_kl')} is {self.max_kl}, expected a number above 0, in nats per token")

    def _settle(self) -> None:
        """Turns every value into the kind of number that `recorded` can write, whatever kind was given."""
        for field, (settle, expected) in SETTLED.items():
            value = getattr(self, field)
            if value is None and self.__dataclass_fields__[field].default is None:
                continue
            try:
                object.__setattr__(self, field, settle(value))
            except (AttributeError, TypeError, ValueError) as error:
                raise ConversionError(f"{typed(field)} is {value!r}, expected {expected}") from error

    @property
    def torch_dtype(self) -> "torch.dtype | None":
        """The dtype that the weights are cast to; None where each tensor keeps its own."""
        return torch_dtype(self.dtype) if self.dtype else None

    def differential_layers(self, num_layers: int) -> list[int]:
        """Returns the indices of the layers that become differential, ascending.

        Raises:
            ConversionError: `layers` or `heads` name none, or one that does not exist.
        """
        there = f"the model has {num_layers} layers, counted from 0"
        if self.heads is not None:
            if len(self.heads) != num_layers or not any(self.heads):
                raise ConversionError(
                    f"heads is {self.heads}, and {there}: give a list per layer, not all of them empty"
                )
            return [layer for layer, heads in enumerate(self.heads) if heads]
        layers = sorted(set(range(num_layers) if self.layers is None else self.layers))
        if not layers:
            raise ConversionError(f"{typed('layers')} names no layer; {there}")
        if absent := [layer for layer in layers if not 0 <= layer < num_layers]:
            raise ConversionError(
                f"{typed('layers')} names layer {absent[0]}, and {there}: give some of 0-{num_layers - 1}"
            )
        return layers

    def mixed_heads(self, sizes: Sizes) -> dict[int, list[int]]:
        """Returns the differential heads of the layers in which some heads are differential and some are not.

        Raises:
            ConversionError: `heads` names one that does not exist.
        """
        num_heads = self.layer_pairings(sizes)[0].num_heads
        by_layer = dict(enumerate(self.heads or ()))
        for layer, heads in by_layer.items():
            if absent := [head for head in heads if not 0 <= head < num_heads]:
                raise ConversionError(f"heads names head {absent[0]} of layer {layer}: give some of 0-{num_heads - 1}")
        return {layer: list(heads) for layer, heads in by_layer.items() if 0 < len(heads) < num_heads}

    def lambda_init_list(self, num_layers: int) -> list[float]:
        """Returns lambda_init of every layer.

        Raises:
            ConversionError: The numbers are not finite, not below 1, or not one per layer.
        """
        from modeling_diff.configuration_diff_llama import paper_lambda_init

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
        """Returns the epsilon of the norm over heads."""
        return NEUTRAL_EPS if self.norm == "neutral" else STRICT_EPS

    def norm_weights(self, lambda_init: Sequence[float]) -> list[float]:
        """Returns what fills `sub_norm.weight`, per layer: 1, or what undoes the epsilon and 1 - lambda_init."""
        if self.norm == "strict":
            return [1.0] * len(lambda_init)
        return [math.sqrt(NEUTRAL_EPS) / (1 - value) for value in lambda_init]

    def layer_pairings(self, sizes: Sizes) -> list[HeadPairing]:
        """Returns the pairing of every layer.

        Raises:
            ConversionError: A pairing is for other head counts, or for a layer that does not exist.
        """
        if unknown := sorted(set(self.pairings or {}) - set(range(sizes.num_layers))):
            raise ConversionError(f"pairings of layers {unknown}: expected indices from 0 to {sizes.num_layers - 1}")
        from modeling_diff.diff_llama_fields import padded_counts

        expected = padded_counts(sizes.num_heads, sizes.num_kv_heads)
        default = HeadPairing.adjacent(*expected)
        pairings = [(self.pairings or {}).get(layer, default) for layer in range(sizes.num_layers)]
        for layer, pairing in enumerate(pairings):
            counts = len(pairing.query_heads), len(pairing.kv_heads)
            if counts != expected:
                raise ConversionError(f"pairing of layer {layer} is for {counts} heads, expected {expected}")
        return pairings

    def recorded(self) -> dict[str, Any]:
        """Returns the options as JSON, for conversion.json; of a config, what changes the weights alone."""
        values = {field.name: getattr(self, field.name) for field in fields(ConversionOptions)}
        if self.pairings:
            values["pairings"] = {
                str(layer): {"query_heads": pairing.query_heads, "kv_heads": pairing.kv_heads}
                for layer, pairing in self.pairings.items()
            }
        return values


@with_field_help
@dataclass(frozen=True)
class ConversionConfig(ConversionOptions):
    """Configures a conversion: the options of `diff-llama convert`, and keyword arguments of `convert_checkpoint`.

    Raises:
        ConversionError: A value is out of range, or two do not go together.
    """

    calibration: str | Path | None = option(
        help="v1: text, JSON lines or a datasets folder on which each layer is fitted, so that little is lost; or "
        "`self`, for text that the source writes itself.",
        parse=parse_calibration,
        metavar="<path|self>",
    )
    uncalibrated: bool = option(
        False, help="v1: the plain copy, which loses most of the function and has to be healed."
    )
    effort: Literal["quick", "standard", "thorough"] | None = option(
        help="How much calibration is done. quick: pairs heads and solves for o_proj. standard, the default: solves "
        "for values as well, then fits all of the attention by gradient descent. thorough: on more text, in more "
        "steps."
    )
    calibration_tokens: int | None = option(
        help="Number of tokens of the calibration text to read. By default that of the effort "
        f"({', '.join(f'{name} {effort.tokens}' for name, effort in EFFORTS.items())}), or all of a shorter text."
    )
    stages: Sequence[str] | None = option(
        help="Calibration stages to run, in place of an effort.", parse=parse_stages, metavar=",".join(STAGES)
    )
    lambda_floor: float = option(
        LAMBDA_FLOOR, help="Lowest lambda of any calibrated layer. 0 allows layers that are not differential."
    )
    measure: bool = option(True, help="Measure the finished conversion next to its source.")
    held_out: str | Path | None = held_out_option()
    max_shard_size: str | int = shard_size_option()
    adapter: str | Path | None = option(
        help="Folder of a LoRA of the LLaMA, to carry over to OUTPUT/adapter. With --calibration it is merged into "
        "the LLaMA first. Where SOURCE is converted already, OUTPUT is the adapter."
    )
    revision: str | None = option(help="Branch, tag or commit, where SOURCE is a Hub id.")
    allow_pickle: bool = allow_pickle_option()
    dry_run: bool = option(False, help="Check everything but the numbers in the weights, and write nothing.")
    overwrite: bool = overwrite_option()
    resume: bool | None = resume_option()

    @property
    def calibration_text(self) -> CalibrationText | None:
        """The text that V1 is fitted on; None without one.

        Raises:
            ConversionError: Values that mean something only with a text.
        """
        if self.calibration is not None:
            return CalibrationText(
                None if self.calibration == SELF else Path(self.calibration),
                self.calibration_tokens,
                stages=self.stages,
                lambda_floor=self.lambda_floor,
                effort=self.effort,
            )
        for field in fields(ConversionConfig):
            belongs = field.name in ("share", "max_kl", "effort", "stages", "calibration_tokens", "lambda_floor")
            if belongs and getattr(self, field.name) != field.default:
                raise ConversionError(
                    f"{typed(field.name)} needs text to calibrate on; give it ({typed('calibration')})"
                )
        return None
