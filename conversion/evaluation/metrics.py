"""How well a language model predicts a text, and how near it is to another one: the one place that computes this.

T tokens, V vocabulary.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch.nn.functional import cross_entropy


@dataclass(frozen=True)
class TextMetrics:
    """Means over all positions of a text; those that compare two models are None where there is only one."""

    loss_nats: float
    source_loss_nats: float | None = None
    kl_nats: float | None = None
    greedy_agreement: float | None = None

    def to_dict(self) -> dict[str, float]:
        """Returns what was measured, as JSON."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def text_metrics(
    logits: Iterable[torch.Tensor],
    windows: Sequence[torch.Tensor],
    source_logits: Sequence[torch.Tensor] | None = None,
) -> TextMetrics:
    """Returns the metrics of a model by its logits, and by `source_logits` how near it is to its source.

    Args:
        logits: One tensor (T, V) for each window, in any dtype.
        windows: Token ids (1, T).
        source_logits: The source's, alike.
    """
    losses = []
    source_losses = []
    divergences = []
    agreements = []
    for number, (found, ids) in enumerate(zip(logits, windows, strict=True)):
        found = _upcast(found)
        losses.append(next_token_losses(found, ids))
        if source_logits is None:
            continue
        source = _upcast(source_logits[number])
        source_losses.append(next_token_losses(source, ids))
        log_p = source.log_softmax(-1)
        log_q = found.log_softmax(-1)
        divergences.append((log_p.exp() * (log_p - log_q)).sum(-1))
        agreements.append((source.argmax(-1) == found.argmax(-1)).float())
    if source_logits is None:
        return TextMetrics(_mean(losses))
    # A mean of rounding alone may come out below 0, which no divergence is.
    return TextMetrics(_mean(losses), _mean(source_losses), max(0.0, _mean(divergences)), _mean(agreements))


@torch.no_grad()
def window_logits(model: torch.nn.Module, windows: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yields a model's logits (T, V) for each window (1, T) of token ids, on the device that the model is on."""
    device = next(model.parameters()).device
    for ids in windows:
        yield model(input_ids=ids.to(device), use_cache=False).logits[0]


def _upcast(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def next_token_losses(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Returns the loss of each token but the first, (T - 1,) in nats, of logits (T, V) for ids (1, T)."""
    return cross_entropy(_upcast(logits)[:-1], ids[0, 1:].to(logits.device), reduction="none")


def _mean(parts: Sequence[torch.Tensor]) -> float:
    return torch.cat(list(parts)).mean().item()
