"""
One rank of the FSDP2 path of continue_pretraining.py: `python ranks_pretraining.py FOLDER`.

Environment variables are those that `accelerate launch` makes of fsdp2.yaml. accelerate keeps FSDP for accelerators
and would quietly run plain data parallelism on a CPU, so that here it is told that there are some.
"""

import os
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from parallel_ranks import join_ranks, pretend_to_be_accelerators
from tiny_tokenizers import word_tokenizer
from torch.distributed.tensor import DTensor

from modeling_diff import DiffLlamaForCausalLM


EXAMPLES = Path(__file__).parents[2] / "examples"
MODELS = ("v1", "v2")
ARGUMENTS = ["--max-steps", "4", "--save-steps", "2", "--max-length", "16", "--learning-rate", "1e-3"]
ARGUMENTS += ["--logging-steps", "1", "--shuffle-rows", "4", "--eval-rows", "4", "--eval-steps", "2"]
ARGUMENTS += ["--save-total-limit", "9"]
LOSSES = ("loss", "eval_loss")
LAMBDAS = ("lambda/mean", "lambda/grad_norm")


def set_environment() -> None:
    words = ["--config_file", str(EXAMPLES / "assets" / "configs" / "fsdp2.yaml"), "--num_processes", "2", "script.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    os.environ.update(prepare_multi_gpu_env(arguments))


def prepare_checkpoint(source: Path, target: Path) -> None:
    """The checkpoint with a tokenizer of 48 words; V2's with tied embeddings."""
    model = DiffLlamaForCausalLM.from_pretrained(source)
    if source.name == "v2":
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
    model.save_pretrained(target)
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, 48))]
    word_tokenizer(words, "<unk>", bos_token="<s>", eos_token="</s>").save_pretrained(target)


def write_texts(folder: Path) -> None:
    """Training and evaluation text of words in runs, documents of odd lengths."""
    for name, count in (("train", 24), ("eval", 12)):
        (folder / name).mkdir()
        for i in range(count):
            words = [f"w{3 + (i * 7 + j * j) % 45}" for j in range(5 + 3 * i)]
            (folder / name / f"{i}.txt").write_text(" ".join(words))


def arguments_for(model: Path, texts: Path, output: Path, batch_size: int, *more: str) -> list[str]:
    return [
        *("--model", str(model), "--data", f"{texts}/train/*.txt", "--eval-data", f"{texts}/eval/*.txt"),
        *("--output", str(output), "--per-device-train-batch-size", str(batch_size), *ARGUMENTS, *more),
    ]


def figures(log: list[dict]) -> dict[str, list[float]]:
    return {name: [entry[name] for entry in log if name in entry] for name in LOSSES + LAMBDAS}


def main(folder: Path) -> None:
    rank = join_ranks(folder)
    texts = folder / "texts"
    results = {}
    if rank == 0:
        texts.mkdir()
        write_texts(texts)
        for name in MODELS:
            prepare_checkpoint(folder / name, folder / f"{name}-with-tokenizer")
    dist.barrier()
    set_environment()
    pretend_to_be_accelerators()
    sys.path.insert(0, str(EXAMPLES / "scripts"))
    import continue_pretraining as example

    seen = {}
    save = example.save

    def save_and_look(trainer, arguments):
        # Of layers alone: what lies outside them stays gathered after a forward pass.
        layers = dict(trainer.model.model.layers.named_parameters())
        seen["whole_parameters"] = [name for name, parameter in layers.items() if not isinstance(parameter, DTensor)]
        save(trainer, arguments)

    example.save = save_and_look
    for name in MODELS:
        model = folder / f"{name}-with-tokenizer"
        output = folder / f"continued-{name}"
        whole = example.continue_pretraining(example.parse(arguments_for(model, texts, output, 1)))
        resumed_output = folder / f"resumed-{name}"
        dist.barrier()
        if rank == 0:
            shutil.copytree(output / "checkpoint-2", resumed_output / "checkpoint-2")
        dist.barrier()
        resumed = example.continue_pretraining(
            example.parse(arguments_for(model, texts, resumed_output, 1, "--resume"))
        )
        dist.barrier()
        results[name] = {"whole": figures(whole["log"]), "resumed": figures(resumed["log"]), **seen}
    torch.save(results, folder / f"result-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
