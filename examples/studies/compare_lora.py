"""
What LoRA learns on DIFF V2, on calibrated V1 and on the LLaMA that both came from: equal data, steps and parameters.

    python examples/studies/compare_lora.py --v1 out/v1 --output examples/results/lora    # ten minutes, one thread
    python examples/studies/compare_lora.py --smoke                                       # seconds; shows that it runs

Two tasks: (i) instructions made here, to reverse, sort or upper-case three keys, scored by exact match on lists never
seen; (ii) Python modules, LoRA on the first half of heldout.txt, loss on the second. `--v1` is a converted V1 (as by
`diff-llama convert --variant v1 --calibration`; left out, the closed-form stages are run here, half a minute). Each
model's rank is the one whose trainable parameters, lambda and norms included, come closest to LLaMA's at `--rank`.
Writes lora.json (command, loss curves, scores), a table and lora.png.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from conversion import convert_checkpoint
from modeling_diff.experiments.output_files import add_output, settle_output
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
    generator, records = random.Random(seed), {}
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


def batches(examples: list[dict], batch_size: int, seed: int):
    """Without end, a new order every epoch, the same for every model."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(examples), generator=generator).tolist()
        for start in range(0, len(order) - batch_size + 1, batch_size):
            yield [examples[index] for index in order[start : start + batch_size]]


def fit(model: PeftModel, examples: list[dict], collate, steps: int, batch_size: int, rate: float) -> list[float]:
    """The loss of every step of AdamW with a linear fall of the rate."""
    optimizer = torch.optim.AdamW(parameter_groups(model, learning_rate=rate), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    source, losses = batches(examples, batch_size, seed=0), []
    model.train()
    for _ in range(steps):
        loss = model(**collate(next(source))).loss
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
    """Nats a labelled token."""
    total, count = 0.0, 0
    for start in range(0, len(examples), batch_size):
        batch = collate(examples[start : start + batch_size])
        labelled = int((batch["labels"][:, 1:] != -100).sum())
        total, count = total + model(**batch).loss.item() * labelled, count + labelled
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
    train = instructions(arguments.examples, seed=2, unseen={record["prompt"] for record in test})
    text = (ASSETS / "heldout.txt").read_text()
    halves = [{"text": text[: len(text) // 2]}], [{"text": text[len(text) // 2 :]}]
    modules, unseen_modules = (tokenize(half, tokenizer, arguments.length) for half in halves)
    unseen_modules = unseen_modules[: arguments.test_windows]
    parameters, rows = trainable(adapted(folders["LLaMA"], arguments.rank)), []
    for name, folder in folders.items():
        servable = name.endswith(SERVABLE)
        rank = arguments.rank if name == "LLaMA" else matched_rank(folder, parameters, arguments.rank, servable)
        for task in ("instructions", "modules"):
            began = time.monotonic()
            model = adapted(folder, rank, arguments.device, servable).eval()
            row = {"model": name, "task": task, "rank": rank, "trainable": trainable(model)}
            if task == "instructions":
                held_out = tokenize(test, tokenizer, arguments.length)
                row["loss_before"] = held_out_loss(model, held_out, collate, 64)
                data = tokenize(train, tokenizer, arguments.length)
                row["losses"] = fit(model, data, collate, arguments.steps, arguments.batch_size, arguments.rate)
                row["loss"] = held_out_loss(model, held_out, collate, 64)
                row["exact_match"] = exact_match(model, tokenizer, test)
            else:
                row["loss_before"] = held_out_loss(model, unseen_modules, collate, 8)
                row["losses"] = fit(model, modules, collate, arguments.module_steps, 4, arguments.rate / 2)
                row["loss"] = held_out_loss(model, unseen_modules, collate, 8)
            row["seconds"] = time.monotonic() - began
            rows.append(row)
            print(json.dumps({key: value for key, value in row.items() if key != "losses"}), flush=True)
    return rows


def draw(rows: list[dict], path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print(f"no {path.name}: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    for axis, task in zip(axes, ("instructions", "modules"), strict=True):
        for row in (row for row in rows if row["task"] == task):
            window = max(1, len(row["losses"]) // 25)
            means = [
                sum(row["losses"][i : i + window]) / window for i in range(0, len(row["losses"]) - window + 1, window)
            ]
            axis.plot([window * (i + 1) for i in range(len(means))], means, label=row["model"])
        axis.set(title=task, xlabel="step", ylabel="training loss (nats a token)")
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
            row["model"], row["task"], str(row["rank"]), f"{row['trainable']:,}", f"{row['loss_before']:.3f}",
            f"{row['loss']:.3f}", score, f"{row['seconds']:.0f}",
        )  # fmt: skip
    Console(width=110).print(table)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--v1", help="a converted V1 of examples/assets/tiny-llama")
    add_output(parser, "compare_lora", "folder for lora.json and lora.png")
    parser.add_argument("--rank", type=int, default=16, help="LLaMA's; the others' are matched to it")
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--steps", type=int, default=300, help="on instructions")
    parser.add_argument("--module-steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--examples", type=int, default=4000)
    parser.add_argument("--test-examples", type=int, default=192)
    parser.add_argument("--test-windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--servable", action="store_true", help="adapters that vLLM serves, next to the full recipe")
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        arguments.steps = arguments.module_steps = arguments.test_windows = 2
        arguments.examples, arguments.test_examples, arguments.batch_size, arguments.length = 16, 8, 4, 32
    try:
        settle_output(arguments, ("lora.json", "lora.png"), [arguments.v1])
    except ValueError as error:
        sys.exit(f"compare_lora: {error}")
    with tempfile.TemporaryDirectory() as folder:
        folders = {"LLaMA": str(ASSETS), "DIFF V2": f"{folder}/v2", "DIFF V1": arguments.v1 or f"{folder}/v1"}
        convert_checkpoint(ASSETS, Path(folder) / "v2", "v2", measure=False)
        if not arguments.v1:
            fitting = {"calibration": ASSETS / "calibration.txt", "calibration_tokens": 16384}
            fitting = {"uncalibrated": True} if arguments.smoke else fitting | {"stages": ("pairing", "refit")}
            convert_checkpoint(ASSETS, Path(folder) / "v1", "v1", **fitting, measure=False)
        if arguments.servable:
            folders |= {name + SERVABLE: path for name, path in folders.items() if name != "LLaMA"}
        rows = compare(folders, arguments)
    arguments.output.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python examples/studies/compare_lora.py", *(sys.argv[1:] if argv is None else argv)])
    record = {"command": command, "torch": torch.__version__, "rows": rows}
    (arguments.output / "lora.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(rows, arguments.output / "lora.png")
    show(rows)


if __name__ == "__main__":
    main()
