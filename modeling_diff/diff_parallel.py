"""Tensor parallelism: the parallel style of modules that heads of every rank share, and which heads each rank has."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .diff_transformers_compat import HAS_TENSOR_PARALLEL, tensor_parallel_mesh


if HAS_TENSOR_PARALLEL:
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer
else:
    ALL_PARALLEL_STYLES = None
    TensorParallelLayer = object  # type: ignore[misc, assignment]


SHARED_BY_HEADS = "shared_by_heads"  # the name used in the configuration's plan


class SharedByHeadsParallel(TensorParallelLayer):
    """
    Keeps a module complete on every rank, for that rank's heads; each backward pass sums its gradient over ranks.

    transformers' "replicated_with_grad_allreduce" sums the *accumulated* gradient, so that with gradient accumulation
    earlier passes count once more each time, and in 5.17 leaves modules without inputs unsummed.
    """

    def install_forward(self, module: nn.Module, mesh):
        forward = module.forward
        hooked: dict[str, nn.Parameter] = {}

        def sum_over_ranks(gradient: torch.Tensor) -> torch.Tensor:
            total = gradient.clone()
            dist.all_reduce(total, group=mesh.get_group())
            return total

        def forward_with_hooks(*args, **kwargs):
            # At the first call, not here: loading the checkpoint replaces the parameters after this.
            if torch.is_grad_enabled():
                for name, parameter in module.named_parameters(recurse=False):
                    if parameter.requires_grad and hooked.get(name) is not parameter:
                        parameter.register_hook(sum_over_ranks)
                        hooked[name] = parameter
            return forward(*args, **kwargs)

        module.forward = forward_with_hooks
        return module


def check_tensor_parallel_size(config, tp_size: int) -> None:
    """Raises `ValueError` if ranks would hold parts of key-value heads."""
    if config.num_key_value_heads % tp_size:
        raise ValueError(
            f"tp_size={tp_size} does not divide num_key_value_heads={config.num_key_value_heads}: a rank holds whole "
            "heads with their keys and values; use a tp_size that divides it."
        )


def keep_heads_of_rank(model: nn.Module, mesh: Any) -> None:
    """Tells layers in which some heads are differential which heads this rank will hold, before they are sharded."""
    ranks = tensor_parallel_mesh(mesh)
    for module in model.modules():
        keep: Any = getattr(module, "keep_heads_of_rank", None)
        if keep is not None:
            keep(ranks.get_local_rank(), ranks.size())


# An existing style stays: another revision of this code, loaded in this process, may have registered it.
if HAS_TENSOR_PARALLEL and SHARED_BY_HEADS not in ALL_PARALLEL_STYLES:
    ALL_PARALLEL_STYLES.register(SHARED_BY_HEADS, SharedByHeadsParallel())  # type: ignore[arg-type]
