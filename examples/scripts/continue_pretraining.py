"""
Continues pretraining of a converted checkpoint, or of a LLaMA, on the same tokens in the same order for a comparison.

    python examples/scripts/continue_pretraining.py --model out/v2 --data examples/assets/tiny-llama/calibration.txt \\
        --eval-data examples/assets/tiny-llama/heldout.txt --output out/v2-continued --max-steps 100
    python examples/scripts/continue_pretraining.py --model out/v2 --dataset HuggingFaceFW/fineweb-edu \\
        --output out/v2-fineweb --bf16 --gradient-checkpointing
    accelerate launch --config_file examples/assets/configs/fsdp2.yaml --num_processes 8 \\
        examples/scripts/continue_pretraining.py --model out/v2 --data 'corpus/*.jsonl' --output out/continued --bf16
    python examples/scripts/continue_pretraining.py --smoke    # converts the small LLaMA first; seconds

Text files, each a document, JSON lines and `datasets` are streamed and packed into full sequences; positions restart
at every document, and documents do not see each other. Nothing is padded. The learning rate warms up and follows a
cosine; weights stay float32, with `--bf16` the arithmetic is bfloat16. `--resume` continues from the last checkpoint,
on a CPU to the same bits.

Writes the model, the tokenizer, checkpoints and continued.json (loss, evaluation loss, lambda per layer).
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
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

from modeling_diff.experiments.command_line import one_line_errors, script_parser, typed_command
from modeling_diff.experiments.loading import load_tokenizer
from modeling_diff.experiments.output_files import add_output, output_folder
from modeling_diff.training import DiffTrainer, FiniteLossCallback, LambdaCallback
from modeling_diff.training.pretraining_data import PackedRows, dataset_documents, text_files


TINY_LLAMA = Path(__file__).parents[1] / "assets" / "tiny-llama"
RESULTS = ("continued.json", "config.json", "*.safetensors*", "checkpoint-*")


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
    arguments.max_length = arguments.max_length or min(longest, 4096)
    if arguments.max_length > longest:
        raise ValueError(
            f"--max-length={arguments.max_length}: the model has max_position_embeddings={longest}; use less"
        )
    return model, tokenizer


def documents(arguments: argparse.Namespace):
    if arguments.dataset:
        return dataset_documents(arguments.dataset, arguments.dataset_split, arguments.text_column)
    return text_files(arguments.data, arguments.text_column)


def training_settings(arguments: argparse.Namespace) -> dict:
    # transformers 5.23 renamed the argument and deprecates the name that 5.17 has.
    names = {field.name for field in fields(TrainingArguments)}
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    return {
        "output_dir": str(arguments.output),
        "max_steps": arguments.max_steps,
        "per_device_train_batch_size": arguments.per_device_train_batch_size,
        "per_device_eval_batch_size": arguments.per_device_train_batch_size,
        "gradient_accumulation_steps": arguments.gradient_accumulation_steps,
        "learning_rate": arguments.learning_rate,
        "weight_decay": arguments.weight_decay,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "warmup_steps": round(arguments.warmup_ratio * arguments.max_steps),
        "logging_steps": arguments.logging_steps,
        "logging_nan_inf_filter": False,
        "save_steps": arguments.save_steps,
        "save_total_limit": arguments.save_total_limit,
        "eval_strategy": "steps" if arguments.eval_data else "no",
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


def last_checkpoint(arguments: argparse.Namespace) -> str | None:
    """Returns the checkpoint to continue from; `ValueError` where there is none, and None without --resume."""
    if not arguments.resume:
        return None
    last = get_last_checkpoint(arguments.output) if arguments.output.is_dir() else None
    if last is None:
        raise ValueError(f"--resume: no checkpoint in {arguments.output}; leave it out to start again")
    return last


def continue_pretraining(arguments: argparse.Namespace) -> dict:
    """Trains, evaluates and saves; returns the figures for continued.json."""
    last = last_checkpoint(arguments)
    set_seed(arguments.seed)
    model, tokenizer = load(arguments)
    rows = PackedRows(documents(arguments), tokenizer, arguments.max_length, arguments.seed, arguments.shuffle_rows)
    rows.first_pass(max_rows=1)  # whatever is wrong with the data is said before anything starts
    eval_rows = None
    if arguments.eval_data:
        held_out = PackedRows(text_files(arguments.eval_data, arguments.text_column), tokenizer, arguments.max_length)
        eval_rows = held_out.first_pass(arguments.eval_rows)
    trainer = build_trainer(model, tokenizer, rows, eval_rows, arguments)
    trainer.train(resume_from_checkpoint=last)
    if eval_rows:
        trainer.evaluate()
    save(trainer, arguments)
    sequences = trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps * trainer.args.world_size
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens_seen": arguments.max_steps * sequences * arguments.max_length,
        "loss_unit": "nats/token",
        "log": trainer.state.log_history,
    }


def smoke(arguments: argparse.Namespace, folder: Path) -> None:
    """Fills in a converted checkpoint, the texts next to the small LLaMA, and small sizes."""
    from conversion import convert_checkpoint

    if arguments.model is None:
        arguments.model = str(folder / "v2")
        convert_checkpoint(TINY_LLAMA, folder / "v2", "v2", measure=False)
    arguments.data = arguments.data or [str(TINY_LLAMA / "calibration.txt")]
    arguments.eval_data = arguments.eval_data or [str(TINY_LLAMA / "heldout.txt")]
    arguments.max_steps = min(arguments.max_steps, 4)
    arguments.per_device_train_batch_size = 2
    arguments.max_length = 64
    arguments.eval_rows = 4
    arguments.shuffle_rows = 8
    arguments.logging_steps = 1
    arguments.save_steps = 2
    arguments.eval_steps = 2


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__file__, __doc__)
    add = parser.add_argument
    add("--model", help="folder or Hub id of a converted checkpoint, or of a LLaMA")
    add("--data", nargs="+", help="patterns of text files and JSON lines to train on")
    add("--dataset", help="instead of --data: what `datasets` loads, streamed, or a folder that it saved")
    add("--dataset-split", default="train", help="split of --dataset")
    add("--text-column", default="text", help="field of JSON lines and datasets that holds the text")
    add("--eval-data", nargs="+", help="patterns of files for an evaluation loss")
    add("--eval-rows", type=int, default=128, help="sequences that the evaluation reads")
    add("--eval-steps", type=int, default=100, help="steps between evaluations")
    add_output(parser, "the model, checkpoints and continued.json", "continue_pretraining")
    add("--max-length", type=int, help="tokens per sequence (default: max_position_embeddings, 4096 at most)")
    add("--max-steps", type=int, default=1000, help="optimizer steps in all, also with --resume")
    add("--per-device-train-batch-size", type=int, default=8, help="sequences per device and forward pass")
    add("--gradient-accumulation-steps", type=int, default=1, help="forward passes per optimizer step")
    add("--learning-rate", type=float, default=3e-4, help="peak learning rate")
    add("--warmup-ratio", type=float, default=0.04, help="share of the steps in which the learning rate rises")
    add("--weight-decay", type=float, default=0.1, help="weight decay of AdamW; not of lambda, norms and biases")
    add("--lambda-factor", type=float, default=1.0, help="factor on the learning rate of lambda")
    add("--query-factor", type=float, default=1.0, help="factor on the learning rate of V2's doubled queries")
    add("--lambda-floor", type=float, default=0.0, help="smallest value that lambda of a V1 is held at")
    add("--bf16", action="store_true", help="arithmetic in bfloat16, weights in float32")
    add("--gradient-checkpointing", action="store_true", help="recompute activations to save memory")
    add("--attn-implementation", help="sdpa, flash_attention_2, diff_triton, ...")
    add("--shuffle-rows", type=int, default=256, help="sequences that wait to be drawn in random order")
    add("--save-steps", type=int, default=200, help="steps between checkpoints")
    add("--save-total-limit", type=int, default=2, help="checkpoints to keep")
    add("--logging-steps", type=int, default=10, help="steps between lines of the log")
    add("--resume", action="store_true", help="continue from the last checkpoint in --output")
    add("--report-to", nargs="*", default=[], help="trackers of the Trainer: wandb, tensorboard, ...")
    add("--eos-token", help="token that ends a document, for a tokenizer without one, as in '</s>'")
    add("--seed", type=int, default=0, help="seed of the order of the data")
    add("--smoke", action="store_true", help="a few steps of the small LLaMA's V2, in seconds")
    arguments = parser.parse_args(argv)
    if not arguments.smoke and not (arguments.model and (arguments.data or arguments.dataset)):
        parser.error("--model and one of --data and --dataset are needed, or --smoke")
    if arguments.data and arguments.dataset:
        parser.error("--data and --dataset exclude each other")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    logging.set_verbosity_warning()
    state = PartialState()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        stack.enter_context(one_line_errors(__file__))
        if arguments.smoke:
            smoke(arguments, Path(folder))
        with state.main_process_first():  # one process makes the folder, before the others look for it
            output = output_folder(
                arguments, RESULTS, [arguments.model], arguments.resume, main_process=state.is_main_process
            )
            arguments.output = stack.enter_context(output)
        result = continue_pretraining(arguments)
        if state.is_main_process:
            result["command"] = typed_command(__file__, argv)
            text = json.dumps(result, indent=1) + "\n"
            (arguments.output / "continued.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
