"""
Shows attention: one model, or two side by side, as a page that needs no server, and as PNG and SVG.

    python examples/studies/view_attention.py
    python examples/studies/view_attention.py --model examples/assets/tiny-llama out/quickstart/v1 --mark 4821
    python examples/studies/view_attention.py --model meta-llama/Llama-3.2-1B --text-file prompt.txt --layers 0 7

Without --model it takes the small trained LLaMA in examples/assets/tiny-llama. Writes attention.html (open it from
disk), and the folder `figures` with PNG and SVG files: the mean over all chosen heads and layers, all heads of the
middle layer, and for a differential model both maps and the difference of one head.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.utils import logging

import modeling_diff  # noqa: F401  registers the models with the auto classes
from modeling_diff.analysis.aggregate import mean_maps
from modeling_diff.analysis.maps import attention_layers, collect_maps
from modeling_diff.analysis.tokens import encode_text, token_labels, token_span
from modeling_diff.analysis.view_html import MAX_TOKENS, view_attention, write_html
from modeling_diff.experiments.command_line import one_line_errors, script_parser
from modeling_diff.experiments.loading import load_tokenizer
from modeling_diff.experiments.output_files import add_output, output_folder


try:
    from modeling_diff.analysis.figures import heads_figure, map_figure, pair_figure, save_figure
except ImportError as error:
    sys.exit(f"view_attention: {error}")


ASSETS = Path(__file__).parents[1] / "assets" / "tiny-llama"
TEXT = (
    "\nThe magic number of Oslo is 4821.\n"
    "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n"
    "    return total / len(values)\n\nThe magic number of Lima is 1093.\n"
    "\nThe magic number of Oslo is 48"
)


def marked(tokenizer: PreTrainedTokenizerBase, text: str, phrase: str, start: int) -> tuple[int, int]:
    """First and last token of the phrase's first occurrence, counted from `start`, the first that is shown."""
    if phrase not in text:
        raise ValueError(f"--mark {phrase!r}: does not occur in the text.")
    first, last = token_span(tokenizer, text, (text.index(phrase), text.index(phrase) + len(phrase)))
    if first < start:
        raise ValueError(f"--mark {phrase!r}: stands before the tokens that are shown; raise --max-tokens.")
    return first - start, last - 1 - start


def write_figures(model, ids: torch.Tensor, labels: list[str], name: str, choices: dict, folder: Path) -> torch.Tensor:
    """One model's figures; returns the mean over heads and layers (T, T)."""
    layers = attention_layers(model)
    shown = choices["layers"] or range(len(layers))
    middle = layers[shown[len(shown) // 2]]
    (maps,) = collect_maps(model, ids, layers=[middle.index], heads=choices["heads"])
    figures = {"heads": heads_figure(maps)}
    if middle.is_differential:
        figures["maps"] = pair_figure(maps, maps.heads[0].item(), labels)
    folder.mkdir(exist_ok=True)
    for kind, figure in figures.items():
        for suffix in ("png", "svg"):
            print(save_figure(figure, folder / f"{kind}_{name}.{suffix}"))
    return mean_maps(model, ids, **choices)[0]


def show(arguments: argparse.Namespace, names: list[str], choices: dict) -> None:
    """Writes the page and every figure, after what can be checked without the models."""
    text = arguments.text_file.read_text(encoding="utf-8") if arguments.text_file else arguments.text
    text = text[:60] if arguments.smoke else text
    tokenizers = [load_tokenizer(checkpoint) for checkpoint in arguments.model]
    ids = [encode_text(tokenizer, text) for tokenizer in tokenizers]
    labels = [token_labels(tokenizer, row[0].tolist()) for tokenizer, row in zip(tokenizers, ids, strict=True)]
    same_tokens = all(words == labels[0] for words in labels)
    mark = None
    if arguments.mark is not None:
        if not same_tokens:
            raise ValueError(
                f"--mark {arguments.mark!r}: the two tokenizers cut the text differently; view one model."
            )
        mark = marked(tokenizers[0], text, arguments.mark, max(0, len(labels[0]) - arguments.max_tokens))
    figures = arguments.output / "figures"
    views = []
    means = {}
    for name, checkpoint, row, words in zip(names, arguments.model, ids, labels, strict=True):
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        views.append(view_attention(model, row, words, name, max_tokens=arguments.max_tokens, **choices))
        means[name] = write_figures(model, row, words, name.replace(" ", "_"), choices, figures)
    page = write_html(views, arguments.output / "attention.html", f"Attention of {' and '.join(names)}", mark)
    # Tokens are written out next to the means of two models only where they are the same.
    figure = map_figure(means, labels[0] if same_tokens else None)
    for suffix in ("png", "svg"):
        print(save_figure(figure, figures / f"mean.{suffix}"))
    print(page)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = script_parser(__file__, __doc__)
    add = parser.add_argument
    add("--model", nargs="+", default=[str(ASSETS)], help="one or two folders or Hub ids")
    add("--text", help="text to read (default: a few lines with a fact in them)")
    add("--text-file", type=Path, help="file of the text to read")
    add("--mark", help="phrase of the text whose share of attention is shown")
    add("--layers", type=int, nargs="+", help="layers to show (default: all)")
    add("--heads", type=int, nargs="+", help="heads to show, the same ones in every layer (default: all)")
    add("--max-tokens", type=int, default=MAX_TOKENS, help="number of tokens on the page, the last ones")
    add_output(parser, "the page and the figures", "attention")
    add("--smoke", action="store_true", help="a short text and two layers")
    arguments = parser.parse_args(argv)
    arguments.text = TEXT if arguments.text is None else arguments.text
    if arguments.smoke:
        arguments.layers = [0, 2]
    if len(arguments.model) > 2:
        parser.error("--model: give one checkpoint, or two to be shown side by side")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    logging.disable_progress_bar()
    choices = {"layers": arguments.layers, "heads": arguments.heads}
    names = [Path(checkpoint).name for checkpoint in arguments.model]
    names = names if len(set(names)) == len(names) else [f"{i + 1} {name}" for i, name in enumerate(names)]
    results = ["attention.html", "figures"]
    with one_line_errors(__file__), output_folder(arguments, results, arguments.model) as arguments.output:
        show(arguments, names, choices)


if __name__ == "__main__":
    main()
