"""The report: the numbers of report_measurements.py, section by section, as one HTML page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .needle_runs import PUBLISHED_ACCURACY, PUBLISHED_ATTENTION
from .report_figures import (
    LIGHT,
    attention_by_depth,
    attention_profiles,
    head_dots,
    needle_heat_maps,
    order_bands,
    quantized_lines,
)
from .report_page import figure, page, paragraph, table


VIEW_NAMES = {
    "positive": "A1",
    "negative": "A2",
    "clamped": "max(A1 - λ A2, 0)",
    "absolute": "abs(A1 - λ A2)",
    "signed": "A1 - λ A2",
}
MAP_NAMES = {"attention": "A", "positive": "A1", "negative": "A2", "difference": "A1 - λ A2"}
# Names in numbers that were saved before they were spelled as in the rest of the code.
OLD_NAMES = {
    "first": "positive",
    "second": "negative",
    "quantized": "quantized",
    "quantized_prompts": "quantized_prompts",
}


def current_names(data: Any) -> Any:
    """
    Renames what saved numbers of a report call by an older name.

    Args:
        data: A report's numbers, or any part of them.

    Returns:
        The same under today's names.
    """
    if isinstance(data, list):
        return [current_names(part) for part in data]
    if not isinstance(data, dict):
        return data
    named = {OLD_NAMES.get(name, name): current_names(part) for name, part in data.items()}
    if "view" in named:
        named["view"] = OLD_NAMES.get(named["view"], named["view"])
    return named


def save_figures(models: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """
    Draws the report's plots as PNG files in light colors.

    Args:
        models: Numbers of each model, as `render` takes them.
        folder: The folder to write to; it is created if missing.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    models = current_names(list(models))
    paths = []
    for draw in (needle_heat_maps, attention_by_depth, attention_profiles, head_dots, quantized_lines, order_bands):
        paths.append(folder / f"{draw.__name__}.png")
        draw(models, LIGHT).savefig(paths[-1], dpi=144)
    return paths


def unquantized(model: dict[str, Any]) -> dict[str, Any]:
    """Returns a model's loss and accuracy without quantized attention logits."""
    return next(row for row in model["quantized"] if row["bits"] is None)


def models_section(data: dict[str, Any]) -> str:
    """Renders what the models are and what they were measured with."""
    rows = []
    for model in data["models"]:
        shape = f"{model['layers']} x {model['heads_per_layer']}"
        loss = f"{unquantized(model)['loss']:.3f}"
        seconds = f"{model['seconds']:.0f} s"
        rows.append((model["label"], model["kind"], f"{model['parameters']:,}", shape, loss, seconds))
    header = ("model", "kind", "parameters", "layers x heads", "loss (nats/token)", "measured in")
    machine = data["environment"]
    words = (
        f"{machine['date']}, {machine['machine']}, {machine['threads']} thread(s), torch {machine['torch']}, "
        f"transformers {machine['transformers']}, commit {machine['commit']}, {data['dtype']}, "
        f"seed {data['effort']['seed']}."
    )
    return table(header, rows) + paragraph(words, "note")


def limits_section(data: dict[str, Any]) -> str:
    """Renders what the numbers can and cannot show."""
    effort = data["effort"]
    largest = max(model["parameters"] for model in data["models"]) / 1e6
    prompts = effort["samples"] * len(effort["lengths_tokens"]) * len(effort["depths"])
    return paragraph(
        f"Every model gets the same prompts, drawn with one seed; the largest has {largest:,.1f} million parameters. "
        f"An accuracy over all depths and lengths comes from {prompts} prompts for each (N, R), so that differences "
        f"below about {2 * (0.5 / prompts) ** 0.5:.0%} (two standard errors of a difference, at one half) say "
        f"nothing; a cell of a heat map has {effort['samples']} prompts. Models that differ in how they were made "
        "differ in more than their attention: only twins trained alike on the same text compare architectures, and "
        "one pair is one draw. A converted model shows what the conversion kept, not what differential attention is "
        "worth."
    ) + paragraph(
        "Published figures are of models of 3 billion parameters and other text (arXiv:2410.05258). They are shown "
        "for scale, and are not a target."
    )


def needles_section(data: dict[str, Any]) -> str:
    """Renders the accuracy of needle retrieval."""
    models = data["models"]
    counts = sorted({(cell["needles"], cell["asked"]) for cell in models[0]["needles"]})
    rows = []
    for model in models:
        cells = [[c for c in model["needles"] if (c["needles"], c["asked"]) == count] for count in counts]
        shares = [sum(c["right"] for c in part) / sum(c["answers"] for c in part) for part in cells]
        rows.append((model["label"], *(f"{share:.2f}" for share in shares)))
    published = [
        (f"published: {name}, 3B, 4K tokens", *(f"{known[c]:.2f}" if c in known else "" for c in counts))
        for name, known in PUBLISHED_ACCURACY.items()
    ]
    lengths = ", ".join(map(str, data["effort"]["lengths_tokens"]))
    return (
        paragraph(
            'N facts "The magic number of Oslo is 4821." are placed in a text; R of them are asked for at its end, '
            "one after another. The asked ones are at the depth shown, the others anywhere. An answer is right if all "
            f"its digits are. Greedy generation; prompts of {lengths} tokens; columns are (N, R)."
        )
        + table(("accuracy", *(f"({needles}, {asked})" for needles, asked in counts)), rows, published)
        + figure(needle_heat_maps, models, "Accuracy in percent over the depth of the asked needles and the length.")
    )


def attention_rows(model: dict[str, Any]) -> list[tuple[str, ...]]:
    """Returns one row per view: means over depths, and the range of the answer's share over them."""
    rows = []
    for view in dict.fromkeys(row["view"] for row in model["attention"]):
        found = [row for row in model["attention"] if row["view"] == view]
        means = [sum(row[name] for row in found) / len(found) for name in ("answer", "noise", "wording", "rest")]
        answers = [row["answer"] for row in found]
        name = "A" if model["kind"] == "LLaMA" else VIEW_NAMES[view]
        spread = f"{min(answers):.2f} to {max(answers):.2f}"
        rows.append((model["label"], name, *(f"{mean:.3f}" for mean in means), spread))
    return rows


def attention_section(data: dict[str, Any]) -> str:
    """Renders attention to the answer and to noise."""
    models = data["models"]
    effort = data["effort"]
    rows = [row for model in models for row in attention_rows(model)]
    header = ("model", "attention", "answer", "noise", "sentence", "rest", "answer, by depth")
    published = [
        (
            f"published: {name}",
            "",
            *("{:.2f} to {:.2f}".format(*known[what]) for what in ("answer", "noise")),
            *[""] * 3,
        )
        for name, known in PUBLISHED_ATTENTION.items()
    ]
    explained = (
        "Where a model attends when it writes each digit of the answer (given the right digits before), mean over all "
        "heads and layers. Answer is the number in its sentence; noise is the text and the other cities' sentences; "
        f"rest is the first token and the question. {effort['attention_needles']} needles, one asked; "
        f"{max(effort['lengths_tokens'])} tokens."
    )
    normalized = (
        "A difference's rows sum to 1 - λ and have negative entries. Those of max(A1 - λ A2, 0) and abs(A1 - λ A2) "
        "are divided by their sums, so that they compare with LLaMA's; the plots show the former. The paper does not "
        "say which tokens it counted: its figures are of the same kind, but not by the same definition."
    )
    profile = (
        "One prompt: attention to every token where the answer's first digit is to be written. Gray: the first token "
        "(cut off where it is higher) and the question."
    )
    return (
        paragraph(explained)
        + paragraph(normalized, "note")
        + table(header, rows, published)
        + figure(attention_by_depth, models, "Attention to the answer's digits and to noise, by the answer's depth.")
        + figure(attention_profiles, models, profile)
    )


def heads_section(data: dict[str, Any]) -> str:
    """Renders the highest scores of heads."""
    scores = ("retrieval", "induction", "previous_token", "first_token")
    rows = []
    for model in data["models"]:
        for name in sorted({head["map"] for head in model["heads"]}, key=list(MAP_NAMES).index):
            heads = [head for head in model["heads"] if head["map"] == name]
            best = [(score, max(heads, key=lambda head, score=score: head[score])) for score in scores]
            cells = [f"{head[score]:.2f} ({head['layer']}.{head['head']})" for score, head in best]
            entropy = sum(head["entropy_nats"] for head in heads) / len(heads)
            rows.append((model["label"], MAP_NAMES[name], *cells, f"{entropy:.2f}"))
    header = ("highest (layer.head)", "map", *(score.replace("_", " ") for score in scores), "mean entropy (nats)")
    return (
        paragraph(
            "Retrieval: share of a needle's tokens that a head copies (arXiv:2404.15574). Induction: attention to the "
            "token after the previous occurrence, on repeated random tokens (arXiv:2209.11895). Then attention to the "
            "previous token, and to the first one. Each map by itself; a difference's weights are unchanged (an exact "
            "V2 has λ = 1/2, which halves them), its entropy is that of their absolute values over their sum. V1 has "
            "half as many heads as the LLaMA it was converted from."
        )
        + table(header, rows)
        + figure(head_dots, data["models"], "Every head: LLaMA's A, and A1 - λ A2 of DIFF; in the order of layers.")
    )


def outliers_section(data: dict[str, Any]) -> str:
    """Renders the largest activations, and what quantized attention logits cost."""
    models = data["models"]
    ranks = ("top_1", "top_2", "top_3", "top_10", "top_100", "median")
    largest = [
        (model["label"], what.replace("_", " "), *(f"{model['outliers'][what][rank]:.1f}" for rank in ranks))
        for what in ("attention_logits", "hidden_states")
        for model in models
    ]
    quantized = []
    for model in models:
        for row in model["quantized"]:
            change = f"{row['loss'] - unquantized(model)['loss']:+.3f}"
            bits = "full" if row["bits"] is None else str(row["bits"])
            quantized.append((model["label"], bits, f"{row['loss']:.3f}", change, f"{row['accuracy']:.2f}"))
    return (
        paragraph(
            "Attention logits are scaled scores before softmax, of both maps in DIFF; hidden states are outputs of "
            "layers. All positions, heads and layers; the median is exact to 0.05 %. In an exact V2 each logit occurs "
            "twice."
        )
        + table(("model", "magnitudes", *(rank.replace("_", "-") for rank in ranks)), largest)
        + paragraph(
            "Attention logits quantized at inference: symmetric, each row's largest magnitude is the outermost level. "
            f"Loss on text, and accuracy of {data['effort']['quantized_prompts']} prompts with one needle anywhere."
        )
        + table(("model", "bits", "loss", "change", "accuracy"), quantized)
        + figure(quantized_lines, models, "What quantized attention logits cost.")
    )


def order_section(data: dict[str, Any]) -> str:
    """Renders how accuracy depends on the order of demonstrations."""
    models = data["models"]
    effort = data["effort"]
    rows = []
    for model in models:
        for row in model["order"]:
            worst = min(min(orders) for orders in row["accuracies"])
            numbers = (*(f"{row[name]:.3f}" for name in ("accuracy", "spread", "std")), f"{worst:.2f}")
            rows.append((model["label"], row["arrangement"], str(row["shots"]), *numbers))
    labels = models[0]["order"][0]["labels"]
    return (
        paragraph(
            f'Demonstrations "Oslo: 4821" name one of {labels} labels for each word; one of the words is asked for '
            f"again; the answer is the label of highest log-probability. {effort['sets']} sets of demonstrations, "
            f"each in {effort['orders']} orders: random, or alternate, which take the labels in turn. Spread is best "
            f"minus worst order, std is over orders, both means over sets; chance is {1 / labels:.2f}."
        )
        + table(("model", "orders", "demonstrations", "accuracy", "spread", "std", "worst order"), rows)
        + figure(order_bands, models, "Mean accuracy, and the band from the worst to the best order. Dotted: chance.")
    )


SECTIONS = {
    "Models": models_section,
    "What this shows, and what not": limits_section,
    "Needles": needles_section,
    "Attention to the answer": attention_section,
    "Heads": heads_section,
    "Outliers and quantized attention": outliers_section,
    "Order and many shots": order_section,
}


def render(data: dict[str, Any]) -> str:
    """
    Renders a report.

    Args:
        data: "environment" (date, machine, threads, torch, transformers, commit), "dtype", "effort" (fields of
            `Effort`) and "models": for each its "label", "kind", "parameters", "layers", "heads_per_layer", "seconds"
            and the sections of `measure_model`.

    Returns:
        A self-contained HTML page.
    """
    data = current_names(data)
    sections = {name: section(data) for name, section in SECTIONS.items()}
    return page("LLaMA next to the Differential Transformer", sections)
