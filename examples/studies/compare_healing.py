"""Heals V1 conversions of the small LLaMA from several starts, at equal tokens: how little healing wins back the rest.

Starts: the plain permuted copy (the control), heads paired and o_proj refit, the whole calibration, and the exact
start of blended_attention.py; next to them the exact V2, trained on the same rows as text (compare_continuations.py
does that to the LLaMA as well). Then, from the calibrated start and over several seeds, what becomes of lambda: free,
held at its floor, annealed to the paper's schedule, at a rate at which it can go where it wants; `without second maps`
is the loss of the healed model with lambda set to 0, its norm still at work.

    python examples/studies/compare_healing.py --output examples/results/healing      # an hour on one thread
    python examples/studies/compare_healing.py --smoke

`agreement_share` is greedy agreement with LLaMA over LLaMA's agreement with itself when the first half of the prompt
is another text. Finished runs are read from --work. R rows, T tokens a row, V vocabulary.
"""

import argparse
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from blended_attention import Blend
from compare_conversions import EMBEDDED, RECALL_ROWS, held_out_rows, measure, recall_rows
from tiny_llama_text import Recall, prepare_text, training_rows
from train_tiny_llama import SIZES, recall_accuracy
from transformers import AutoTokenizer, LlamaForCausalLM

from conversion import convert_checkpoint
from conversion.calibration.calibrate import Stage
from conversion.heal import heal_checkpoint
from conversion.healing.options import HealingOptions
from modeling_diff import DiffLlamaForCausalLM
from modeling_diff.experiments.command_line import one_line_errors, script_parser, typed_command
from modeling_diff.experiments.environment import environment
from modeling_diff.experiments.output_files import add_output, output_folder
from modeling_diff.experiments.plots import pyplot_for


STARTS = {
    "copy": {},
    "paired and refit": {"stages": [Stage.PAIRING, Stage.REFIT]},
    "calibrated": {"stages": list(Stage)},
    "blend": {"norm": "neutral"},
    "V2": {"variant": "v2"},
}
# The nearer the start, the smaller the steps: the calibrated start loses by 2e-4; it is hardly back 200K tokens later.
RATES = {"copy": 2e-3, "paired and refit": 1e-3, "calibrated": 1e-4, "blend": 2e-3, "V2": 2e-4}
NEAR_NATS = 0.25  # of the LLaMA: starts that are drawn enlarged
LAMBDA_MODES = ("free", "floor", "paper")
LAMBDA_STUDY = {
    "learning_rate": 1e-3,
    "lambda_learning_rate": 1e-3,
    "per_device_train_batch_size": 4,
    "eval_steps": 0.5,
}


def write_rows(path, tokenizer, num_rows, seed, text):
    """JSON lines of rows such as the LLaMA was trained on, under another seed."""
    size = replace(SIZES["tiny"], text=text)
    tokenizer, stream, _, _ = prepare_text(size, seed, tokenizer)
    batches = training_rows(size, stream, Recall(tokenizer, stream, size.context, seed, held_out=False), 0.375, seed)
    with path.open("w") as file:
        for _ in range(-(-num_rows // size.batch)):
            file.writelines(json.dumps({"input_ids": row}) + "\n" for row in next(batches).tolist())


def convert(start, args, folder):
    """The checkpoint of `start`, converted unless it is there."""
    if not folder.exists():
        options = {"variant": "v1"} | STARTS[start]
        if options["variant"] == "v1" and "stages" not in options:
            options["uncalibrated"] = True
        if "stages" in options:
            options |= {"calibration": args.model / "calibration.txt", "calibration_tokens": args.calibration_tokens}
        convert_checkpoint(args.model, folder, **options, measure=False)
    return folder


@torch.no_grad()
def self_agreement(llama, rows):
    """How often LLaMA's greedy token in the second half of rows (R, T) survives another row's first half."""
    half = rows.shape[1] // 2
    resampled = torch.cat((rows.roll(1, 0)[:, :half], rows[:, half:]), dim=1)
    same = [
        (llama(a).logits[:, half:].argmax(-1) == llama(b).logits[:, half:].argmax(-1)).float().mean(1)
        for a, b in zip(rows.split(8), resampled.split(8), strict=True)
    ]
    return torch.cat(same).mean().item()


@torch.no_grad()
def without_second_maps(model, llama, rows):
    """Loss with lambda at 0 in every layer; None for V2, where a gate takes its place."""
    if model.config.variant == "v2":
        return None
    for layer in model.model.layers:
        if hasattr(layer.self_attn, "diff_lambda"):
            vectors = layer.self_attn.diff_lambda  # lambda = exp(0) - (1 + lambda_init) + lambda_init
            vectors.lambda_q1.zero_()
            k2 = vectors.lambda_k2
            vectors.lambda_q2.copy_(k2 * math.log1p(vectors.lambda_init) / k2.square().sum())
    return measure(model, llama, rows)["loss"]


class Comparison:
    """The LLaMA, the rows to train on, and the questions put to every healed model."""

    def __init__(self, args):
        self.args = args
        self.tokenizer = AutoTokenizer.from_pretrained(args.model, model_max_length=10**9)
        self.llama = LlamaForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
        self.rows = held_out_rows(args.model, self.tokenizer, 512, args.held_out_tokens)
        found = recall_rows(args.model, self.tokenizer, 512)
        self.asked = {kind: rows[: args.recall_rows] for kind, rows in found.items()}
        self.own = self_agreement(self.llama, self.rows)
        self.before = {}
        self.data = args.work / "rows.jsonl"
        if not self.data.exists():
            args.work.mkdir(parents=True, exist_ok=True)
            write_rows(self.data, self.tokenizer, -(-args.tokens // 512) + 8, args.data_seed, args.text)

    def look(self, model):
        """Loss, KL, agreement, recall of `model`."""
        found = measure(model, self.llama, self.rows)
        found["agreement_share"] = found["agreement"] / self.own
        return found | {kind: recall_accuracy(model, rows) for kind, rows in self.asked.items()}

    def heal(self, start, lambda_mode="floor", seed=0, tokens=None, **choices):
        """One healing, or what is left of it from an earlier run: a row of the results."""
        args = self.args
        tokens = tokens or args.tokens
        name = f"{start}-{lambda_mode}-{seed}-{tokens}".replace(" ", "-")
        kept = args.work / f"{name}.json"
        output = args.work / name
        if kept.exists():
            return json.loads(kept.read_text())
        checkpoint = convert(start, args, args.work / f"start-{start}".replace(" ", "-"))
        student = DiffLlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        callbacks = [Blend(student, args.blend_share)] if start == "blend" else []  # from here on it is the LLaMA
        if start not in self.before:
            self.before[start] = self.look(student)
        stage = "lm" if start == "V2" else "kl"
        defaults = {"learning_rate": args.learning_rates[start], "eval_steps": 1 / args.evaluations}
        options = HealingOptions(
            stage=stage,
            tokens=tokens,
            max_length=512,
            lambda_mode=lambda_mode,
            seed=seed,
            held_out_rows=16,
            norm_share=args.blend_share,
            **(defaults | choices),
        )
        shutil.rmtree(output, ignore_errors=True)
        report = heal_checkpoint(
            checkpoint,
            output,
            options,
            data=self.data,
            teacher=args.model,
            held_out=args.model / "heldout.txt",
            model=student,
            callbacks=callbacks,
        )
        healed = DiffLlamaForCausalLM.from_pretrained(output, dtype=torch.float32)
        row = {
            "start": start,
            "stage": stage,
            "lambda_mode": lambda_mode,
            "seed": seed,
            "tokens": tokens,
            "options": options.recorded(),
            "before": self.before[start],
            "after": self.look(healed),
            "curve": [dict(point) for point in report.table],
            "without_second_maps": without_second_maps(healed, self.llama, self.rows),
        }
        kept.write_text(json.dumps(row))
        print_row(row)
        return row


def print_row(row):
    before, after = row["before"], row["after"]
    lambdas = " ".join(f"{value:.3f}" for value in row["curve"][-1]["lambda"])
    without = "" if row["without_second_maps"] is None else f", without second maps {row['without_second_maps']:.3f}"
    moves = [f"{name} {before[key]:.3f} -> {after[key]:.3f}" for name, key in (("loss", "loss"), ("KL", "kl_nats"))]
    moves += [f"{key} {before[key]:.1%} -> {after[key]:.1%}" for key in ("agreement", "needle", "dense")]
    print(
        f"{row['start']:<17} {row['lambda_mode']:<6} seed {row['seed']} {row['tokens']:,} tokens: {', '.join(moves)}, "
        f"{after['agreement_share']:.1%} of LLaMA's own agreement, lambda {lambdas}{without}",
        flush=True,
    )


def plot(rows, llama_loss, path):
    """Held-out loss against tokens of healing, a line per start: all of them, and those near the LLaMA enlarged."""
    pyplot = pyplot_for(path)
    if pyplot is None:
        return
    curves = {f"{row['start']} ({row['stage']})": [point["loss"] for point in row["curve"]] for row in rows}
    near = [loss for losses in curves.values() for loss in losses if max(losses) - llama_loss < NEAR_NATS]
    enlarged = 0 < len(near) < sum(map(len, curves.values()))
    figure, panels = pyplot.subplots(1, 1 + enlarged, figsize=(9, 4.2), layout="constrained", squeeze=False)
    for axes in panels[0]:
        for row, (label, losses) in zip(rows, curves.items(), strict=True):
            tokens = [point["tokens"] / 1e6 for point in row["curve"]]
            axes.plot(tokens, losses, marker="o", markersize=3, label=label)
        axes.axhline(llama_loss, color="grey", linestyle=":", label="the LLaMA itself")
        axes.set(xlabel="million tokens of healing", ylabel="held-out loss (nats/token)")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0, 0].legend(frameon=False)
    if enlarged:
        lowest = min(*near, llama_loss)
        highest = max(*near, llama_loss)
        margin = 0.08 * (highest - lowest) or 0.01
        panels[0, 1].set_ylim(lowest - margin, highest + margin)
        panels[0, 0].set_title("all starts", loc="left")
        panels[0, 1].set_title("near the LLaMA, enlarged", loc="left")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = script_parser(__file__, __doc__)
    add = parser.add_argument
    add_output(parser, "healing.json and healing.png", "compare_healing")
    add("--work", type=Path, help="folder for converted and healed checkpoints (default: work in --output)")
    add("--model", type=Path, default=EMBEDDED, help="folder of a LLaMA with calibration.txt and heldout.txt")
    add("--starts", nargs="+", choices=STARTS, default=list(STARTS), help="starts to heal from")
    add("--tokens", type=int, default=262_144, help="tokens of each healing")
    add("--lambda-tokens", type=int, default=131_072, help="tokens of each healing in the comparison of lambdas")
    add("--seeds", type=int, nargs="*", default=[0, 1, 2], help="seeds of the comparison of lambdas")
    add("--blend-share", type=float, default=0.6, help="share of the steps in which the blend becomes V1")
    rate = "peak learning rate of a start, as in blend=1e-3; may be repeated"
    add("--learning-rate", dest="rates", action="append", default=[], metavar="START=RATE", help=rate)
    add("--calibration-tokens", type=int, default=65_536, help="number of calibration tokens to read")
    add("--held-out-tokens", type=int, default=24_576, help="number of held-out tokens to measure on")
    add("--evaluations", type=int, default=8, help="points of a curve")
    add("--data-seed", type=int, default=5, help="seed of the training text; the LLaMA was trained with 0 and 1")
    add("--smoke", action="store_true", help="few tokens, two starts, one seed")
    args = parser.parse_args(argv)
    given = (rate.rsplit("=", 1) for rate in args.rates)
    args.learning_rates = RATES | {start: float(rate) for start, rate in given}
    args.recall_rows = RECALL_ROWS
    args.text = SIZES["tiny"].text
    if args.smoke:
        args.starts = ["copy", "blend"]
        args.seeds = []
        args.tokens = 8192
        args.lambda_tokens = 4096
        args.held_out_tokens = 2048
        args.evaluations = 2
        args.recall_rows = 2
        args.text = "smoke"
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    with one_line_errors(__file__), output_folder(args, ["healing.json", "healing.png"], [args.model]) as output:
        args.work = args.work or args.output / "work"
        results = {"command": typed_command(__file__, argv), "environment": environment("cpu")} | compare(args)
        (output / "healing.json").write_text(json.dumps(results, indent=1) + "\n")
        plot(results["starts"], results["llama"]["loss"], output / "healing.png")


def compare(args):
    """Heals from every start, and with every path of lambda and seed; returns what was measured."""
    torch.manual_seed(0)
    comparison = Comparison(args)
    llama = comparison.look(comparison.llama)
    print(f"LLaMA: loss {llama['loss']:.3f}, agreement with itself {comparison.own:.1%}", flush=True)
    starts = [comparison.heal(start) for start in args.starts]
    lambdas = [
        comparison.heal("calibrated", mode, seed, args.lambda_tokens, **LAMBDA_STUDY)
        for seed in args.seeds
        for mode in LAMBDA_MODES
    ]
    return {"llama": llama, "self_agreement": comparison.own, "starts": starts, "lambdas": lambdas}


if __name__ == "__main__":
    main()
