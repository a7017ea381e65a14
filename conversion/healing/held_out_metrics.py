"""
How far a student has come, on rows it is not trained on.

N tokens, R rows, T tokens per row, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch

from conversion.healing.losses import IGNORED, Targets, chunks_of, next_tokens
from conversion.healing.rows import Rows
from conversion.healing.teacher import Teacher


# Where a start is no further from its teacher, a share of the distance is a share of rounding.
SMALLEST_GAP_NATS = 1e-3


@dataclass(frozen=True)
class Measures:
    """Nats/token, and the share of positions where both choose the same token; None without a teacher."""

    loss: float
    kl: float | None = None
    greedy_agreement: float | None = None
    teacher_loss: float | None = None

    def recovered(self, start_loss: float) -> float | None:
        """Returns r = (L_start - L_now) / (L_start - L_teacher); None without a teacher, or with nothing to win."""
        if self.teacher_loss is None or start_loss - self.teacher_loss < SMALLEST_GAP_NATS:
            return None
        return (start_loss - self.loss) / (start_loss - self.teacher_loss)


@torch.no_grad()
def measure(model: Any, teacher: Teacher | None, rows: Rows, batch_rows: int) -> Measures:
    """Measures a student next to its teacher.

    Args:
        model: The student.
        teacher: The teacher, or None.
        rows: Rows (R, T) with the numbers by which the teacher knows them.
        batch_rows: How many rows to compute at once.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64)
    for start in range(0, len(rows), batch_rows):
        ids = rows.rows[start : start + batch_rows].long().to(device)
        numbers = torch.arange(start, start + len(ids)) + rows.first
        logits = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
        sums += _sums(logits, next_tokens(ids), teacher.targets(ids, numbers) if teacher else None)
    model.train(was_training)
    num_tokens = rows.rows.numel()
    num_labels = num_tokens - len(rows)
    counts = torch.tensor([num_labels, num_tokens, num_tokens, num_labels])
    loss, kl, same, teacher_loss = (sums / counts).tolist()
    if teacher is None:
        return Measures(loss)
    return Measures(loss, max(0.0, kl), same, teacher_loss)  # rounding alone may leave KL below 0


def _sums(logits: torch.Tensor, labels: torch.Tensor, targets: Targets | None) -> torch.Tensor:
    """Returns sums over N tokens, in float64: loss, KL, equal choices, the teacher's loss; logits (N, V)."""
    sums = torch.zeros(4, dtype=torch.float64)
    for tokens in chunks_of(*logits.shape):
        log_q = logits[tokens].float().log_softmax(-1)
        labels_of = labels[tokens]
        sums[0] += torch.nn.functional.nll_loss(log_q, labels_of, ignore_index=IGNORED, reduction="sum").item()
        if targets is not None:
            sums[1] += targets.divergence(tokens, log_q).sum().item()
            sums[2] += (targets.best(tokens) == log_q.argmax(-1)).sum().item()
            sums[3] += targets.label_losses(tokens, labels_of).sum().item()
    return sums
