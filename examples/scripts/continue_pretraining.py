"""
Trains a checkpoint on: a converted one, or a LLaMA, on the same tokens in the same order, so that they compare.

    python examples/scripts/continue_pretraining.py --model out/v2 --train 'corpus/**/*.txt' --eval 'held-out/*.txt' \\
        --output out/v2-continued --steps 1000 --bf16 --gradient-checkpointing
    python examples/scripts/continue_pretraining.py --model out/v2 --dataset HuggingFaceFW/fineweb-edu \\
        --output out/v2-fineweb
    accelerate launch --config_file examples/assets/configs/fsdp2.yaml --num_processes 8 \\
        examples/scripts/continue_pretraining.py --model out/v2 --train 'corpus/*.jsonl' --output out/continued --bf16
    python examples/scripts/continue_pretraining.py --smoke    # converts the small LLaMA first; seconds

Text files, each a document, JSON lines and `datasets` are streamed and packed into full rows; positions restart at
every document, and documents do not see each other. Nothing is padded. Warm-up and cosine; weights stay float32, with
`--bf16` the arithmetic is bfloat16. `--resume` goes on from the last checkpoint, on a CPU to the same bits.

Writes the model, the tokenizer, checkpoints and continued.json (loss, evaluation loss, lambda a layer).
"""

import argparse
import json
import sys
import tempfile
from dataclasses import fields
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from modeling_diff.experiments.loading import load_tokenizer
from modeling_diff.experiments.output_files import add_output, settle_output
from modeling_diff.training import DiffTrainer, FiniteLossCallback, LambdaCallback
from modeling_diff.training.pretraining_data import PackedRows, dataset_documents, text_files


ASSETS = Path(__file__).parents[1] / "assets" / "tiny-llama"


def load(arguments: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in float32 and its tokenizer; raises `ValueError` where they do not fit each other or the context."""
    tokenizer = load_tokenizer(arguments.model)
    if arguments.eos_token:
        tokenizer.eos_token = arguments.eos_token
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=torch.float32, attn_implementation=arguments.attn_implementation
    )
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"{arguments.model}: the tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size} "
            "(vocab_size); they do not belong together"
        )
    longest = model.config.max_position_embeddings
    arguments.context = arguments.context or min(longest, 4096)
    if arguments.context > longest:
        raise ValueError(f"--context={arguments.context}: the model has max_position_embeddings={longest}; use less")
    return model, tokenizer


def documents(arguments: argparse.Namespace):
    if arguments.dataset:
        return dataset_documents(arguments.dataset, arguments.dataset_split, arguments.text_column)
    return text_files(arguments.train, arguments.text_column)


def training_settings(arguments: argparse.Namespace) -> dict:
    # transformers 5.23 renamed the argument and deprecates the name that 5.17 has.
    names = {field.name for field in fields(TrainingArguments)}
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    return {
        "output_dir": str(arguments.output),
        "max_steps": arguments.steps,
        "per_device_train_batch_size": arguments.batch_size,
        "per_device_eval_batch_size": arguments.batch_size,
        "gradient_accumulation_steps": arguments.gradient_accumulation,
        "learning_rate": arguments.learning_rate,
        "weight_decay": arguments.weight_decay,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "warmup_steps": round(arguments.warmup_ratio * arguments.steps),
        "logging_steps": arguments.logging_steps,
        "logging_nan_inf_filter": False,
        "save_steps": arguments.save_steps,
        "save_total_limit": arguments.keep,
        "eval_strategy": "steps" if arguments.eval else "no",
        "eval_steps": arguments.eval_steps,
        "bf16": arguments.bf16,
        checkpointing: arguments.gradient_checkpointing,
        f"{checkpointing}_kwargs": {"use_reentrant": False} if arguments.gradient_checkpointing else None,
        "remove_unused_columns": False,
        "report_to": arguments.report_to,
        "seed": arguments.seed,
        "use_cpu": not torch.cuda.is_available(),
    }


def build_trainer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows, eval_rows, arguments: argparse.Namespace
) -> DiffTrainer:
    """`rows` an iterable dataset of input_ids, labels and, if packed, position_ids; `eval_rows` a list or None."""
    # With a cache, transformers does not look for packed documents, and would let them see each other.
    model.config.use_cache = False
    callbacks = [FiniteLossCallback()]
    if model.config.model_type == "diff_llama":
        callbacks.append(LambdaCallback(floor=arguments.lambda_floor if model.config.variant == "v1" else None))
    return DiffTrainer(
        model=model,
        args=TrainingArguments(**training_settings(arguments)),
        train_dataset=rows,
        eval_dataset=eval_rows,
        data_collator=default_data_collator,
        processing_class=tokenizer,
        callbacks=callbacks,
        lambda_factor=arguments.lambda_factor,
        query_factor=arguments.query_factor,
    )


def save(trainer: DiffTrainer, arguments: argparse.Namespace) -> None:
    """One `from_pretrained` folder, also of a model whose weights lie on several ranks."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.config.use_cache = True
    if not trainer.is_fsdp_enabled:
        trainer.save_model(arguments.output)
        return
    state = trainer.accelerator.get_state_dict(model)  # gathered by all ranks, whole on the first
    if trainer.accelerator.is_main_process:
        if model.config.tie_word_embeddings:
            del state["lm_head.weight"]
        # FSDP2 has changed the class of the model, which would be saved without its code.
        with torch.device("meta"):
            unsharded = AutoModelForCausalLM.from_config(model.config)
        unsharded.save_pretrained(arguments.output, state_dict=state)
        trainer.processing_class.save_pretrained(arguments.output)
    trainer.accelerator.wait_for_everyone()


def make_output(arguments: argparse.Namespace) -> None:
    """Makes room for the results; on many devices by the first process alone, before the others go on."""
    if arguments.output is not None and not arguments.overwrite:
        last_checkpoint(arguments)  # which may be continued
    with PartialState().main_process_first():
        if PartialState().is_main_process:
            results = () if arguments.resume else ("config.json", "*.safetensors*", "checkpoint-*", "continued.json")
            settle_output(arguments, results, [arguments.model])
        else:
            settle_output(arguments, (), [arguments.model])


def last_checkpoint(arguments: argparse.Namespace) -> str | None:
    """The one to go on from; raises `ValueError` where --resume and --output do not fit."""
    last = get_last_checkpoint(arguments.output) if arguments.output.is_dir() else None
    if arguments.resume and last is None:
        raise ValueError(f"--resume: no checkpoint in {arguments.output}; leave it out to start anew")
    if last is not None and not arguments.resume:
        raise ValueError(f"{arguments.output} holds {Path(last).name}: add --resume, or name another --output")
    return last


def continue_pretraining(arguments: argparse.Namespace) -> dict:
    """Train, evaluate, save: the figures for continued.json."""
    last = last_checkpoint(arguments)
    set_seed(arguments.seed)
    model, tokenizer = load(arguments)
    rows = PackedRows(documents(arguments), tokenizer, arguments.context, arguments.seed, arguments.shuffle_rows)
    rows.first_pass(max_rows=1)  # whatever is wrong with the data is said before anything starts
    eval_rows = None
    if arguments.eval:
        held_out = PackedRows(text_files(arguments.eval, arguments.text_column), tokenizer, arguments.context)
        eval_rows = held_out.first_pass(arguments.eval_rows)
    trainer = build_trainer(model, tokenizer, rows, eval_rows, arguments)
    trainer.train(resume_from_checkpoint=last)
    if eval_rows:
        trainer.evaluate()
    save(trainer, arguments)
    sequences = arguments.batch_size * arguments.gradient_accumulation * trainer.args.world_size
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens_seen": arguments.steps * sequences * arguments.context,
        "loss_unit": "nats a token",
        "log": trainer.state.log_history,
    }


def smoke(arguments: argparse.Namespace, folder: Path) -> None:
    """A converted checkpoint made on the spot, the texts that lie beside the small LLaMA, few and short rows."""
    from conversion import convert_checkpoint

    if arguments.model is None:
        arguments.model = str(folder / "v2")
        convert_checkpoint(ASSETS, folder / "v2", "v2", measure=False)
    arguments.train = arguments.train or [str(ASSETS / "calibration.txt")]
    arguments.eval = arguments.eval or [str(ASSETS / "heldout.txt")]
    arguments.steps, arguments.batch_size, arguments.context = min(arguments.steps, 4), 2, 64
    arguments.eval_rows, arguments.shuffle_rows, arguments.logging_steps = 4, 8, 1
    arguments.save_steps = arguments.eval_steps = 2


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id of a converted checkpoint, or of a LLaMA")
    parser.add_argument("--train", nargs="+", help="patterns of text files and JSON lines")
    parser.add_argument("--dataset", help="instead: what `datasets` loads, streamed, or a folder that it saved")
    parser.add_argument("--dataset-split", default="train")
    parser.add_argument("--text-column", default="text", help="of JSON lines and datasets")
    parser.add_argument("--eval", nargs="+", help="patterns, for an evaluation loss")
    parser.add_argument("--eval-rows", type=int, default=128)
    parser.add_argument("--eval-steps", type=int, default=100)
    add_output(parser, "continue_pretraining", "folder for the model, checkpoints and continued.json")
    parser.add_argument("--context", type=int, help="tokens a row (default: what the model can, 4096 at most)")
    parser.add_argument("--steps", type=int, default=1000, help="optimiser steps in all, also with --resume")
    parser.add_argument("--batch-size", type=int, default=8, help="rows a device and forward pass")
    parser.add_argument("--gradient-accumulation", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--warmup-ratio", type=float, default=0.04)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--lambda-factor", type=float, default=1.0, help="times the rate, for lambda")
    parser.add_argument("--query-factor", type=float, default=1.0, help="times the rate, for V2's doubled queries")
    parser.add_argument("--lambda-floor", type=float, default=0.0, help="V1: lambda is held at or above it")
    parser.add_argument("--bf16", action="store_true", help="arithmetic in bfloat16, weights in float32")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--attn-implementation", help="sdpa, flash_attention_2, diff_triton, ...")
    parser.add_argument("--shuffle-rows", type=int, default=256, help="rows that wait to be drawn in random order")
    parser.add_argument("--save-steps", type=int, default=200)
    parser.add_argument("--keep", type=int, default=2, help="checkpoints to keep")
    parser.add_argument("--logging-steps", type=int, default=10)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
    parser.add_argument("--report-to", nargs="*", default=[], help="wandb, tensorboard, ...")
    parser.add_argument("--eos-token", help="for a tokenizer that has none, as in '</s>'")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args(argv)
    if not arguments.smoke and not (arguments.model and (arguments.train or arguments.dataset)):
        parser.error("--model and one of --train and --dataset are needed, or --smoke")
    if arguments.train and arguments.dataset:
        parser.error("--train and --dataset exclude each other")
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    logging.set_verbosity_warning()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.smoke:
            smoke(arguments, Path(folder))
        try:
            make_output(arguments)
            result = continue_pretraining(arguments)
        except (OSError, ValueError) as error:
            sys.exit(f"continue_pretraining: {error}")
    if not PartialState().is_main_process:
        return
    result["command"] = " ".join(
        ["python examples/scripts/continue_pretraining.py", *(sys.argv[1:] if argv is None else argv)]
    )
    (arguments.output / "continued.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
