"""Trains a small LLaMA of our own on text every machine has, so that conversions can be measured without a download.

The text is Python source (the standard library's, for `--size large` the installed packages' as well) with a share of
synthetic key-value recall, so that retrieval exists to be measured. The committed model came from two runs,
at the root (the first with fewer kinds of recall text than there are now: see its training_record.json):

    python examples/studies/train_tiny_llama.py --output out/tiny-llama-1 --minutes 40 --compile on
    python examples/studies/train_tiny_llama.py --output out/tiny-llama --init out/tiny-llama-1 --minutes 17 \\
        --recall-share 0.5 --learning-rate 1.5e-3 --seed 1 --compile on

A sister with as many KV heads as query heads, a larger model on a GPU, and a check that everything runs:

    python examples/studies/train_tiny_llama.py --output out/tiny-llama-mha --kv-heads 8
    python examples/studies/train_tiny_llama.py --output out/large-llama --size large --compile on
    python examples/studies/train_tiny_llama.py --smoke

Weights are float32; products are bfloat16 where this machine is faster with it, which the record says.

Size legend: B rows per batch, T tokens per row (the context), N tokens of a stream.
"""

import argparse
import datetime
import json
import math
import platform
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import tokenizers
import torch
import transformers
from tiny_llama_text import Recall, calibration_text, encode, held_out_windows, prepare_text, training_rows
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from conversion.calibration.speed import faster_in_bfloat16
from conversion.calibration.streams import fast_precision
from modeling_diff.experiments.command_line import add_device, one_line_errors, script_parser, typed_command
from modeling_diff.experiments.output_files import add_output, output_folder


@dataclass(frozen=True)
class Size:
    """Shape, text and default length of one training run."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    vocab_size: int
    context: int
    batch: int
    steps: int
    learning_rate: float
    text: str


TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
TEXTS = ("heldout.txt", "calibration.txt", "training_record.json", "README.md")
RESULTS = ("config.json", "generation_config.json", "model.safetensors", *TOKENIZER, *TEXTS)
SIZES = {
    "tiny": Size(256, 576, 5, 8, 4, 2048, 512, 8, 4000, 2e-3, "stdlib"),
    "large": Size(768, 2048, 14, 12, 4, 16384, 1024, 128, 3000, 1e-3, "stdlib+packages"),
    "smoke": Size(64, 128, 2, 4, 2, 512, 128, 8, 40, 5e-3, "smoke"),
}


@torch.no_grad()
def mean_loss(model, rows):
    """Mean loss in nats a token over rows (B, T), in fp32."""
    model.eval()
    losses = [model(input_ids=part, labels=part).loss.item() * len(part) for part in rows.to(model.device).split(8)]
    model.train()
    return sum(losses) / len(rows)


@torch.no_grad()
def recall_accuracy(model, rows):
    """Share of answers of [(ids, spans)] whose every token is the greedy one.

    An answer all of whose tokens are greedy given the true tokens before is what greedy decoding would have written.
    """
    model.eval()
    right = []
    for row, spans in rows:
        ids = torch.tensor([row], device=model.device)
        guesses = model(input_ids=ids).logits[0].argmax(-1)
        right += [bool((guesses[start - 1 : end - 1] == ids[0, start:end]).all()) for start, end in spans]
    model.train()
    return sum(right) / len(right)


def measure_recall(model, recall, context, rows):
    """Accuracy and loss on keys and numbers never trained on, in text never trained on."""
    sets = {"1_needle": [recall.needle_row(1) for _ in range(rows)]}
    if context >= 512:
        sets["4_needles"] = [recall.needle_row(4) for _ in range(rows)]
    sets["dense_8_pairs"] = [recall.dense_row(8) for _ in range(rows)]
    texts = torch.tensor([row for part in sets.values() for row, _ in part])
    accuracy = {name: recall_accuracy(model, part) for name, part in sets.items()}
    return {"recall_accuracy": accuracy, "recall_loss": mean_loss(model, texts)}


def build_model(size, tokenizer):
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.hidden_size // size.heads,
        max_position_embeddings=size.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def load_model(folder, size):
    """The model of an earlier run in fp32, and that run's own record without its text, for the record of this one."""
    earlier = json.loads((folder / "training_record.json").read_text(encoding="utf-8"))
    shape = ("hidden_size", "intermediate_size", "layers", "heads", "kv_heads", "vocab_size", "context")
    different = [name for name in shape if earlier["size"][name] != getattr(size, name)]
    if different:
        raise SystemExit(
            f"--init {folder} is of another size ({', '.join(different)}): give the options it was made with"
        )
    del earlier["text"]
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32), earlier


def build_optimizer(model, learning_rate):
    """AdamW; norms are not decayed."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)


def learning_rate_factor(done):
    """Linear warm-up over the first 4 %, then a cosine to a twentieth; `done` in [0, 1] is the share of the run."""
    if done < 0.04:
        return max(done, 0.0004) / 0.04
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (done - 0.04) / 0.96))


def train(model, batches, measure, size, args):
    """Train until `args.minutes` are over or, without them, for `size.steps`. Returns steps and the loss curve.

    measure() -> dict of held-out numbers, taken 25 times; the train loss beside it is the mean since the one before.
    """
    optimizer = build_optimizer(model, size.learning_rate)
    forward = torch.compile(model, dynamic=False) if args.compile == "on" else model
    curve = []
    recent = []
    step = 0
    began = None
    while True:
        # With a time budget the schedule follows the clock; the first step, which compiles, is not counted.
        elapsed = time.monotonic() - began if began else 0.0
        done = elapsed / (60 * args.minutes) if args.minutes else step / size.steps
        if done >= min(len(curve) / 25, 1):
            curve.append({"step": step, "train": sum(recent) / len(recent) if recent else None, **measure()})
            report(done, elapsed, curve[-1])
            recent = []
        if done >= 1:
            return step, curve
        for group in optimizer.param_groups:
            group["lr"] = size.learning_rate * learning_rate_factor(done)
        recent.append(train_step(model, forward, optimizer, next(batches).to(model.device)))
        if not math.isfinite(recent[-1]):
            raise SystemExit(
                f"the loss became {recent[-1]} at step {step}: lower --learning-rate (was {size.learning_rate})"
            )
        step = step + 1
        began = began or time.monotonic()


def train_step(model, forward, optimizer, batch):
    """One step on batch (B, T); returns its loss in nats a token."""
    with fast_precision(batch.device):
        loss = forward(input_ids=batch, labels=batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def report(done, elapsed, numbers):
    left = f"{elapsed * (1 - done) / done / 60:5.1f} min left" if done else ""
    words = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items() if value is not None)
    print(f"{100 * min(done, 1):5.1f} %  {words}  {left}", flush=True)


README = """\
---
license: apache-2.0
language: [code]
---
# A small LLaMA to convert

A plain `LlamaForCausalLM` ({parameters:,} parameters, {layers} layers, {heads} query heads over {kv_heads} KV heads,
tied embeddings, context {context}) with a byte-level BPE tokenizer of {vocab_size:,} tokens. It exists so that
conversions can be measured on a model that has learnt something: Python source, and recall of facts stated earlier in
the context ("The magic number of Oslo is 4821."). It is of no use for anything else.

Trained on {source} with a share of synthetic recall text:

{runs}

Held-out loss {loss:.3f} nats a token on `heldout.txt`. Recall of keys and numbers never seen in training, all digits
right: {recall}. `training_record.json` has the loss curve and everything else.

- `heldout.txt`: heads of library files that were not trained on. Its loss is over windows of bos and {window} tokens.
- `calibration.txt`: heads of library files that were trained on, with recall text between them.

The weights and the tokenizer are licensed under Apache-2.0. `heldout.txt` and `calibration.txt` quote the Python
standard library: Copyright (c) 2001-2023 Python Software Foundation and others, all rights reserved, under the PSF
License Agreement (https://docs.python.org/3/license.html). They were shortened to the first lines of each file.
"""


def describe_hardware(device):
    """In words: a processor's kind, never a machine's name."""
    if device.startswith("cuda"):
        return f"one {torch.cuda.get_device_name(device)}"
    return f"CPU ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"


def to_json(record):
    """Indented; floats to four decimals, a point of a curve a line."""
    record = json.loads(json.dumps(record), parse_float=lambda number: round(float(number), 4))
    text = json.dumps(record, indent=1)
    return re.sub(r'\{\s+("step":[^{}]*?)\s+\}', lambda point: f"{{{' '.join(point[1].split())}}}", text) + "\n"


def readme_text(record):
    final, size = record["final"], record["size"]
    runs = [run for run in (record["started_from"], record) if run]
    lines = [f"- `{run['command']}`: {run['steps']:,} steps, {run['tokens_seen']:,} tokens" for run in runs]
    recall = ", ".join(f"{value:.1%} ({name.replace('_', ' ')})" for name, value in final["recall_accuracy"].items())
    return README.format(
        **size,
        parameters=record["parameters"],
        window=size["context"] - 1,
        source=record["text"]["source"],
        runs="\n".join(lines),
        loss=final["heldout_loss"],
        recall=recall,
    )


def write_output(folder, model, tokenizer, texts, record):
    """Writes weights in bfloat16, tokenizer, texts {file name: text}, record and README."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    texts = texts | {"training_record.json": to_json(record), "README.md": readme_text(record)}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Size]:
    parser = script_parser(__file__, __doc__)
    add = parser.add_argument
    add_output(parser, "the model, its texts and record", "train_tiny_llama")
    add("--size", choices=["tiny", "large"], default="tiny", help="shape, text and length of the run")
    add("--smoke", action="store_true", help="a toy of a model in seconds, instead of --size")
    add("--kv-heads", type=int, help="key-value heads; as many as query heads is MHA (default: the size's, GQA)")
    add("--layers", type=int, help="number of layers (default: the size's)")
    add("--init", type=Path, help="folder of an earlier run of the same size to continue from")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--max-steps", type=int, help="optimizer steps; the same seed gives the same run")
    length.add_argument("--minutes", type=float, help="train this long instead; the schedule follows the clock")
    add("--per-device-train-batch-size", type=int, help="rows per step (default: the size's)")
    add("--learning-rate", type=float, help="peak learning rate (default: the size's)")
    add("--recall-share", type=float, default=0.375, help="share of recall rows in a batch (0 to 0.9)")
    add("--compile", choices=["on", "off"], default="off", help="torch.compile; needs a C++ compiler")
    add_device(parser)
    add("--seed", type=int, default=0, help="seed of the weights and of the order of the text")
    args = parser.parse_args(argv)
    size = SIZES["smoke" if args.smoke else args.size]
    given = {"kv_heads": args.kv_heads, "layers": args.layers, "steps": args.max_steps}
    given["learning_rate"] = args.learning_rate
    given["batch"] = args.per_device_train_batch_size
    size = replace(size, **{name: value for name, value in given.items() if value is not None})
    if size.kv_heads < 1 or size.heads % size.kv_heads:
        parser.error(f"--kv-heads {size.kv_heads} must divide the {size.heads} query heads")
    if not 0 <= args.recall_share <= 0.9:
        parser.error(f"--recall-share {args.recall_share} must lie between 0 and 0.9")
    minutes = 1 if args.minutes is None else args.minutes
    if min(size.layers, size.batch, size.steps, size.learning_rate, minutes) <= 0:
        positive = "--layers, --per-device-train-batch-size, --max-steps, --minutes and --learning-rate"
        parser.error(f"{positive} must be positive")
    args.command = typed_command(__file__, argv)
    return args, size


def main(argv: Sequence[str] | None = None) -> None:
    args, size = parse(argv)
    with one_line_errors(__file__), output_folder(args, RESULTS, [args.init]) as output:
        run(args, size, output)


def run(args, size, output):
    """Prepares the text, trains, measures and writes."""
    started = time.monotonic()
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.init) if args.init else None
    tokenizer, stream, parts, text_numbers = prepare_text(size, args.seed, tokenizer)
    held_out = "\n".join(text for _, text in parts["heldout"])
    windows = held_out_windows(tokenizer, held_out, size.context)
    recall = Recall(tokenizer, stream, size.context, args.seed, held_out=False)
    unseen = Recall(tokenizer, windows[:, 1:].flatten(), size.context, args.seed, held_out=True)
    probes = [unseen.needle_row(1) for _ in range(32)]
    model, earlier = load_model(args.init, size) if args.init else (build_model(size, tokenizer), None)
    model.to(args.device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{text_numbers['train_files']} files, {len(stream):,} tokens; {parameters:,} parameters", flush=True)

    def measure():
        return {"heldout": mean_loss(model, windows[:48]), "needle_accuracy": recall_accuracy(model, probes)}

    train_began = time.monotonic()
    batches = training_rows(size, stream, recall, args.recall_share, args.seed)
    steps, curve = train(model, batches, measure, size, args)
    train_seconds = round(time.monotonic() - train_began)
    model.to(torch.bfloat16).float()  # what is saved is what is measured
    final = measure_recall(model, unseen, size.context, 8 if args.smoke else 100)
    final["heldout_loss"] = mean_loss(model, windows)
    final["heldout_bytes_per_token"] = len(held_out.encode()) / len(encode(tokenizer, [held_out])[0])
    record = {
        "command": args.command,
        "date": datetime.date.today().isoformat(),
        "versions": {"python": platform.python_version()}
        | {package.__name__: package.__version__ for package in (torch, transformers, tokenizers)},
        "hardware": describe_hardware(args.device),
        "products": "bfloat16" if faster_in_bfloat16(torch.device(args.device).type) else "float32",
        "seed": args.seed,
        "size": asdict(size),
        "parameters": parameters,
        "text": text_numbers | {"recall_share": args.recall_share},
        "steps": steps,
        "tokens_seen": steps * size.batch * size.context,
        "train_seconds": train_seconds,
        "wall_seconds": round(time.monotonic() - started),
        "loss_unit": "nats a token",
        "started_from": earlier,
        "final": final,
        "curve": curve,
    }
    calibration = calibration_text(parts["calibration"], tokenizer, recall)
    write_output(output, model, tokenizer, {"heldout.txt": held_out, "calibration.txt": calibration}, record)
    print(json.dumps(final, indent=1))


if __name__ == "__main__":
    main()
