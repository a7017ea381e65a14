"""
How far a student has come, on rows it is not trained on.

N tokens, B batch, T tokens a row.
"""

from dataclasses import dataclass
from typing import Any

import torch

from conversion.healing.data import Rows
from conversion.healing.losses import IGNORED, chunks_of, next_tokens
from conversion.healing.teacher import Teacher


# Where a start is no further from its teacher, a share of the distance is a share of rounding.
SMALLEST_GAP_NATS = 1e-3


@dataclass(frozen=True)
class Measures:
    """Nats a token, and the share of places where teacher and student would choose the same token; None without a
    teacher."""

    loss: float
    kl: float | None = None
    greedy_agreement: float | None = None
    teacher_loss: float | None = None

    def recovered(self, start_loss: float) -> float | None:
        """r = (L_start - L_now) / (L_start - L_teacher); None without a teacher, or where there was nothing to win."""
        if self.teacher_loss is None or start_loss - self.teacher_loss < SMALLEST_GAP_NATS:
            return None
        return (start_loss - self.loss) / (start_loss - self.teacher_loss)


@torch.no_grad()
def measure(model: Any, teacher: Teacher | None, rows: Rows, first_number: int, batch_rows: int) -> Measures:
    """Of the student `model`, on rows (R, T) that the teacher knows by numbers from `first_number` on."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64)
    for start in range(0, len(rows), batch_rows):
        ids = rows.rows[start : start + batch_rows].long().to(device)
        numbers = torch.arange(start, start + len(ids)) + first_number
        logits = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
        labels = next_tokens(ids)
        targets = teacher.targets(ids, numbers) if teacher else None
        for tokens in chunks_of(*logits.shape):
            log_q = logits[tokens].float().log_softmax(-1)
            labels_of = labels[tokens]
            sums[0] += torch.nn.functional.nll_loss(log_q, labels_of, ignore_index=IGNORED, reduction="sum").item()
            if targets:
                sums[1] += targets.divergence(tokens, log_q).sum().item()
                sums[2] += (targets.best(tokens) == log_q.argmax(-1)).sum().item()
                sums[3] += targets.label_losses(tokens, labels_of).sum().item()
    model.train(was_training)
    num_tokens, num_labels = rows.rows.numel(), rows.rows.numel() - len(rows)
    loss, kl, same, teacher_loss = (sums / torch.tensor([num_labels, num_tokens, num_tokens, num_labels])).tolist()
    kl = max(0.0, kl)  # rounding alone may leave it below
    return Measures(loss, kl, same, teacher_loss) if teacher else Measures(loss)
