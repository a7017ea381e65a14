"""What a source's rotary settings must say; they are kept unchanged. transformers only warns of most faults."""

import sys
from collections.abc import Mapping
from typing import Any

from conversion.errors import ConversionError


# rope_type: numbers it cannot do without
ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": (),
}
TYPE_KEYS = ("rope_type", "type")
SPELLINGS = ("rope_scaling", "rope_parameters")
PRETRAINED = "original_max_position_embeddings"
OPTIONAL = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
STRETCHED = ("yarn", "llama3", "longrope")  # the types that ask what length the model was pretrained for


def with_pretrained_length(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config with `original_max_position_embeddings` inside the rotary settings, not next to them (Phi3).

    transformers' models take the one next to them if there are two; its configs do not know it until a model is built.

    Raises:
        ConversionError: The two disagree.
    """
    length = raw.get(PRETRAINED)
    settings = {field: _normalized(field, raw[field]) for field in SPELLINGS if raw.get(field)}
    stretched = {field: said for field, said in settings.items() if said["rope_type"] in STRETCHED}
    if length is None or not stretched:
        return dict(raw)
    within = {field: said[PRETRAINED] for field, said in stretched.items() if PRETRAINED in said}
    _refuse_difference(PRETRAINED, {"top level": length, **within})
    rest = {field: value for field, value in raw.items() if field != PRETRAINED}
    return rest | {field: raw[field] | {PRETRAINED: length} for field in stretched}


def check_rotary(raw: Mapping[str, Any], map_dim: int) -> None:
    """Checks both spellings, `rope_scaling` next to `rope_theta`, and `rope_parameters`; they must agree.

    Args:
        raw: The source's config.json.
        map_dim: Width of a head.

    Raises:
        ConversionError: A type is unknown, a number missing or impossible, or two settings disagree.
    """
    spelled = {field: _normalized(field, raw[field]) for field in SPELLINGS if raw.get(field)}
    theta = {field: settings["rope_theta"] for field, settings in spelled.items() if "rope_theta" in settings}
    if raw.get("rope_theta") is not None:
        theta["rope_theta"] = raw["rope_theta"]
    _refuse_difference("the base", theta)
    _refuse_difference("the scaling", {field: _without_theta(settings) for field, settings in spelled.items()})
    for value in theta.values():
        if not _is_number(value) or value <= 0:
            raise ConversionError(f"config.json: rope_theta is {value!r}, expected a number above 0")
    for field, settings in spelled.items():
        _check_settings(field, settings, map_dim)


def _normalized(field: str, settings: Any) -> dict[str, Any]:
    """Returns the settings with their type under `rope_type` alone."""
    if not isinstance(settings, dict):
        raise ConversionError(f"config.json: {field} is {settings!r}, expected an object")
    types = {key: settings[key] for key in TYPE_KEYS if settings.get(key) is not None}
    _refuse_difference(f"the type in {field}", types)
    rest = {key: value for key, value in settings.items() if key not in TYPE_KEYS and value is not None}
    return {"rope_type": next(iter(types.values()), "default"), **rest}


def _without_theta(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != "rope_theta"}


def _refuse_difference(what: str, values: Mapping[str, Any]) -> None:
    if any(value != other for value in values.values() for other in values.values()):
        said = ", ".join(f"{field}: {value!r}" for field, value in values.items())
        raise ConversionError(f"config.json: {what} of the rotary embedding is given twice ({said}); remove one")


def _check_settings(field: str, settings: Mapping[str, Any], map_dim: int) -> None:
    rope_type = settings["rope_type"]
    if rope_type not in ROPE_TYPES:
        raise ConversionError(f"config.json: {field} has type {rope_type!r}, known are {', '.join(ROPE_TYPES)}")
    for key in (*ROPE_TYPES[rope_type], *(key for key in OPTIONAL if key in settings)):
        if not _is_number(settings.get(key)):
            raise ConversionError(f"config.json: {field} ({rope_type}) has {key} {settings.get(key)!r}, not a number")
    if "factor" in settings and (not _is_number(settings["factor"]) or settings["factor"] < 1):
        raise ConversionError(
            f"config.json: {field} has factor {settings['factor']!r}, expected a number of at least 1"
        )
    if rope_type == "llama3" and settings["high_freq_factor"] <= settings["low_freq_factor"]:
        raise ConversionError(f"config.json: {field} has high_freq_factor not above low_freq_factor")
    if settings.get("partial_rotary_factor", 1) != 1:
        raise ConversionError("config.json: partial_rotary_factor is not 1, and LLaMA turns whole heads")
    if rope_type == "longrope":
        for key in ("short_factor", "long_factor"):
            _check_factors(field, key, settings.get(key), map_dim // 2)


def _check_factors(field: str, key: str, factors: Any, count: int) -> None:
    if not isinstance(factors, list) or len(factors) != count or not all(_is_number(factor) for factor in factors):
        raise ConversionError(f"config.json: {field} has a {key} that is not a list of {count} numbers")


def _is_number(value: Any) -> bool:
    """Returns whether it is one, and finite; whole numbers can be too large for a float."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and -sys.float_info.max <= value <= sys.float_info.max
    )
