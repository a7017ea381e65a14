"""One rank of the tensor-parallel tests: `python ranks_tensor.py FOLDER`, writes FOLDER/result-<rank>.pt."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from parallel_ranks import TOKENS, generate, gradients, join_ranks
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import modeling_diff  # noqa: F401  (registers the auto classes)


DIFFERENTIAL = ("v1", "v2", "v1_with_llama_layer", "v2_with_llama_layer", "v1_with_mixed_layers")


def load(checkpoint: Path):
    config = DistributedConfig(tp_size=dist.get_world_size(), tp_plan="auto")
    return AutoModelForCausalLM.from_pretrained(checkpoint, distributed_config=config)


def run(checkpoint: Path, saved: Path) -> dict:
    model = load(checkpoint)
    with torch.no_grad():
        logits = model(TOKENS).logits
        eager = load(checkpoint)
        eager.set_attn_implementation("eager")
        attentions = eager(TOKENS, output_attentions=True).attentions
        eager_logits = eager(TOKENS).logits
    results = {
        "local_shapes": {
            name: tuple(getattr(parameter, "to_local", lambda p=parameter: p)().shape)
            for name, parameter in model.named_parameters()
        },
        "logits": logits,
        "eager_logits": eager_logits,
        "num_attention_maps": attentions[0].shape[1],
        "gradients": gradients(model),
        "accumulated_gradients": gradients(model, num_passes=2),
        "generated": generate(model),
        "generated_static": generate(model, cache_implementation="static", disable_compile=True),
    }
    model.save_pretrained(saved)
    dist.barrier()
    return results


def main(folder: Path) -> None:
    rank = join_ranks(folder)
    results = {name: run(folder / name, folder / f"saved-{name}") for name in DIFFERENTIAL}
    try:
        load(folder / "one_key_value_head")(TOKENS)
        results["one_key_value_head"] = "no error"
    except Exception as error:
        results["one_key_value_head"] = f"{type(error).__name__}: {error}"
    torch.save(results, folder / f"result-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
