"""One rank of the FSDP2 tests: `python ranks_fsdp.py FOLDER`, writes FOLDER/result-<rank>.pt."""

import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from packaging.version import Version
from parallel_ranks import TOKENS, build_optimizer, join_ranks, pretend_to_be_accelerators, train
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from modeling_diff import DiffLlamaForCausalLM


# Up to some release after 5.17 transformers' plan puts float32 modules in the unit of their bfloat16 layer.
PLAN_SPLITS_BY_DTYPE = Version(version("transformers")) >= Version("5.23")
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def shard(model: DiffLlamaForCausalLM) -> DiffLlamaForCausalLM:
    """A unit a layer, and one for each float32 `diff_lambda`, as FSDP2 allows only one dtype a unit."""
    for layer in model.model.layers:
        if hasattr(layer.self_attn, "diff_lambda"):
            fully_shard(layer.self_attn.diff_lambda)
        fully_shard(layer)
    return fully_shard(model)


def run_fully_shard(checkpoint: Path, dtype: torch.dtype, tokens: torch.Tensor, saved: Path) -> dict:
    model = shard(DiffLlamaForCausalLM.from_pretrained(checkpoint, dtype=dtype))
    losses = train(model, tokens, build_optimizer(model))
    state = get_model_state_dict(model, options=FULL)
    fresh = shard(DiffLlamaForCausalLM.from_pretrained(checkpoint, dtype=dtype))
    loading = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(fresh, dict(state), options=loading)  # a copy, as it empties the dictionary
    with torch.no_grad():
        equal = torch.equal(fresh(tokens).logits, model(tokens).logits)
    return {"losses": losses, "state": state, "reloaded_equal": equal}


def run_transformers_plan(checkpoint: Path, dtype: torch.dtype, tokens: torch.Tensor, saved: Path) -> dict:
    config = DistributedConfig(fsdp_size=dist.get_world_size())
    model = DiffLlamaForCausalLM.from_pretrained(checkpoint, dtype=dtype, distributed_config=config)
    losses = train(model, tokens, build_optimizer(model))
    model.save_pretrained(saved)
    dist.barrier()
    return {"losses": losses, "state": get_model_state_dict(model, options=FULL)}


def run_accelerate(checkpoint: Path, dtype: torch.dtype, tokens: torch.Tensor, saved: Path) -> dict:
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["DiffLlamaDecoderLayer"],
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    model = DiffLlamaForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    model, optimizer = accelerator.prepare(model, build_optimizer(model))
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    losses = train(model, tokens, optimizer)
    return {"losses": losses, "state": accelerator.get_state_dict(model)}


def cases() -> Iterator[tuple[str, str, str]]:
    for name in ("v1", "v2"):
        for way in ("fully_shard", "transformers_plan"):
            yield way, name, "float32"
            if PLAN_SPLITS_BY_DTYPE or (way, name) != ("transformers_plan", "v1"):
                yield way, name, "bfloat16"
        yield "accelerate", name, "float32"


def main(folder: Path) -> None:
    rank = join_ranks(folder)
    pretend_to_be_accelerators()
    tokens = TOKENS[rank : rank + 1]
    results = {}
    for way, name, dtype in cases():
        run = {
            "fully_shard": run_fully_shard,
            "transformers_plan": run_transformers_plan,
            "accelerate": run_accelerate,
        }
        saved = folder / f"saved-{way}-{name}-{dtype}"
        results[way, name, dtype] = run[way](folder / name, getattr(torch, dtype), tokens, saved)
    torch.save(results, folder / f"result-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
