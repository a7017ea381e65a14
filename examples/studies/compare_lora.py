"""
What LoRA learns on DIFF V2, on calibrated V1 and on the LLaMA that both came from: equal data, steps and parameters.

    python examples/studies/compare_lora.py --v1 out/v1 --output examples/results/lora    # ten minutes, one thread
    python examples/studies/compare_lora.py --smoke                                       # seconds; shows that it runs

Two tasks: (i) instructions made here, to reverse, sort or upper-case three keys, scored by exact match on lists never
seen; (ii) Python modules, LoRA on the first half of heldout.txt, loss on the second. `--v1` is a converted V1 (as by
`diff-llama convert --variant v1 --calibration`; left out, the closed-form stages are run here, half a minute). Each
model's rank is the one whose trainable parameters, lambda and norms included, come closest to LLaMA's at `--lora-r`.
Writes lora.json (command, loss curves, scores), a table and lora.png.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from conversion import convert_checkpoint
from modeling_diff.experiments.command_line import add_device, one_line_errors, script_parser, typed_command
from modeling_diff.experiments.output_files import add_output, output_folder
from modeling_diff.experiments.plots import pyplot_for
from modeling_diff.training import lora_config, parameter_groups
from modeling_diff.training.finetuning_data import tokenize


try:
    from peft import PeftModel, get_peft_model
except ImportError:
    sys.exit("compare_lora: the package peft is missing; pip install peft")


ASSETS = Path(__file__).parents[1] / "assets" / "tiny-llama"
SERVABLE = ", servable"
OPERATIONS = {
    "reverse": lambda keys: keys[::-1],
    "sort": sorted,
    "upper": lambda keys: [key.upper() for key in keys],
}


def instructions(count: int, seed: int, unseen: set[str] | None = None) -> list[dict]:
    """`reverse: b c a -> a c b`, lists of three different letters; none of `unseen`'s prompts."""
    generator = random.Random(seed)
    records = {}
    while len(records) < count:
        keys = generator.sample("abcdefghijklmnopqrstuvwxyz", 3)
        name = generator.choice(list(OPERATIONS))
        prompt = f"{name}: {' '.join(keys)} ->"
        if prompt not in (unseen or set()):
            records[prompt] = {"prompt": prompt, "completion": " " + " ".join(OPERATIONS[name](keys))}
    return list(records.values())


def adapted(folder, rank: int, device: str = "cpu", servable: bool = False) -> PeftModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return get_peft_model(model, lora_config(model, servable=servable, r=rank, lora_alpha=2 * rank)).to(device)


def trainable(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def matched_rank(folder, parameters: int, rank: int, servable: bool = False) -> int:
    """The rank with the number of trainable parameters closest to `parameters`."""
    counts = {r: trainable(adapted(folder, r, servable=servable)) for r in range(max(1, rank - 3), rank + 2)}
    return min(counts, key=lambda r: abs(counts[r] - parameters))


def shuffled_batches(examples: list[dict], batch_size: int, seed: int) -> Iterator[list[dict]]:
    """Yields batches without end, in a new order every epoch, the same for every model."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(examples), generator=generator).tolist()
        for start in range(0, len(order) - batch_size + 1, batch_size):
            yield [examples[index] for index in order[start : start + batch_size]]


def fit(model: PeftModel, batches: Iterator[list[dict]], collate, steps: int, learning_rate: float) -> list[float]:
    """Trains with AdamW and a linearly falling learning rate; returns the loss of every step."""
    optimizer = torch.optim.AdamW(parameter_groups(model, learning_rate=learning_rate), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(**collate(next(batches))).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@torch.no_grad()
def held_out_loss(model, examples: list[dict], collate, batch_size: int) -> float:
    """Returns the loss in nats per labeled token."""
    total = 0.0
    count = 0
    for start in range(0, len(examples), batch_size):
        batch = collate(examples[start : start + batch_size])
        labeled = int((batch["labels"][:, 1:] != -100).sum())
        total += model(**batch).loss.item() * labeled
        count += labeled
    return total / count


@torch.no_grad()
def exact_match(model, tokenizer, records: list[dict]) -> float:
    """Share of completions that greedy generation gives to the last character."""
    tokenizer.padding_side = "left"
    correct = 0
    for start in range(0, len(records), 64):
        part = records[start : start + 64]
        inputs = tokenizer([record["prompt"] for record in part], return_tensors="pt", padding=True).to(model.device)
        output = model.generate(
            input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=12, do_sample=False
        )
        said = tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        correct += sum(text.strip() == record["completion"].strip() for text, record in zip(said, part, strict=True))
    tokenizer.padding_side = "right"
    return correct / len(records)


def compare(folders: dict[str, str], arguments) -> list[dict]:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS)
    pad = DataCollatorForSeq2Seq(tokenizer)

    def collate(examples):
        return pad(examples).to(arguments.device)

    test = instructions(arguments.test_examples, seed=1)
    train = instructions(arguments.train_examples, seed=2, unseen={record["prompt"] for record in test})
    text = (ASSETS / "heldout.txt").read_text()
    halves = [{"text": text[: len(text) // 2]}], [{"text": text[len(text) // 2 :]}]
    modules, unseen_modules = (tokenize(half, tokenizer, arguments.max_length) for half in halves)
    unseen_modules = unseen_modules[: arguments.test_windows]
    parameters = trainable(adapted(folders["LLaMA"], arguments.lora_r))
    rows = []
    for name, folder in folders.items():
        servable = name.endswith(SERVABLE)
        rank = arguments.lora_r if name == "LLaMA" else matched_rank(folder, parameters, arguments.lora_r, servable)
        for task in ("instructions", "modules"):
            began = time.monotonic()
            model = adapted(folder, rank, arguments.device, servable).eval()
            row = {"model": name, "task": task, "rank": rank, "trainable": trainable(model)}
            if task == "instructions":
                held_out = tokenize(test, tokenizer, arguments.max_length)
                row["loss_before"] = held_out_loss(model, held_out, collate, 64)
                data = tokenize(train, tokenizer, arguments.max_length)
                source = shuffled_batches(data, arguments.per_device_train_batch_size, seed=0)
                row["losses"] = fit(model, source, collate, arguments.max_steps, arguments.learning_rate)
                row["loss"] = held_out_loss(model, held_out, collate, 64)
                row["exact_match"] = exact_match(model, tokenizer, test)
            else:
                row["loss_before"] = held_out_loss(model, unseen_modules, collate, 8)
                source = shuffled_batches(modules, 4, seed=0)
                row["losses"] = fit(model, source, collate, arguments.module_steps, arguments.learning_rate / 2)
                row["loss"] = held_out_loss(model, unseen_modules, collate, 8)
            row["seconds"] = time.monotonic() - began
            rows.append(row)
            print(json.dumps({key: value for key, value in row.items() if key != "losses"}), flush=True)
    return rows


def draw(rows: list[dict], path: Path) -> None:
    pyplot = pyplot_for(path)
    if pyplot is None:
        return
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    for axis, task in zip(axes, ("instructions", "modules"), strict=True):
        for row in (row for row in rows if row["task"] == task):
            window = max(1, len(row["losses"]) // 25)
            means = [
                sum(row["losses"][i : i + window]) / window for i in range(0, len(row["losses"]) - window + 1, window)
            ]
            axis.plot([window * (i + 1) for i in range(len(means))], means, label=row["model"])
        axis.set(title=task, xlabel="step", ylabel="training loss (nats/token)")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def show(rows: list[dict]) -> None:
    table = Table(title="LoRA at equal trainable parameters, steps and data", title_justify="left")
    for column in ("model", "task", "rank", "trainable", "loss before", "loss", "exact match", "seconds"):
        table.add_column(column, no_wrap=True)
    for row in rows:
        score = f"{row['exact_match']:.1%}" if "exact_match" in row else "-"
        table.add_row(
            row["model"],
            row["task"],
            str(row["rank"]),
            f"{row['trainable']:,}",
            f"{row['loss_before']:.3f}",
            f"{row['loss']:.3f}",
            score,
            f"{row['seconds']:.0f}",
        )
    Console(width=110).print(table)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = script_parser(__file__, __doc__)
    add = parser.add_argument
    add("--v1", help="a converted V1 of examples/assets/tiny-llama (default: made here, effort quick)")
    add_output(parser, "lora.json and lora.png", "compare_lora")
    add("--lora-r", type=int, default=16, help="rank of the LLaMA's LoRA; the others' are matched to it")
    add("--learning-rate", type=float, default=4e-3, help="peak learning rate on instructions, half of it on modules")
    add("--max-steps", type=int, default=300, help="steps on instructions")
    add("--module-steps", type=int, default=60, help="steps on modules")
    add("--per-device-train-batch-size", type=int, default=32, help="instructions per step")
    add("--train-examples", type=int, default=4000, help="instructions to train on")
    add("--test-examples", type=int, default=192, help="instructions to be scored on")
    add("--test-windows", type=int, default=64, help="windows of modules to be scored on")
    add("--max-length", type=int, default=256, help="most tokens of an example")
    add_device(parser)
    add("--servable", action="store_true", help="adapters that vLLM serves, next to the full recipe")
    add("--smoke", action="store_true", help="two steps of each, seconds")
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        arguments.max_steps = 2
        arguments.module_steps = 2
        arguments.test_windows = 2
        arguments.train_examples = 16
        arguments.test_examples = 8
        arguments.per_device_train_batch_size = 4
        arguments.max_length = 32
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    results = ["lora.json", "lora.png"]
    with one_line_errors(__file__), output_folder(arguments, results, [arguments.v1]) as output:
        with tempfile.TemporaryDirectory() as folder:
            rows = compare(conversions(Path(folder), arguments), arguments)
        record = {"command": typed_command(__file__, argv), "torch": torch.__version__, "rows": rows}
        (output / "lora.json").write_text(json.dumps(record, indent=1) + "\n")
        draw(rows, output / "lora.png")
    show(rows)


def conversions(folder: Path, arguments: argparse.Namespace) -> dict[str, str]:
    """Returns the folder of every model by its name; what is not given is converted into `folder`."""
    folders = {"LLaMA": str(ASSETS), "DIFF V2": str(folder / "v2"), "DIFF V1": arguments.v1 or str(folder / "v1")}
    convert_checkpoint(ASSETS, folder / "v2", "v2", measure=False)
    if not arguments.v1:
        fitting = {"calibration": ASSETS / "calibration.txt", "effort": "quick"}
        fitting = {"uncalibrated": True} if arguments.smoke else fitting
        convert_checkpoint(ASSETS, folder / "v1", "v1", **fitting, measure=False)
    if arguments.servable:
        folders |= {name + SERVABLE: path for name, path in folders.items() if name != "LLaMA"}
    return folders


if __name__ == "__main__":
    main()
