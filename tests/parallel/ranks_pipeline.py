"""One rank of the pipeline tests: `python ranks_pipeline.py FOLDER`, writes FOLDER/result-<rank>.pt."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from parallel_ranks import TOKENS, generate, join_ranks
from transformers.distributed import DistributedConfig

from modeling_diff import DiffLlamaForCausalLM


def main(folder: Path) -> None:
    rank = join_ranks(folder)
    results = {}
    for name in ("v1", "v2"):
        config = DistributedConfig(pp_size=dist.get_world_size())
        model = DiffLlamaForCausalLM.from_pretrained(folder / name, distributed_config=config)
        with torch.no_grad():
            logits = model(TOKENS).logits
        results[name] = {
            "logits": logits,
            "generated": generate(model),
            "parameters": [parameter for parameter, _ in model.named_parameters()],
        }
    torch.save(results, folder / f"result-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
