"""One rank of a healing under FSDP2: `python ranks_heal.py FOLDER`, writes FOLDER/result-<rank>.pt."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from parallel_ranks import join_ranks, pretend_to_be_accelerators
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback


# As `accelerate launch --use_fsdp --fsdp_version 2` sets them.
os.environ |= {
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_USE_CPU": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "DiffLlamaDecoderLayer",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
sys.path.append(str(Path(__file__).parents[1] / "conversion"))

from healing_toys import heal, make_toys


class SeeShards(TrainerCallback):
    """The student's parameters in layers that are whole on this rank: none may be."""

    def on_step_begin(self, args, state, control, model, **kwargs):
        layers = model.model.layers.named_parameters()
        self.whole = [name for name, parameter in layers if not isinstance(parameter, DTensor)]


def main(folder: Path) -> None:
    rank = join_ranks(folder)
    pretend_to_be_accelerators()
    toys = folder / "toys"
    if rank == 0:
        toys.mkdir()
        make_toys(toys)
    dist.barrier()
    seen = SeeShards()
    report = heal(
        toys,
        folder / "healed",
        arguments={"callbacks": [seen]},
        optimizer="adamw",
        learning_rate=1e-3,
        max_steps=4,
        per_device_train_batch_size=2,
    )
    torch.save({"table": report.table, "whole": seen.whole}, folder / f"result-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
