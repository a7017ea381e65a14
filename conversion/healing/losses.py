"""
What a student is to learn from a teacher's outputs, without more than a chunk of probabilities in memory.

N tokens, V vocabulary, K tokens kept per position, B batch, T tokens per row, C hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn


CHUNK_ELEMENTS = 2**25  # of float32 probabilities at once: 128 MiB
IGNORED = -100


class Targets(Protocol):
    """A teacher's distributions on N tokens."""

    def divergence(self, tokens: slice, log_q: torch.Tensor) -> torch.Tensor:
        """Returns KL(teacher || student) in nats, (n,), for the student's log-probabilities (n, V) of the tokens."""
        ...

    def best(self, tokens: slice) -> torch.Tensor:
        """Returns the teacher's most likely token, (n,)."""
        ...

    def label_losses(self, tokens: slice, labels: torch.Tensor) -> torch.Tensor:
        """Returns -log p of the labels (n,); 0 where they are IGNORED."""
        ...


@dataclass(frozen=True)
class LogitTargets:
    """All of it: logits (N, V)."""

    logits: torch.Tensor

    def divergence(self, tokens: slice, log_q: torch.Tensor) -> torch.Tensor:
        log_p = self.logits[tokens].to(log_q.dtype).log_softmax(-1)
        return nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)

    def best(self, tokens: slice) -> torch.Tensor:
        return self.logits[tokens].argmax(-1)

    def label_losses(self, tokens: slice, labels: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self.logits[tokens].float(), labels, reduction="none")


@dataclass(frozen=True)
class TopTargets:
    """
    The most likely tokens `ids` (N, K), most likely first, their log-probabilities (N, K), and -log p (N,) of the
    token that follows.

    The divergence is that of the K tokens and all others as one: a lower bound.
    """

    ids: torch.Tensor
    log_probs: torch.Tensor
    next_losses: torch.Tensor

    def divergence(self, tokens: slice, log_q: torch.Tensor) -> torch.Tensor:
        log_p = self.log_probs[tokens].to(log_q.dtype)
        log_q = log_q.gather(-1, self.ids[tokens].long())
        kept = (log_p.exp() * (log_p - log_q)).sum(-1)
        log_p_rest = _log_rest(log_p)
        log_q_rest = _log_rest(log_q)
        return kept + log_p_rest.exp() * (log_p_rest - log_q_rest)

    def best(self, tokens: slice) -> torch.Tensor:
        return self.ids[tokens, 0].long()

    def label_losses(self, tokens: slice, labels: torch.Tensor) -> torch.Tensor:
        return self.next_losses[tokens].where(labels != IGNORED, 0)


def _log_rest(log_probs: torch.Tensor) -> torch.Tensor:
    """Returns log(1 - sum p); a sum rounded to 1 or more leaves the smallest rest there can be."""
    return torch.log((1 - log_probs.exp().sum(-1)).clamp_min(torch.finfo(log_probs.dtype).eps))


def next_tokens(ids: torch.Tensor) -> torch.Tensor:
    """Returns labels (B T,) of ids (B, T): the token that follows, IGNORED after the last of a row."""
    return nn.functional.pad(ids[:, 1:], (0, 1), value=IGNORED).flatten()


def distillation_loss(
    logits: torch.Tensor, ids: torch.Tensor, targets: Targets | None, cross_entropy_weight: float
) -> torch.Tensor:
    """Returns (1 - w) KL(teacher || student) + w cross entropy, in nats/token.

    Args:
        logits: The student's, (B, T, V).
        ids: Token ids, (B, T).
        targets: The teacher's distributions; without them, cross entropy alone.
        cross_entropy_weight: w.
    """
    labels = next_tokens(ids)
    weight = 1.0 if targets is None else cross_entropy_weight
    num_labels = int((labels != IGNORED).sum())

    def loss_of(chunk: torch.Tensor, tokens: slice) -> torch.Tensor:
        log_q = chunk.log_softmax(-1)
        loss = log_q.new_zeros(())
        if targets is not None and weight < 1:
            loss = loss + (1 - weight) / len(labels) * targets.divergence(tokens, log_q).sum()
        if weight:
            surprise = nn.functional.nll_loss(log_q, labels[tokens], ignore_index=IGNORED, reduction="sum")
            loss = loss + weight / num_labels * surprise
        return loss

    return ChunkedLoss.apply(logits.flatten(0, 1), loss_of)


def chunks_of(num_tokens: int, vocab_size: int) -> list[slice]:
    """Returns slices of tokens whose probabilities fit into CHUNK_ELEMENTS."""
    size = max(1, CHUNK_ELEMENTS // vocab_size)
    return [slice(start, start + size) for start in range(0, num_tokens, size)]


class ChunkedLoss(torch.autograd.Function):
    """
    A sum over tokens of a loss of their logits (N, V), float32 or wider a chunk at a time.

    The gradient is taken with the loss, in the logits' dtype: what backward keeps is as large as the logits, where
    autograd would keep several float32 copies.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, loss_of: Callable[[torch.Tensor, slice], torch.Tensor]
    ) -> torch.Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=logits.device)
        gradient = torch.empty_like(logits)
        for tokens in chunks_of(*logits.shape):
            with torch.enable_grad():
                chunk = logits[tokens].detach().to(wide).requires_grad_()
                loss = loss_of(chunk, tokens)
                (gradient[tokens],) = torch.autograd.grad(loss, chunk)
            total += loss.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output.to(gradient.dtype), None


def stream_distance(reached: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> torch.Tensor:
    """
    Returns the mean square distance of hidden states (B, T, C), relative to that of `wanted`, mean over the pairs.

    Relative per token, as a LLaMA's first tokens are a thousand times larger than the rest.
    """
    distances = [
        ((ours.float() - theirs.float()).square().mean(-1) / theirs.float().square().mean(-1)).mean()
        for ours, theirs in zip(reached, wanted, strict=True)
    ]
    return torch.stack(distances).mean()
