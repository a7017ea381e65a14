"""
Trains LoRA on a converted checkpoint, from data to a merged model, and checks every step on the way.

    python examples/scripts/finetune_lora.py --model out/v2 --data examples/assets/chat.jsonl \\
        --chat-template examples/assets/chat_template.jinja --output out/tuned
    python examples/scripts/finetune_lora.py --model out/v2 --data src/*.txt --packing --bf16
    python examples/scripts/finetune_lora.py --smoke      # converts the small LLaMA first; seconds on a CPU

The data are JSON lines with `messages` (the tokenizer's chat template, loss on all of it), `prompt` and `completion`
(loss on the completion) or `text`, or plain text files, which are cut into windows of `--max-length`. A DIFF
checkpoint trains with its own optimizer groups and lambda in the log; a LLaMA is taken as well. TRL's SFTTrainer is
used where it is installed, transformers' Trainer elsewhere, on the same tokens. `--resume` continues from the last
checkpoint.

Writes `adapter/` and `merged/`, loads both again, generates, and compares logits: the adapter from disk with the
trained model, the merged model with the adapter, the merged model from disk with itself. result.json has the figures.
"""

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from modeling_diff.experiments.command_line import one_line_errors, script_parser, typed_command
from modeling_diff.experiments.loading import load_tokenizer
from modeling_diff.experiments.output_files import add_output, output_folder
from modeling_diff.training import (
    DiffTrainer,
    DiffTrainerMixin,
    FiniteLossCallback,
    LambdaCallback,
    check_adapter,
    four_bit_config,
    lora_config,
)
from modeling_diff.training.finetuning_data import Example, read_records, tokenize


try:
    from peft import PeftModel, get_peft_model
except ImportError:
    sys.exit("finetune_lora: the package peft is missing; pip install peft")


ASSETS = Path(__file__).parents[1] / "assets"
TINY_LLAMA = ASSETS / "tiny-llama"
RESULTS = ("checkpoints", "adapter", "merged", "result.json")
# Largest difference of logits, relative to the largest logit: float32 sums in another order; bfloat16 rounds merged
# weights and every activation to 8 bits.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def prepare_tokenizer(arguments: argparse.Namespace) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(arguments.model)
    if arguments.pad_token:
        tokenizer.pad_token = arguments.pad_token
    if arguments.chat_template:
        tokenizer.chat_template = arguments.chat_template.read_text(encoding="utf-8")
    if tokenizer.pad_token is None:
        raise ValueError(f"{arguments.model}: the tokenizer has no pad token; name one with --pad-token, as in '</s>'")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= len(tokenizer):
        raise ValueError(
            f"--pad-token={arguments.pad_token!r}: the tokenizer does not know it; name one of its tokens"
        )
    return tokenizer


def load_base(arguments: argparse.Namespace, four_bit: bool) -> PreTrainedModel:
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    settings = {"quantization_config": four_bit_config(dtype)} if four_bit else {}
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype, **settings)
    if torch.cuda.is_available():
        if arguments.bf16 and not torch.cuda.is_bf16_supported():
            raise ValueError("--bf16: this GPU has no bfloat16; leave it out, for float32")
        model = model if four_bit else model.cuda()
    arguments.max_length = arguments.max_length or model.config.max_position_embeddings
    if model.config.max_position_embeddings < arguments.max_length:
        raise ValueError(
            f"--max-length={arguments.max_length}: the model has max_position_embeddings="
            f"{model.config.max_position_embeddings}; use at most that"
        )
    return model


def add_adapter(model: PreTrainedModel, arguments: argparse.Namespace) -> PeftModel:
    alpha = 2 * arguments.lora_r if arguments.lora_alpha is None else arguments.lora_alpha
    config = lora_config(model, r=arguments.lora_r, lora_alpha=alpha, lora_dropout=arguments.lora_dropout)
    return get_peft_model(model, config)


def upcast_trainable(model: PeftModel) -> None:
    """Puts trainable parameters in float32: bfloat16, TRL's choice on a 4-bit base, would swallow small steps."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def training_settings(arguments: argparse.Namespace) -> dict:
    # transformers 5.23 renamed the argument and deprecates the name that 5.17 has.
    names = {field.name for field in fields(TrainingArguments)}
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    return {
        "output_dir": str(arguments.output / "checkpoints"),
        "max_steps": arguments.max_steps,
        "num_train_epochs": arguments.num_train_epochs,
        "per_device_train_batch_size": arguments.per_device_train_batch_size,
        "gradient_accumulation_steps": arguments.gradient_accumulation_steps,
        "learning_rate": arguments.learning_rate,
        "weight_decay": arguments.weight_decay,
        "lr_scheduler_type": "cosine",
        "warmup_steps": arguments.warmup_steps,
        "logging_steps": arguments.logging_steps,
        "logging_nan_inf_filter": False,
        "save_steps": arguments.save_steps,
        "save_total_limit": 2,
        "eval_strategy": "steps" if arguments.eval_data else "no",
        "eval_steps": arguments.save_steps,
        "bf16": arguments.bf16,
        checkpointing: arguments.gradient_checkpointing,
        f"{checkpointing}_kwargs": {"use_reentrant": False} if arguments.gradient_checkpointing else None,
        "report_to": arguments.report_to,
        "seed": arguments.seed,
        "use_cpu": not torch.cuda.is_available(),
    }


def build_trainer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    data: list[Example],
    eval_data: list[Example] | None,
    arguments,
) -> DiffTrainerMixin:
    """TRL's SFTTrainer or transformers' Trainer, both with the optimizer groups and the callbacks of this project."""
    callbacks = [FiniteLossCallback()]
    if model.config.model_type == "diff_llama":
        callbacks.append(LambdaCallback(floor=arguments.lambda_floor if model.config.variant == "v1" else None))
    settings = training_settings(arguments)
    common = {
        "model": model,
        "processing_class": tokenizer,
        "callbacks": callbacks,
        "lambda_factor": arguments.lambda_factor,
        "query_factor": arguments.query_factor,
    }
    if arguments.trainer == "trl":
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        class DiffSFTTrainer(DiffTrainerMixin, SFTTrainer):
            pass

        # TRL packs to max_length, and flattens a batch of packs into one row with restarting positions.
        config = SFTConfig(**settings, max_length=arguments.max_length, packing=arguments.packing, eval_packing=False)
        eval_set = Dataset.from_list(eval_data) if eval_data else None
        return DiffSFTTrainer(args=config, train_dataset=Dataset.from_list(data), eval_dataset=eval_set, **common)
    # A batch of examples in one row, without padding, positions restarting: the model masks by them.
    collator = DataCollatorWithFlattening() if arguments.packing else DataCollatorForSeq2Seq(tokenizer)
    config = TrainingArguments(**settings)
    return DiffTrainer(args=config, train_dataset=data, eval_dataset=eval_data, data_collator=collator, **common)


@torch.no_grad()
def logits_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    model.eval()
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=next(model.parameters()).dtype == torch.bfloat16):
        return model(input_ids=ids).logits.float()


def compare(name: str, before: torch.Tensor, after: torch.Tensor, tolerance: float, figures: dict) -> None:
    """Keeps the largest difference relative to the largest logit; raises `ValueError` above `tolerance`."""
    difference = ((before - after).abs().max() / before.abs().max()).item()
    figures[name] = difference
    if not difference <= tolerance:
        raise ValueError(f"{name}: logits differ by {difference:.2g} of the largest, and {tolerance:.2g} is allowed")


def save_merge_reload(model, tokenizer, probe: torch.Tensor, arguments, console: Console) -> dict[str, float]:
    """adapter/ and merged/, each loaded again and compared; then what the merged model says."""
    figures: dict[str, float] = {}
    tolerance = TOLERANCE[torch.bfloat16 if arguments.bf16 else torch.float32]
    trained = logits_of(model, probe)
    model.save_pretrained(arguments.output / "adapter")
    tokenizer.save_pretrained(arguments.output / "adapter")
    del model
    gc.collect()
    reloaded = PeftModel.from_pretrained(load_base(arguments, arguments.load_in_4bit), arguments.output / "adapter")
    # bitsandbytes repacks 4-bit weights for its CPU kernel, which works in bfloat16, at the first evaluation.
    from_disk_tolerance = TOLERANCE[torch.bfloat16] if arguments.load_in_4bit else tolerance
    compare("adapter from disk", trained, logits_of(reloaded, probe), from_disk_tolerance, figures)
    if arguments.load_in_4bit:  # weights are merged where they are not rounded to 4 bits
        reloaded = PeftModel.from_pretrained(load_base(arguments, False), arguments.output / "adapter")
        trained = logits_of(reloaded, probe)
    merged = reloaded.merge_and_unload()
    merged_logits = logits_of(merged, probe)
    compare("merged", trained, merged_logits, tolerance, figures)
    merged.save_pretrained(arguments.output / "merged")
    tokenizer.save_pretrained(arguments.output / "merged")
    from_disk = AutoModelForCausalLM.from_pretrained(arguments.output / "merged", dtype=merged.dtype).to(probe.device)
    compare("merged from disk", merged_logits, logits_of(from_disk, probe), tolerance, figures)
    prompt = tokenizer(arguments.prompt, return_tensors="pt").to(probe.device)
    output = from_disk.generate(
        input_ids=prompt.input_ids,
        attention_mask=prompt.attention_mask,
        max_new_tokens=40,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    console.rule("merged model", align="left")
    console.print(tokenizer.decode(output[0], skip_special_tokens=True), markup=False, highlight=False)
    return figures


def smoke(arguments: argparse.Namespace, folder: Path) -> None:
    """Fills in a converted checkpoint, a few examples of every format, and small sizes."""
    from conversion import convert_checkpoint

    if arguments.model is None:
        arguments.model = str(folder / "v2")
        convert_checkpoint(TINY_LLAMA, folder / "v2", "v2", measure=False)
    chat = ASSETS / "chat.jsonl"
    words = ("alpha", "beta", "gamma", "delta", "theta", "kappa", "sigma", "omega")
    lines = [{"prompt": f"upper({word!r}) ->", "completion": f" {word.upper()!r}"} for word in words]
    lines += [json.loads(line) for line in chat.read_text(encoding="utf-8").splitlines()[:4]]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "text.txt").write_text((TINY_LLAMA / "heldout.txt").read_text()[:4000])
    arguments.chat_template = arguments.chat_template or ASSETS / "chat_template.jinja"
    arguments.data = arguments.data or [folder / "data.jsonl", folder / "text.txt"]
    arguments.eval_data = arguments.eval_data or [folder / "text.txt"]
    arguments.max_steps = 6
    arguments.per_device_train_batch_size = 4
    arguments.save_steps = 3
    arguments.logging_steps = 1
    arguments.max_length = min(arguments.max_length or 128, 128)
    arguments.lora_r = 4
    arguments.prompt = "upper('beta') ->"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = script_parser(__file__, __doc__)
    add = parser.add_argument
    add("--model", help="folder or Hub id of a converted checkpoint, or of a LLaMA")
    add("--data", type=Path, nargs="+", help="JSON lines or text files to train on")
    add("--eval-data", type=Path, nargs="+", help="JSON lines or text files for an evaluation loss")
    add_output(parser, "checkpoints, adapter, merged model and result.json", "finetune_lora")
    choices = ["auto", "trl", "transformers"]
    add("--trainer", choices=choices, default="auto", help="whose Trainer; auto takes TRL's where it is installed")
    add("--max-length", type=int, help="most tokens of an example (default: the model's max_position_embeddings)")
    add("--packing", action="store_true", help="put several examples in a sequence, without padding")
    add("--bf16", action="store_true", help="base and activations in bfloat16, adapters in float32")
    add("--gradient-checkpointing", action="store_true", help="recompute activations to save memory")
    add("--load-in-4bit", action="store_true", help="base in NF4 (bitsandbytes)")
    add("--lora-r", type=int, default=16, help="rank of LoRA")
    add("--lora-alpha", type=int, help="scale of LoRA (default: twice the rank)")
    add("--lora-dropout", type=float, default=0.0, help="dropout before LoRA")
    add("--max-steps", type=int, default=-1, help="optimizer steps, instead of epochs where positive")
    add("--num-train-epochs", type=float, default=1.0, help="passes over the data")
    add("--per-device-train-batch-size", type=int, default=8, help="sequences per device and forward pass")
    add("--gradient-accumulation-steps", type=int, default=1, help="forward passes per optimizer step")
    add("--learning-rate", type=float, default=2e-4, help="peak learning rate")
    add("--weight-decay", type=float, default=0.0, help="weight decay of AdamW; not of lambda, norms and biases")
    add("--warmup-steps", type=int, default=0, help="steps in which the learning rate rises")
    add("--lambda-factor", type=float, default=1.0, help="factor on the learning rate of lambda")
    add("--query-factor", type=float, default=1.0, help="factor on the learning rate of V2's doubled queries")
    add("--lambda-floor", type=float, default=0.0, help="smallest value that lambda of a V1 is held at")
    add("--save-steps", type=int, default=200, help="steps between checkpoints, and between evaluations")
    add("--logging-steps", type=int, default=10, help="steps between lines of the log")
    add("--resume", action="store_true", help="continue from the last checkpoint in --output")
    add("--report-to", nargs="*", default=[], help="trackers of the Trainer: wandb, tensorboard, ...")
    add("--pad-token", help="token to pad with, for a tokenizer without one")
    add("--chat-template", type=Path, help="Jinja file, for a tokenizer without a chat template")
    add("--prompt", default="def read_lines(path):\n", help="text that the merged model continues at the end")
    add("--seed", type=int, default=0, help="seed of the order of examples and of LoRA's weights")
    add("--smoke", action="store_true", help="a few steps on data of this repository, in seconds")
    arguments = parser.parse_args(argv)
    if not arguments.smoke and not (arguments.model and arguments.data):
        parser.error("--model and --data are needed, or --smoke")
    if arguments.trainer == "auto":
        installed = all(find_spec(name) for name in ("trl", "datasets"))
        arguments.trainer = "trl" if installed else "transformers"
    return arguments


def finetune(arguments: argparse.Namespace, console: Console) -> dict:
    set_seed(arguments.seed)
    checkpoints = arguments.output / "checkpoints"
    last = get_last_checkpoint(checkpoints) if arguments.resume and checkpoints.is_dir() else None
    if arguments.resume and last is None:
        raise ValueError(f"--resume: no checkpoint in {checkpoints}; leave it out to start again")
    tokenizer = prepare_tokenizer(arguments)
    model = load_base(arguments, arguments.load_in_4bit)
    if last is not None and model.config.model_type == "diff_llama":
        check_adapter(model, last)
    model = add_adapter(model, arguments)
    data = tokenize(read_records(arguments.data), tokenizer, arguments.max_length)
    eval_data = None
    if arguments.eval_data:
        eval_data = tokenize(read_records(arguments.eval_data), tokenizer, arguments.max_length)
    trainable, total = model.get_nb_trainable_parameters()
    console.print(f"{arguments.trainer}: {len(data)} examples, {trainable:,} of {total:,} parameters train")
    trainer = build_trainer(model, tokenizer, data, eval_data, arguments)
    upcast_trainable(trainer.model)
    trainer.train(resume_from_checkpoint=last)
    probe = torch.tensor([data[0]["input_ids"]], device=model.device)
    figures = save_merge_reload(trainer.model, tokenizer, probe, arguments, console)
    return {"trainable_parameters": trainable, "relative_difference": figures, "log": trainer.state.log_history}


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    console = Console(soft_wrap=True)
    logging.set_verbosity_warning()
    with tempfile.TemporaryDirectory() as folder, one_line_errors(__file__):
        if arguments.smoke:
            smoke(arguments, Path(folder))
        inputs = [arguments.model, *arguments.data]
        with output_folder(arguments, RESULTS, inputs, arguments.resume) as arguments.output:
            result = finetune(arguments, console)
            result["command"] = typed_command(__file__, argv)
            (arguments.output / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    for name, difference in result["relative_difference"].items():
        console.print(f"{name}: largest difference of logits {difference:.2g} of the largest logit")


if __name__ == "__main__":
    main()
