"""
Which heads to convert where not all are: those that change the model least.

A unit of the choice is all heads of one layer that share a key-value head: only values that differential heads alone
read can change their basis when the layer is calibrated.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from conversion.calibration.head_trials import HeadTrials
from conversion.errors import ConversionError, typed
from conversion.mapping.heads import HeadPairing, heads_in_words, ranges
from conversion.options import ConversionOptions


Options = TypeVar("Options", bound=ConversionOptions)
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeadChoice:
    """The heads to convert, and what was measured to choose them.

    Attributes:
        heads: Their indices per layer, ascending.
        pairings: Per layer, which of LLaMA's heads become one: what the indices refer to.
        units: The heads of a layer that are chosen together.
        costs: KL in nats per token, per layer and unit, of the model with that unit alone converted.
        kl: KL in nats per token with the chosen heads converted together. A whole calibration leaves less.
        tokens: How many tokens were judged.
    """

    heads: tuple[tuple[int, ...], ...]
    pairings: tuple[HeadPairing, ...]
    units: tuple[tuple[int, ...], ...]
    costs: tuple[tuple[float, ...], ...]
    kl: float
    tokens: int

    @property
    def mixed(self) -> list[int]:
        """Returns the layers in which some heads are chosen and some are not."""
        return [layer for layer, heads in enumerate(self.heads) if 0 < len(heads) < self.pairings[layer].num_heads]

    @property
    def layers(self) -> list[int]:
        """Returns the layers in which a head is chosen."""
        return [layer for layer, heads in enumerate(self.heads) if heads]

    @property
    def note(self) -> str:
        """What was chosen, as one sentence."""
        return (
            f"differential heads: {heads_in_words(self.heads, self.pairings[0].num_heads)}, which change the model "
            f"least; KL {self.kl:.3g} nats/token on {self.tokens:,} tokens of the calibration text after a first fit"
        )

    def options(self, options: Options) -> Options:
        """Returns the options of the conversion of these heads, in place of those that asked for a choice.

        Args:
            options: What was asked for. Its type is kept.
        """
        found: dict[str, Any] = {"share": None, "max_kl": None, "layers": self.layers}
        if self.mixed:
            pairings = {**(options.pairings or {}), **{layer: self.pairings[layer] for layer in self.mixed}}
            found |= {"layers": None, "heads": self.heads, "pairings": pairings}
        return replace(options, **found)

    def record(self) -> dict[str, Any]:
        """Returns the choice as JSON, for conversion.json."""
        return {
            "heads": [list(heads) for heads in self.heads],
            "units": [list(unit) for unit in self.units],
            "costs": [[round(cost, 6) for cost in costs] for costs in self.costs],
            "kl": round(self.kl, 6),
            "tokens": self.tokens,
        }


def num_chosen(share: float, num_units: int) -> int:
    """Returns how many units hold a share (above 0, at most 1) of all heads, one at least."""
    return max(1, int(share * num_units + 0.5))


def choose_heads(trials: HeadTrials, *, share: float | None = None, max_kl: float | None = None) -> HeadChoice:
    """Chooses the heads to convert, those that cost least.

    Args:
        trials: What the heads cost.
        share: How much of all heads to choose. One of `share` and `max_kl` is given.
        max_kl: KL in nats per token that the chosen heads may cost together; as many are chosen as that allows.

    Raises:
        ConversionError: The cheapest heads alone cost more than `max_kl`.
    """
    order = trials.cheapest_first

    def together(count: int) -> float:
        return trials.together(trials.heads(order[:count]))

    if share is not None:
        count = num_chosen(share, len(order))
        kl = together(count)
    else:
        assert max_kl is not None
        count, kl = _largest(together, len(order), max_kl)
        if not count:
            layer, unit = order[0]
            raise ConversionError(
                f"{typed('max_kl')} is {max_kl:g}, and the heads that cost least, {ranges(trials.units[unit])} of "
                f"layer {layer}, alone cost {trials.costs[layer][unit]:.2g} nats per token; allow more, choose "
                f"{typed('share')} or {typed('layers')}, or convert to v2, which is exact"
            )
    choice = HeadChoice(
        heads=trials.heads(order[:count]),
        pairings=trials.layer_pairings,
        units=tuple(trials.units),
        costs=tuple(map(tuple, trials.costs)),
        kl=kl,
        tokens=trials.tokens,
    )
    logger.info(choice.note)
    return choice


def _largest(together: Callable[[int], float], num_units: int, max_kl: float) -> tuple[int, float]:
    """How many of the cheapest units cost at most `max_kl` together, by halving, and their KL."""
    fits = 0
    kl = 0.0
    above = num_units + 1
    while above - fits > 1:
        count = (fits + above) // 2
        reached = together(count)
        if reached <= max_kl:
            fits = count
            kl = reached
        else:
            above = count
    return fits, kl
