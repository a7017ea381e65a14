"""Quantized checkpoints: the native model takes LLaMA's projections in any format, and lambda in its own dtype."""

from collections.abc import Iterable, Iterator

import torch


def with_whole_lambda(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """
    Yields a checkpoint's tensors unchanged.

    Raises:
        ValueError: `lambda_proj` was quantized, which only its dtype or tensors next to it tell.
    """
    for name, tensor in weights:
        _, found, kind = name.partition("lambda_proj.")
        if found and not (kind in ("weight", "bias") and tensor.dtype.itemsize > 1 and tensor.is_floating_point()):
            raise ValueError(
                f"{name}: lambda_proj is quantized in this checkpoint, and is expected in float32, bfloat16 or "
                "float16; quantize the model again with lambda_proj among the modules to leave out, as in "
                "ignore=['lm_head', 're:.*lambda_proj'] of llm-compressor."
            )
        yield name, tensor
