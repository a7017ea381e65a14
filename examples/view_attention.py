"""
Look at attention: one model, or two side by side, as a page that needs no server, and as PNG and SVG.

    python examples/view_attention.py
    python examples/view_attention.py examples/assets/tiny-llama out/quickstart/v1-fitted --output out/attention
    python examples/view_attention.py meta-llama/Llama-3.2-1B --text-file prompt.txt --mark "4821" --layers 0 7 15

Without a checkpoint it takes the small trained LLaMA in examples/assets/tiny-llama. Writes attention.html (open it
from disk), and each figure as .png and .svg: the mean over all chosen heads and layers, all heads of the middle layer,
and for a differential model both maps and the difference of one head. `--smoke`: a short text and two layers.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import modeling_diff  # noqa: F401  registers the models with the auto classes
from modeling_diff.analysis.aggregate import mean_maps
from modeling_diff.analysis.figures import heads_figure, map_figure, pair_figure, save_figure
from modeling_diff.analysis.maps import attention_layers, collect_maps
from modeling_diff.analysis.tokens import encode_text, token_labels, token_span
from modeling_diff.analysis.view_html import MAX_TOKENS, AttentionView, view_attention, write_html


ASSETS = Path(__file__).parent / "assets" / "tiny-llama"
TEXT = (
    "\nThe magic number of Oslo is 4821.\n"
    "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n"
    "    return total / len(values)\n\nThe magic number of Lima is 1093.\n"
    "\nThe magic number of Oslo is 48"
)


def load(checkpoint: str):
    """A model and its tokenizer; ValueError where the checkpoint has none."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    try:
        return model, AutoTokenizer.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        raise ValueError(f"{checkpoint}: no tokenizer can be loaded from there, and a text needs one.") from error


def marked(views: list[AttentionView], tokenizer, text: str, phrase: str | None) -> tuple[int, int] | None:
    """First and last shown token of the phrase's first occurrence."""
    if phrase is None:
        return None
    if phrase not in text:
        raise ValueError(f"--mark {phrase!r}: does not occur in the text.")
    first, last = token_span(tokenizer, text, (text.index(phrase), text.index(phrase) + len(phrase)))
    return first - views[0].start, last - 1 - views[0].start


def write_figures(model, ids: torch.Tensor, labels: list[str], name: str, choices: dict, folder: Path) -> torch.Tensor:
    """One model's figures; returns the mean over heads and layers (T, T)."""
    layers = attention_layers(model)
    middle = layers[(choices["layers"] or range(len(layers)))[len(choices["layers"] or layers) // 2]]
    (maps,) = collect_maps(model, ids, layers=[middle.index], heads=choices["heads"])
    figures = {"heads": heads_figure(maps)}
    if middle.is_differential:
        figures["maps"] = pair_figure(maps, maps.heads[0].item(), labels)
    for kind, figure in figures.items():
        for suffix in ("png", "svg"):
            print(save_figure(figure, folder / f"{kind}_{name}.{suffix}"))
    return mean_maps(model, ids, **choices)[0]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", default=[str(ASSETS)], help="one or two folders or Hub ids")
    parser.add_argument("--text", default=TEXT, help="what is read; a text with a fact in it by default")
    parser.add_argument("--text-file", type=Path, help="the same, from a file")
    parser.add_argument("--mark", help="a phrase of the text whose share of attention is shown")
    parser.add_argument("--layers", type=int, nargs="+", help="all by default")
    parser.add_argument("--heads", type=int, nargs="+", help="the same ones of every layer, all by default")
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS, help="how many a page shows, the last ones")
    parser.add_argument("--output", type=Path, default=Path("out/attention"), help="folder")
    parser.add_argument("--smoke", action="store_true", help="a short text and two layers")
    arguments = parser.parse_args(argv)
    logging.disable_progress_bar()
    text = arguments.text_file.read_text(encoding="utf-8") if arguments.text_file else arguments.text
    choices = {"layers": arguments.layers, "heads": arguments.heads}
    if arguments.smoke:
        text, choices["layers"] = text[:60], [0, 2]
    if len(arguments.checkpoints) > 2:
        parser.error("give one checkpoint, or two to be shown side by side")
    names = [Path(checkpoint).name for checkpoint in arguments.checkpoints]
    names = names if len(set(names)) == len(names) else [f"{i + 1} {name}" for i, name in enumerate(names)]
    views, means = [], {}
    try:
        for name, checkpoint in zip(names, arguments.checkpoints, strict=True):
            model, tokenizer = load(checkpoint)
            ids = encode_text(tokenizer, text)
            labels = token_labels(tokenizer, ids[0].tolist())
            views.append(view_attention(model, ids, labels, name, max_tokens=arguments.max_tokens, **choices))
            means[name] = write_figures(model, ids, labels, name.replace(" ", "_"), choices, arguments.output)
        mark = marked(views, tokenizer, text, arguments.mark)
        page = write_html(views, arguments.output / "attention.html", f"Attention of {' and '.join(names)}", mark)
    except ValueError as error:
        parser.error(str(error))
    for suffix in ("png", "svg"):
        print(save_figure(map_figure(means, labels), arguments.output / f"mean.{suffix}"))
    print(page)


if __name__ == "__main__":
    main()
