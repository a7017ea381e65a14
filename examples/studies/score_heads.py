"""
What each head of a model does: retrieval, induction, previous token, first token, entropy; and what it is worth.

    python examples/studies/score_heads.py
    python examples/studies/score_heads.py --model examples/assets/tiny-llama --converted out/quickstart/v1 --ablate 4
    python examples/studies/score_heads.py --model out/quickstart/v1 --output out/heads-v1

Prints the heads that retrieve most and writes every score to scores.json and scores.png. `--converted` shows which of
a LLaMA's heads a V1 conversion paired; `--ablate N` takes out the N heads that score highest in retrieval, and N
others, one by one and together, and prints the change in loss and in recall. `--smoke`: few prompts, seconds.

Texts and needles are from the Python standard library on this machine; questions ("The magic number of Oslo is") suit
the small LLaMA of this repository, and any model that copies.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

import modeling_diff  # noqa: F401  registers the models with the auto classes
from modeling_diff.analysis.ablation import ablation_effects
from modeling_diff.analysis.head_pairs import pair_table, paired_scores, read_conversion
from modeling_diff.analysis.head_scores import (
    SCORES,
    HeadScore,
    RetrievalPrompt,
    greedy,
    needle_retrieval,
    score_heads,
)
from modeling_diff.analysis.needle_runs import check_context
from modeling_diff.analysis.needles import NeedleTask, library_text, make_prompts
from modeling_diff.analysis.score_tables import score_grid, score_table, write_scores
from modeling_diff.experiments.command_line import one_line_errors, script_parser
from modeling_diff.experiments.loading import load_tokenizer
from modeling_diff.experiments.output_files import add_output, output_folder


try:
    from modeling_diff.analysis.figures import save_figure, score_figure
except ImportError as error:
    sys.exit(f"score_heads: {error}")


ASSETS = Path(__file__).parents[1] / "assets" / "tiny-llama"


def plain_texts(tokenizer, filler: str, rows: int, length: int) -> torch.Tensor:
    """`rows` evenly spaced stretches of the filler, each behind a bos where the tokenizer has one: (rows, length)."""
    ids = tokenizer(filler[: 40 * rows * length], add_special_tokens=False, verbose=False).input_ids
    head = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    room = length - len(head)
    step = len(ids) // rows
    return torch.tensor([head + ids[row * step : row * step + room] for row in range(rows)])


def recall(model, prompts: list[RetrievalPrompt]) -> float:
    """Share of needles said again, every token right."""
    right = 0
    for prompt in prompts:
        first, last = prompt.needle
        ids = torch.tensor([prompt.input_ids], device=model.device)
        said = greedy(model, ids, last - first)[0, ids.shape[1] :].tolist()
        right += said == prompt.input_ids[first:last]
    return right / len(prompts)


def retrieval_order(scores: list[HeadScore]) -> list[tuple[int, int]]:
    """(layer, head) by the retrieval of what weighs the values, LLaMA's A or the difference, largest first."""
    own = [score for score in scores if score.map in ("attention", "difference")]
    return [(score.layer, score.head) for score in sorted(own, key=lambda score: -score.retrieval)]


def show_ablation(console: Console, model, texts: torch.Tensor, prompts, scores, count: int) -> list[dict]:
    order = retrieval_order(scores)
    retrieving = order[:count]
    others = order[len(order) // 2 : len(order) // 2 + count]
    groups = [[head] for head in (*retrieving, *others)] + [retrieving, others]
    effects = ablation_effects(model, texts, groups, mode="mean", recall=lambda model: recall(model, prompts))
    console.print(f"Without heads (their mean output instead); recall with all of them {recall(model, prompts):.2f}")
    for effect in effects:
        heads = ", ".join(f"{layer}.{head}" for layer, head in effect.heads)
        console.print(
            f"  {heads}: loss {effect.loss_change_nats:+.3f} nats, recall {effect.recall_change:+.2f}", highlight=False
        )
    return [asdict(effect) for effect in effects]


def write_plot(scores: list[HeadScore], name: str, path: Path) -> None:
    kind = "difference" if any(score.map == "difference" for score in scores) else "attention"
    grids = {score.replace("_", " "): score_grid(scores, score, kind) for score in SCORES}
    save_figure(score_figure(grids, f"{name}: {kind}"), path)


def load(arguments: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and its tokenizer; ValueError for what would go wrong with them after all the work."""
    if arguments.converted:
        read_conversion(arguments.converted)
    tokenizer = load_tokenizer(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    # A number of four digits and the space before it are five tokens at most.
    check_context(model, arguments.length + 5, f"--length={arguments.length} and a number said again")
    return model, tokenizer


def show_heads(arguments: argparse.Namespace, console: Console) -> None:
    """Scores, prints and writes all that is asked for."""
    model, tokenizer = load(arguments)
    filler = library_text()
    task = NeedleTask(arguments.length, needles=2)
    prompts = needle_retrieval(tokenizer, make_prompts(task, tokenizer, filler, arguments.prompts, arguments.seed))
    texts = plain_texts(tokenizer, filler, max(2, arguments.prompts // 2), arguments.length)
    vocabulary = [token for token in range(model.config.vocab_size) if token not in set(tokenizer.all_special_ids)]
    first = tokenizer.bos_token_id
    scores = score_heads(model, texts, prompts, vocabulary=vocabulary, first=first, seed=arguments.seed)
    console.print(score_table(scores, Path(arguments.model).name, "retrieval", arguments.rows))
    write_scores(scores, arguments.output / "scores.json")
    write_plot(scores, Path(arguments.model).name, arguments.output / "scores.png")
    if arguments.converted:
        console.print(pair_table(paired_scores(scores, arguments.converted), f"Paired in {arguments.converted.name}"))
    if arguments.ablate:
        effects = show_ablation(console, model, texts, prompts, scores, arguments.ablate)
        (arguments.output / "ablation.json").write_text(json.dumps(effects, indent=1) + "\n")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = script_parser(__file__, __doc__)
    add = parser.add_argument
    add("--model", default=str(ASSETS), help="folder or Hub id")
    add("--converted", type=Path, help="folder of a V1 conversion of it: show which heads were paired")
    add("--prompts", type=int, default=16, help="needles to retrieve")
    add("--length", type=int, default=256, help="tokens of a text and of a prompt")
    add("--ablate", type=int, default=0, help="number of heads to take out")
    add("--rows", type=int, default=12, help="rows of the printed table")
    add("--seed", type=int, default=0, help="seed of the needles")
    add_output(parser, "scores and plots", "heads")
    add("--smoke", action="store_true", help="two short prompts")
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        arguments.prompts = 2
        arguments.length = 96
        arguments.ablate = min(arguments.ablate, 1)
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    logging.disable_progress_bar()
    results = ["scores.json", "scores.png", "ablation.json"]
    inputs = [arguments.model, arguments.converted]
    with one_line_errors(__file__), output_folder(arguments, results, inputs) as arguments.output:
        show_heads(arguments, Console(width=120))


if __name__ == "__main__":
    main()
