"""What each stage of a parity conversion (LLaMA -> V1) is worth, before any training of the whole model.

Converts a LLaMA with one stage more in every row and measures each result on held-out text, next to the plain permuted
copy that `convert` writes without calibration. `closed` is the share of that copy's gap in loss to LLaMA that is gone;
recall is of keys and numbers never seen in training, all digits right: one needle in 512 tokens, and 8 dense pairs.

    python examples/studies/compare_conversions.py              # the embedded model, about 15 minutes on two cores
    python examples/studies/compare_conversions.py --model out/tiny-llama-mha --output out/mha
    python examples/studies/compare_conversions.py --smoke      # a toy of a model that it makes itself, seconds

R rows, T tokens a row, V vocabulary.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tiny_llama_text import Recall
from train_tiny_llama import recall_accuracy
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from conversion.calibration.calibrate import Stage, calibrate
from conversion.calibration.gradient_fit import LocalFit
from conversion.calibration.model import calibrated_model
from conversion.convert import convert_checkpoint
from conversion.data.text import read_calibration
from conversion.evaluation.metrics import text_metrics
from modeling_diff import DiffLlamaForCausalLM
from modeling_diff.experiments.command_line import add_device, one_line_errors, script_parser, typed_command
from modeling_diff.experiments.output_files import add_output, output_folder


EMBEDDED = Path(__file__).parents[1] / "assets" / "tiny-llama"
LADDER = {
    "copy, norm and lambda calibrated": (Stage.COPY,),
    "+ pairing": (Stage.COPY, Stage.PAIRING),
    "+ refit": (Stage.COPY, Stage.PAIRING, Stage.REFIT),
    "+ values": (Stage.COPY, Stage.PAIRING, Stage.REFIT, Stage.VALUES),
    "+ local": tuple(Stage),
}
COLUMNS = ("conversion", "loss", "closed", "kl_nats", "agreement", "needle", "dense", "seconds", "lambda")
SHARES = ("closed", "agreement", "needle", "dense")
RECALL_ROWS = 100


def held_out_rows(folder, tokenizer, context, max_tokens):
    """heldout.txt cut into windows of context - 1 tokens, each behind a bos: (R, T)."""
    ids = torch.tensor(tokenizer.encode((folder / "heldout.txt").read_text(), add_special_tokens=False)[:max_tokens])
    ids = ids[: len(ids) // (context - 1) * (context - 1)].view(-1, context - 1)
    return torch.cat([torch.full((len(ids), 1), tokenizer.bos_token_id), ids], dim=1)


@torch.no_grad()
def measure(model, llama, rows):
    """Loss, KL from LLaMA (nats/token) and share of equal greedy tokens over rows (R, T)."""
    totals = torch.zeros(3, dtype=torch.float64)
    for part in rows.to(model.device).split(8):
        found = text_metrics(model(input_ids=part).logits, part.split(1), llama(input_ids=part).logits)
        numbers = (found.loss_nats, found.kl_nats, found.greedy_agreement)
        totals += len(part) * torch.tensor(numbers, dtype=torch.float64)
    return dict(zip(("loss", "kl_nats", "agreement"), (totals / len(rows)).tolist(), strict=True))


def recall_rows(folder, tokenizer, context):
    """Rows of each kind of recall, the same for every model; none where a needle does not fit."""
    if context < 512:
        return {}
    filler = held_out_rows(folder, tokenizer, context, None)[:, 1:].flatten()
    recall = Recall(tokenizer, filler, context, 0, held_out=True)
    return {
        "needle": [recall.needle_row(1) for _ in range(RECALL_ROWS)],
        "dense": [recall.dense_row(8) for _ in range(RECALL_ROWS)],
    }


def lambdas(model):
    return [layer.self_attn.diff_lambda().item() for layer in model.model.layers]


def plain_copy(folder, lambda_init):
    with tempfile.TemporaryDirectory() as target:
        convert_checkpoint(
            folder, Path(target) / "v1", "v1", uncalibrated=True, lambda_init=lambda_init, measure=False
        )
        return DiffLlamaForCausalLM.from_pretrained(Path(target) / "v1", dtype=torch.float32)


def conversions(folder, llama, tokens, args):
    """(name, model, seconds) of every row of the table."""
    for lambda_init in ("paper", 0.05):
        began = time.monotonic()
        yield f"plain copy, lambda {lambda_init}", plain_copy(folder, lambda_init), time.monotonic() - began
    for name, stages in LADDER.items():
        began = time.monotonic()
        result = calibrate(
            folder,
            llama.config,
            tokens,
            stages=stages,
            norm=args.norm,
            device=args.device,
            seed=args.seed,
            local=LocalFit(steps=args.local_steps),
            progress=show if sys.stderr.isatty() else lambda *seen: None,
        )
        yield name, calibrated_model(llama, result), time.monotonic() - began


def show(layer, num_layers, stage, done):
    print(f"\rlayer {layer + 1}/{num_layers} {stage} {done:4.0%}   ", end="", file=sys.stderr, flush=True)


def compare(folder, args):
    """The rows of the table as dictionaries, LLaMA first."""
    llama = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).to(args.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=10**9)
    context = llama.config.max_position_embeddings
    tokens = read_calibration(
        folder / "calibration.txt", tokenizer, args.calibration_tokens, context, llama.config.vocab_size
    )
    rows = held_out_rows(folder, tokenizer, context, args.held_out_tokens)
    asked = recall_rows(folder, tokenizer, context)

    def look(model):
        return measure(model, llama, rows) | {kind: recall_accuracy(model, of_kind) for kind, of_kind in asked.items()}

    original = look(llama)
    table = [{"conversion": "LLaMA", **original, "closed": 1.0, "seconds": 0.0, "lambda": []}]
    print_row({column: column for column in COLUMNS})
    print_row(table[0])
    for name, model, seconds in conversions(folder, llama, tokens, args):
        row = {"conversion": name, **look(model.to(args.device)), "seconds": seconds}
        copied = table[1]["loss"] if len(table) > 1 else row["loss"]
        row |= {"closed": (copied - row["loss"]) / (copied - original["loss"]), "lambda": lambdas(model)}
        table.append(row)
        print_row(row)
    return table


def print_row(row):
    cells = []
    for column in COLUMNS:
        value = row.get(column, "-")
        if isinstance(value, list):
            value = " ".join(f"{number:.3f}" for number in value)
        elif isinstance(value, float):
            value = f"{value:.1%}" if column in SHARES else f"{value:.4g}"
        cells.append(f"{value:<34}" if column == "conversion" else f" {value:>9}")
    print("".join(cells), flush=True)


def make_toy(folder):
    """Writes a LLaMA of random weights, a tokenizer and texts: shows that everything runs, and no more."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(["<s>", *alphabet])}, merges=[]))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=letters, bos_token="<s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(alphabet) + 1,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    text = Path(__file__).read_text()
    (folder / "calibration.txt").write_text(text[:4000])
    (folder / "heldout.txt").write_text(text[4000:6000])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = script_parser(__file__, __doc__)
    add = parser.add_argument
    add("--model", type=Path, default=EMBEDDED, help="folder of a LLaMA with calibration.txt and heldout.txt")
    add("--calibration-tokens", type=int, default=65_536, help="number of calibration tokens to read")
    add("--held-out-tokens", type=int, default=65_536, help="number of held-out tokens to measure on")
    add("--local-steps", type=int, default=LocalFit().steps, help="steps per layer of the layer-local fitting")
    add("--norm", choices=["strict", "neutral"], default="strict", help="the paper's norm, or one that scales by 1")
    add_device(parser)
    add("--seed", type=int, default=0, help="seed of the calibration")
    add_output(parser, "conversions.json, the table")
    add("--smoke", action="store_true", help="a toy of a model, few tokens, few steps")
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        arguments.calibration_tokens = 1024
        arguments.held_out_tokens = 1024
        arguments.local_steps = 5
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    results = ["conversions.json"]
    with one_line_errors(__file__), output_folder(arguments, results, [arguments.model]) as output:
        with tempfile.TemporaryDirectory() as toy:
            if arguments.smoke:
                make_toy(Path(toy))
            table = compare(Path(toy) if arguments.smoke else arguments.model, arguments)
        record = {"command": typed_command(__file__, argv), "rows": table}
        (output / "conversions.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
