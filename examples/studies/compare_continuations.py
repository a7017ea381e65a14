"""Continues a LLaMA and its exact DIFF V2 equally, on the same tokens, and measures what the second maps are worth.

The text is what the small LLaMA was trained on, Python sources with recall, under another seed; V2 trains once at one
learning rate, once at a third of it for its doubled queries. At the root, about a quarter of an hour on one thread:

    python examples/studies/compare_continuations.py --output out/continuations
    python examples/studies/compare_continuations.py --smoke

Writes continuations.json and continuations.png. Size legend: B rows, T tokens a row (the context).
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from pretraining_measures import measure, recall_sets
from tiny_llama_text import Recall, held_out_windows, prepare_text, training_rows
from torch.utils.data import IterableDataset
from train_tiny_llama import SIZES, to_json
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, default_data_collator, set_seed
from transformers.utils import logging

from conversion import convert_checkpoint
from conversion.calibration.speed import faster_in_bfloat16
from modeling_diff.experiments.command_line import one_line_errors, script_parser, typed_command
from modeling_diff.experiments.environment import environment
from modeling_diff.experiments.output_files import add_output, output_folder
from modeling_diff.experiments.plots import pyplot_for
from modeling_diff.training import DiffTrainer, FiniteLossCallback, LambdaCallback


ASSETS = Path(__file__).parents[1] / "assets" / "tiny-llama"
RUNS = {"LLaMA": ("llama", 1.0), "DIFF V2": ("v2", 1.0), "DIFF V2, queries at 1/3": ("v2", 1 / 3)}
EVAL_ROWS = 32


class MixedRows(IterableDataset):
    """Rows of Python text and recall (T,) in the order that `seed` gives, the same for every model."""

    def __init__(self, size, stream, tokenizer, recall_share, seed):
        self.size = size
        self.stream = stream
        self.tokenizer = tokenizer
        self.recall_share, self.seed = recall_share, seed

    def __iter__(self):
        recall = Recall(self.tokenizer, self.stream, self.size.context, self.seed, held_out=False)
        for batch in training_rows(self.size, self.stream, recall, self.recall_share, self.seed):
            yield from ({"input_ids": row, "labels": row} for row in batch)


def build_trainer(model, rows, held_out, query_factor, arguments, batch_size):
    """The Trainer of this project as continue_pretraining.py sets it up, in bfloat16 where that is faster."""
    model.config.use_cache = False
    callbacks = [FiniteLossCallback()]
    if model.config.model_type == "diff_llama":
        callbacks.append(LambdaCallback())
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    settings = TrainingArguments(
        output_dir=str(arguments.output),
        max_steps=arguments.max_steps,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        learning_rate=arguments.learning_rate,
        weight_decay=0.1,
        adam_beta2=0.95,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=round(0.04 * arguments.max_steps),
        logging_steps=max(arguments.max_steps // 25, 1),
        logging_nan_inf_filter=False,
        save_strategy="no",
        eval_strategy="steps",
        eval_steps=max(arguments.max_steps // 10, 1),
        bf16=faster_in_bfloat16(device_type),
        remove_unused_columns=False,
        report_to=[],
        seed=arguments.seed,
        use_cpu=device_type == "cpu",
    )
    return DiffTrainer(
        model=model,
        args=settings,
        train_dataset=rows,
        eval_dataset=held_out,
        data_collator=default_data_collator,
        callbacks=callbacks,
        query_factor=query_factor,
    )


def continue_one(name, folder, text, sets, arguments):
    """Measured before, trained, measured after: one row."""
    size, windows, rows = text
    query_factor = RUNS[name][1]
    set_seed(arguments.seed)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = measure(model, windows, sets)
    held_out = [{"input_ids": row, "labels": row} for row in windows[:EVAL_ROWS]]
    trainer = build_trainer(model, rows, held_out, query_factor, arguments, size.batch)
    began = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - began
    wanted = ("step", "loss", "eval_loss")
    log = [{key: entry[key] for key in wanted if key in entry} for entry in trainer.state.log_history]
    return {
        "model": name,
        "query_factor": query_factor,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "train_seconds": seconds,
        "before": before,
        "after": measure(model, windows, sets),
        "curve": [entry for entry in log if len(entry) > 1],
    }


def prepare(arguments):
    """Size, held-out windows (B, T), training rows and recall sets; text is read and tokenized once."""
    size = SIZES["tiny"]
    text_size = SIZES["smoke"] if arguments.smoke else size
    tokenizer = AutoTokenizer.from_pretrained(ASSETS)
    _, stream, _, _ = prepare_text(text_size, arguments.seed, tokenizer)
    windows = held_out_windows(tokenizer, (ASSETS / "heldout.txt").read_text(), size.context)
    if arguments.smoke:
        windows = windows[:2]
    unseen = Recall(tokenizer, windows[:, 1:].flatten(), size.context, arguments.seed, held_out=True)
    rows = MixedRows(size, stream, tokenizer, arguments.recall_share, arguments.seed)
    return (size, windows, rows), recall_sets(unseen, arguments.recall_rows)


def print_row(row):
    numbers = [f"{row[when]['heldout_loss']:.4f}" for when in ("before", "after")]
    recall = [
        f"{row[when]['recall_accuracy'][kind]:.1%}"
        for kind in row["after"]["recall_accuracy"]
        for when in ("before", "after")
    ]
    lambdas = " ".join(f"{value:.3f}" for value in row["after"]["lambda_by_layer"]) or "-"
    cells = [row["model"], f"{row['parameters']:,}", *numbers, *recall, lambdas, f"{row['train_seconds']:.0f}"]
    print("| " + " | ".join(cells) + " |", flush=True)


def plot(rows, path):
    """Held-out loss over steps."""
    pyplot = pyplot_for(path)
    if pyplot is None:
        return
    figure, axis = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for row in rows:
        points = [(point["step"], point["eval_loss"]) for point in row["curve"] if "eval_loss" in point]
        axis.plot(*zip(*points, strict=True), label=row["model"])
    axis.set(xlabel="step", ylabel="held-out loss (nats/token)", title=f"{EVAL_ROWS} windows of held-out text")
    axis.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def compare(arguments, work):
    """Continues every model, its checkpoints in the folder `work`; the rows are written after each."""
    text, sets = prepare(arguments)
    folders = {"llama": ASSETS, "v2": work / "v2"}
    convert_checkpoint(ASSETS, folders["v2"], "v2", measure=False)
    print("| model | parameters | loss before, after | recall before, after: " + ", ".join(sets) + " | lambda | s |")
    rows = []
    for name, (kind, _) in RUNS.items():
        rows.append(continue_one(name, folders[kind], text, sets, arguments))
        print_row(rows[-1])
        record = {
            "command": arguments.command,
            "environment": environment("cuda" if torch.cuda.is_available() else "cpu"),
            "tokens_seen": arguments.max_steps * text[0].batch * text[0].context,
            "learning_rate": arguments.learning_rate,
            "recall_share": arguments.recall_share,
            "rows": rows,
        }
        (arguments.output / "continuations.json").write_text(to_json(record), encoding="utf-8")
        plot(rows, arguments.output / "continuations.png")
    return rows


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = script_parser(__file__, __doc__)
    add = parser.add_argument
    add_output(parser, "continuations.json and continuations.png", "compare_continuations")
    add("--max-steps", type=int, default=256, help="steps of 4,096 tokens")
    add("--learning-rate", type=float, default=5e-4, help="peak learning rate")
    add("--recall-share", type=float, default=0.375, help="share of recall in a batch")
    add("--recall-rows", type=int, default=100, help="sequences of each kind that recall is measured on")
    add("--seed", type=int, default=2, help="seed of the order of the data; the LLaMA was trained with 0 and 1")
    add("--smoke", action="store_true", help="two steps of each, seconds")
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        arguments.max_steps = 2
        arguments.recall_rows = 1
    arguments.command = typed_command(__file__, argv)
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    results = ["continuations.json", "continuations.png"]
    logging.set_verbosity_warning()
    with (
        one_line_errors(__file__),
        output_folder(arguments, results) as arguments.output,
        tempfile.TemporaryDirectory() as work,
    ):
        compare(arguments, Path(work))


if __name__ == "__main__":
    main()
