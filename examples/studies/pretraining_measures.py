"""What the pretraining examples measure alike: held-out loss, recall, lambda per layer; and a mean with its spread.

Size legend: B rows, T tokens per row, H heads.
"""

import statistics

import torch
from train_tiny_llama import mean_loss, recall_accuracy


def recall_sets(recall, rows):
    """{name: [(ids, answers)]}: one needle a row, four where they fit, blocks of eight pairs; `rows` rows each."""
    sets = {"1_needle": [recall.needle_row(1) for _ in range(rows)]}
    if recall.context >= 256:
        sets["4_needles"] = [recall.needle_row(4) for _ in range(rows)]
    return sets | {"dense_8_pairs": [recall.dense_row(8) for _ in range(rows)]}


@torch.no_grad()
def lambda_by_layer(model, rows):
    """Mean lambda of each differential layer over rows (B, T), and over heads where it is a head's; [] for a LLaMA."""
    if getattr(model.config, "variant", None) is None:
        return []
    attentions = [layer.self_attn for layer in model.model.layers]
    if model.config.variant == "v1":
        return [attention.diff_lambda().item() for attention in attentions if hasattr(attention, "diff_lambda")]
    projections = [attention.lambda_proj for attention in attentions if hasattr(attention, "lambda_proj")]
    seen = {}

    def keep(module, inputs, output):
        seen[module] = output.float().sigmoid().mean().item()  # (B, T, H)

    hooks = [projection.register_forward_hook(keep) for projection in projections]
    model(input_ids=rows.to(model.device))
    for hook in hooks:
        hook.remove()
    return [seen[projection] for projection in projections]


def measure(model, windows, sets):
    """Held-out loss over windows (B, T), recall accuracy and loss over `recall_sets`, lambda per layer."""
    texts = torch.tensor([row for part in sets.values() for row, _ in part])
    return {
        "heldout_loss": mean_loss(model, windows),
        "recall_accuracy": {name: recall_accuracy(model, part) for name, part in sets.items()},
        "recall_loss": mean_loss(model, texts),
        "lambda_by_layer": lambda_by_layer(model, windows[:8]),
    }


def mean_and_spread(values):
    """Mean and sample standard deviation, the latter None for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def in_words(values, percent=False):
    """`mean ± standard deviation`"""
    mean, spread = mean_and_spread(values)
    text = f"{mean:.1%}" if percent else f"{mean:.3f}"
    if spread is None:
        return text
    return text + (f" ± {spread:.1%}" if percent else f" ± {spread:.3f}")
