"""
The releases of transformers that this code runs on, and every difference between them.

No other file checks the version of transformers to choose how the model is called. The configuration imports this file
first, so it imports no more than is needed to say that a release is too old.
"""

import re
from collections.abc import MutableMapping
from typing import Any

import torch
import transformers


OLDEST_TRANSFORMERS = "5.6.0"  # LLaMA-Factory 0.9.5 accepts nothing newer
NEWEST_TESTED_TRANSFORMERS = "5.24.0"  # newer ones are checked at the first use (diff_transformers_check.py)
OLDEST_TORCH = "2.11"


def release(version: str) -> tuple[int, ...]:
    """Returns the numbers of a version without suffixes: "5.25.0.dev0" is (5, 25, 0)."""
    return tuple(int(number) for number in re.match(r"\d+(?:\.\d+)*", version).group().split("."))


TRANSFORMERS_VERSION: str = transformers.__version__
TRANSFORMERS = release(TRANSFORMERS_VERSION)


def check_versions() -> None:
    """
    Checks that the installed transformers and torch are new enough for this code.

    Raises:
        ImportError: One of them is older than the oldest supported release; names both versions and the way out.
    """
    major, minor = release(NEWEST_TESTED_TRANSFORMERS)[:2]
    for package, found, oldest, wanted in (
        ("transformers", TRANSFORMERS_VERSION, OLDEST_TRANSFORMERS, f">={OLDEST_TRANSFORMERS},<{major}.{minor + 1}"),
        ("torch", torch.__version__, OLDEST_TORCH, f">={OLDEST_TORCH}"),
    ):
        if release(found) < release(oldest):
            raise ImportError(
                f"DiffLlama needs {package} >= {oldest}, found {package} {found}: "
                f'`pip install "{package}{wanted}"`, then start Python again.'
            )


# transformers 5.24 renamed `past_key_values` to `cache` in every forward and output. The old name goes in 5.40 there;
# here both stay as long as a release below 5.24 is supported.
CACHE_NAME = "cache" if TRANSFORMERS >= (5, 24) else "past_key_values"


# 5.16 moved tensor parallelism to `transformers.distributed` and gave it another interface. Earlier releases load
# models whole on every device.
HAS_TENSOR_PARALLEL = TRANSFORMERS >= (5, 16)


def tensor_parallel_mesh(mesh: Any) -> Any:
    """Returns the mesh of ranks that share a model's heads, from what `maybe_distribute_model` of a release gets."""
    if hasattr(mesh, "get_mesh"):  # since 5.19
        return mesh.get_mesh("tp")
    return mesh["tp"] if mesh.ndim > 1 else mesh


def cache_argument(cache: Any) -> dict[str, Any]:
    """Returns the keyword argument by which models of this release take a cache: `model(ids, **cache_argument(c))`."""
    return {CACHE_NAME: cache}


def output_cache(output: Any) -> Any:
    """Returns the cache of a model's output, which has the same name as the argument."""
    return output[CACHE_NAME]


def append_to_cache(
    key_states: torch.Tensor,
    value_states: torch.Tensor,
    layer_idx: int,
    cache: Any,
    past_key_values: Any,
    kwargs: MutableMapping[str, Any],
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Appends new states to the cache that came under either name, as LlamaAttention of this release does.

    Args:
        key_states: New keys, (B, K, T, D).
        value_states: New values, (B, K, T, D).
        layer_idx: Index of the layer.
        cache: What LLaMA's layer passed as `cache`. Before 5.24 this is the paged cache of continuous batching, which
            the attention function takes from `kwargs` and updates.
        past_key_values: What LLaMA's layer passed as `past_key_values`, before 5.24.
        kwargs: The other keyword arguments on their way to the attention function; a paged cache updates them.

    Returns:
        Keys and values of the whole sequence so far, (B, K, S, D) each.

    Raises:
        UnsupportedTransformersError: The model should use a cache, and none arrived under a name known here.
    """
    if TRANSFORMERS < (5, 24) and cache is not None and not isinstance(cache, transformers.Cache):
        kwargs["cache"] = cache
        return key_states, value_states
    cache = past_key_values if cache is None else cache
    if cache is None:
        refuse_lost_cache(kwargs)
        return key_states, value_states
    if TRANSFORMERS < (5, 24):
        return cache.update(key_states, value_states, layer_idx)
    return cache.update(key_states, value_states, layer_idx, kwargs=kwargs)  # paged caches, too, are updated here


def refuse_lost_cache(kwargs: MutableMapping[str, Any]) -> None:
    """
    Checks, where no cache arrived, that none was meant to: without it every new token would be computed from itself.

    Raises:
        UnsupportedTransformersError: `use_cache` is set, or a cache came under an unknown name.
    """
    lost = [name for name, value in kwargs.items() if isinstance(value, transformers.Cache)]
    if lost or kwargs.get("use_cache"):
        found = f"a cache came as {lost[0]!r}" if lost else "use_cache is set, and no cache came"
        raise UnsupportedTransformersError(f"{found}, where {CACHE_NAME!r} is expected")


class UnsupportedTransformersError(ImportError):
    """
    Raised if the installed transformers differs from all tested releases in a way that changes tokens.

    Args:
        difference: What differs, in words.
    """

    def __init__(self, difference: str):
        self.difference = difference
        super().__init__(
            f"transformers {TRANSFORMERS_VERSION} calls DiffLlama in a way that its code does not know "
            f"({difference}), so tokens would be wrong. It is tested with transformers {OLDEST_TRANSFORMERS} to "
            f"{NEWEST_TESTED_TRANSFORMERS}: install one of these, or a newer diff-llama (and run `diff-llama "
            "update-code FOLDER` where a checkpoint carries its own code)."
        )
