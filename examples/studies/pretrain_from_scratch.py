"""Trains DIFF V1, DIFF V2 and LLaMA from scratch: equal parameters, data, order, learning rate and seeds.

The paper's claim, tried: V1 is the paper's (half as many heads, each twice as wide; its schedule of lambda, its norm),
V2 has twice the queries and an MLP as much narrower as that costs. Text is Python source with synthetic recall.
Reports held-out loss, recall and lambda, mean ± standard deviation over seeds. Finished runs in the output folder are
kept and read, so a stopped command continues. At the root; nine runs on one thread in about an hour, one run on a GPU:

    OMP_NUM_THREADS=1 python examples/studies/pretrain_from_scratch.py --output out/scratch --compile on
    python examples/studies/pretrain_from_scratch.py --output out/scratch-large --size large --compile on
    python examples/studies/pretrain_from_scratch.py --smoke

A limit: one learning rate for all three, tuned for none.

Size legend: B rows per batch, T tokens per row (the context).
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from types import SimpleNamespace

import torch
from pretraining_measures import in_words, measure, recall_sets
from tiny_llama_text import Recall, held_out_windows, prepare_text, training_rows
from train_tiny_llama import Size, build_model, mean_loss, recall_accuracy, to_json, train

from modeling_diff import DiffLlamaConfig, DiffLlamaForCausalLM
from modeling_diff.experiments.command_line import add_device, one_line_errors, script_parser, typed_command
from modeling_diff.experiments.environment import environment
from modeling_diff.experiments.output_files import add_output, output_folder
from modeling_diff.experiments.plots import pyplot_for


RESULTS = ("results.json", "curves.png", "*-seed*")
MODELS = {"llama": "LLaMA", "v1": "DIFF V1", "v2": "DIFF V2"}
SIZES = {
    "tiny": Size(128, 352, 4, 4, 4, 1024, 256, 8, 1200, 3e-3, "stdlib"),
    "small": Size(256, 576, 6, 8, 4, 2048, 512, 16, 6000, 2e-3, "stdlib"),
    "large": Size(768, 2048, 12, 12, 4, 16384, 1024, 128, 3000, 1e-3, "stdlib+packages"),
    "smoke": Size(64, 128, 2, 4, 2, 512, 128, 8, 12, 5e-3, "smoke"),
}


def count_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def v2_intermediate_size(size):
    """
    LLaMA's MLP narrowed by what V2's second queries and lambda_proj cost: hidden_size + heads rows, and a neuron of an
    MLP is three. Wide ones end on a multiple of 8, which GPUs want.
    """
    multiple = 8 if size.intermediate_size >= 1024 else 1
    return round((size.intermediate_size - (size.hidden_size + size.heads) / 3) / multiple) * multiple


def build_twin(name, size, tokenizer, attention):
    """LLaMA of `size`, or the DIFF model with as many parameters."""
    llama = build_model(size, tokenizer)
    if name == "llama":
        llama.set_attn_implementation(attention)
        return llama
    narrowed = {"intermediate_size": v2_intermediate_size(size)} if name == "v2" else {}
    config = DiffLlamaConfig.from_llama(llama.config, variant=name, attn_implementation=attention, **narrowed)
    return DiffLlamaForCausalLM(config)


def print_counts(models, size, tokenizer, attention):
    """The parameters of every model; refuses what is not equal within 0.5 %."""
    counts = {name: count_parameters(build_twin(name, size, tokenizer, attention)) for name in ("llama", *models)}
    for name, count in counts.items():
        print(f"{MODELS[name]:8} {count:>12,} parameters ({count / counts['llama'] - 1:+.2%})", flush=True)
        if abs(count / counts["llama"] - 1) > 0.005:
            raise SystemExit(f"{MODELS[name]} differs from LLaMA's {counts['llama']:,} parameters by more than 0.5 %")


def prepare(size, seed):
    """Tokenizer, training stream (N,), held-out windows (B, T) and recall sets: the same for every model and seed."""
    tokenizer, stream, parts, numbers = prepare_text(size, seed)
    windows = held_out_windows(tokenizer, "\n".join(text for _, text in parts["heldout"]), size.context)
    unseen = Recall(tokenizer, windows[:, 1:].flatten(), size.context, seed, held_out=True)
    print(f"{numbers['train_files']} files, {len(stream):,} tokens, {windows.numel():,} held out", flush=True)
    return tokenizer, stream, windows, unseen


def run_one(name, seed, size, text, sets, args):
    """Train and measure one model: its record."""
    tokenizer, stream, windows, _ = text
    torch.compiler.reset()  # or the graphs of the models before would count against the limit
    torch.manual_seed(seed)
    model = build_twin(name, size, tokenizer, args.attention).to(args.device)
    recall = Recall(tokenizer, stream, size.context, seed, held_out=False)
    batches = training_rows(size, stream, recall, args.recall_share, seed)
    probes = sets["1_needle"][:16]

    def probe():
        return {"heldout": mean_loss(model, windows[:24]), "needle_accuracy": recall_accuracy(model, probes)}

    began = time.monotonic()
    steps, curve = train(model, batches, probe, size, SimpleNamespace(minutes=None, compile=args.compile))
    seconds = time.monotonic() - began
    record = {
        "model": name,
        "seed": seed,
        **settings(size, args),
        "parameters": count_parameters(model),
        "intermediate_size": model.config.intermediate_size,
        "tokens_seen": steps * size.batch * size.context,
        "train_seconds": seconds,
        "final": measure(model, windows, sets),
        "curve": curve,
    }
    if args.save:
        model.save_pretrained(args.output / f"{name}-seed{seed}")
        tokenizer.save_pretrained(args.output / f"{name}-seed{seed}")
    return record


def settings(size, args):
    """What has to be equal in runs that are compared."""
    return {"size": asdict(size), "recall_share": args.recall_share, "recall_rows": args.recall_rows}


def read_finished(path, size, args):
    """The record of a finished run, or None; refuses one of other settings."""
    if not path.exists():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    different = [name for name, value in settings(size, args).items() if record[name] != value]
    if different:
        raise SystemExit(f"{path} was run with another {' and '.join(different)}: name another --output")
    return record


def run_all(size, args):
    """Every model for the first seed, then for the next: records in that order, each written once it is there."""
    paths = {(name, seed): args.output / f"{name}-seed{seed}.json" for seed in args.seeds for name in args.models}
    records = {key: read_finished(path, size, args) for key, path in paths.items()}
    if None in records.values():
        text = prepare(size, seed=0)
        print_counts(args.models, size, text[0], args.attention)
        sets = recall_sets(text[3], args.recall_rows)
    for (name, seed), path in paths.items():
        if records[name, seed] is None:
            print(f"{MODELS[name]}, seed {seed}", flush=True)
            records[name, seed] = run_one(name, seed, size, text, sets, args)
            path.with_suffix(".part").write_text(to_json(records[name, seed]), encoding="utf-8")
            path.with_suffix(".part").rename(path)
        summarize([record for record in records.values() if record], args)
    return list(records.values())


def summarize(records, args):
    """Write results.json and curves.png for the runs that are finished."""
    rows = []
    for name in args.models:
        runs = [record for record in records if record["model"] == name]
        if runs:
            rows.append(summary(name, runs))
    record = {"command": args.command, "environment": environment(args.device), "rows": rows, "runs": records}
    (args.output / "results.json").write_text(to_json(record), encoding="utf-8")
    plot(records, args.output / "curves.png")
    return rows


def summary(name, runs):
    """One row of the table: mean ± standard deviation over `runs`."""
    finals = [run["final"] for run in runs]
    row = {
        "model": MODELS[name],
        "seeds": len(runs),
        "parameters": runs[0]["parameters"],
        "heldout_loss": in_words([final["heldout_loss"] for final in finals]),
        "recall_loss": in_words([final["recall_loss"] for final in finals]),
    }
    for kind in finals[0]["recall_accuracy"]:
        row[kind] = in_words([final["recall_accuracy"][kind] for final in finals], percent=True)
    row["seconds"] = f"{sum(run['train_seconds'] for run in runs) / len(runs):.0f}"
    lambdas = zip(*(final["lambda_by_layer"] for final in finals), strict=True)
    row["lambda_by_layer"] = " ".join(f"{sum(layer) / len(runs):.2f}" for layer in lambdas)
    return row


def print_table(rows):
    """As Markdown."""
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(f"{value:,}" if isinstance(value, int) else value for value in row.values()) + " |")


def plot(records, path):
    """Held-out loss and needle accuracy over steps: a thin line a seed."""
    pyplot = pyplot_for(path)
    if pyplot is None:
        return
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    titles = {"heldout": "held-out loss (nats/token)", "needle_accuracy": "one needle recalled (16 rows)"}
    for axis, (what, title) in zip(axes, titles.items(), strict=True):
        for record in records:
            steps, values = zip(*((point["step"], point[what]) for point in record["curve"]), strict=True)
            label = MODELS[record["model"]] if record["seed"] == min(run["seed"] for run in records) else None
            axis.plot(steps, values, color=f"C{list(MODELS).index(record['model'])}", label=label, lw=1)
        axis.set(xlabel="step", ylabel=title)
    axes[1].set_ylim(-0.03, 1.03)
    axes[0].legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Size]:
    parser = script_parser(__file__, __doc__)
    add = parser.add_argument
    add_output(parser, "results.json, curves.png and every run, to continue in", "pretrain_from_scratch")
    add("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="models to train")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds of the weights and of the order of the text")
    add("--size", choices=["tiny", "small", "large"], default="tiny", help="shape, text and length of the runs")
    add("--smoke", action="store_true", help="toys of models in seconds, instead of --size")
    add("--max-steps", type=int, help="optimizer steps per run (default: the size's)")
    add("--per-device-train-batch-size", type=int, help="rows per step (default: the size's)")
    add("--learning-rate", type=float, help="peak learning rate of all models (default: the size's)")
    add("--recall-share", type=float, default=0.5, help="share of recall rows in a batch (0 to 0.9)")
    add("--recall-rows", type=int, default=100, help="rows of each kind that recall is measured on")
    add("--attention", default="sdpa", help="attention of all models, so that only the mathematics differs")
    add("--compile", choices=["on", "off"], default="off", help="torch.compile; needs a C++ compiler")
    add_device(parser)
    add("--save", action="store_true", help="write the trained models as well")
    args = parser.parse_args(argv)
    size = SIZES["smoke" if args.smoke else args.size]
    given = {
        "batch": args.per_device_train_batch_size,
        "steps": args.max_steps,
        "learning_rate": args.learning_rate,
    }
    size = replace(size, **{name: value for name, value in given.items() if value is not None})
    if args.smoke:
        args.recall_rows = min(args.recall_rows, 2)
    if not 0 <= args.recall_share <= 0.9:
        parser.error(f"--recall-share {args.recall_share} must lie between 0 and 0.9")
    if min(size.batch, size.steps, size.learning_rate, args.recall_rows) <= 0:
        names = "--per-device-train-batch-size, --max-steps, --learning-rate and --recall-rows"
        parser.error(f"{names} must be positive")
    args.command = typed_command(__file__, argv)
    return args, size


def main(argv: Sequence[str] | None = None) -> None:
    args, size = parse(argv)
    with (
        one_line_errors(__file__),
        output_folder(args, RESULTS, resume=not args.overwrite) as args.output,
    ):
        print_table(summarize(run_all(size, args), args))


if __name__ == "__main__":
    main()
