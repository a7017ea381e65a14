"""Losses in chunks against float64 autograd over the whole; the teacher's kept tokens against all of them."""

import pytest
import torch

from conversion.healing import losses
from conversion.healing.held_out_metrics import Measures
from conversion.healing.losses import LogitTargets, TopTargets, distillation_loss, stream_distance


BATCH = 2
TOKENS = 7
VOCABULARY = 11


def logits(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(BATCH, TOKENS, VOCABULARY, generator=generator, dtype=torch.float64).to(dtype)


IDS = torch.randint(VOCABULARY, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))


def reference(student, teacher, weight):
    """Written out in probabilities, over the whole."""
    p = teacher.softmax(-1)
    q = student.softmax(-1)
    kl = (p * (p / q).log()).sum(-1).mean()
    chosen = q[:, :-1].gather(-1, IDS[:, 1:, None])
    return (1 - weight) * kl - weight * chosen.log().mean()


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("chunk", [1, 5, 1000])  # tokens; 14 in all
# float64: the order of sums; float32: rounding of its own probabilities; bfloat16: the gradient's 8 bits.
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)]
)
def test_distillation_loss_and_gradient_equal_the_definition(weight, chunk, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", chunk * VOCABULARY)
    given = logits(1, dtype)
    ours = given.clone().requires_grad_()
    loss = distillation_loss(ours, IDS, LogitTargets(logits(2, dtype).flatten(0, 1)), weight)
    (3 * loss).backward()
    exact = given.double().requires_grad_()
    expected = reference(exact, logits(2, dtype).double(), weight)
    (3 * expected).backward()
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=tolerance, atol=tolerance)


def test_without_a_teacher_the_loss_is_cross_entropy():
    student = logits(3)
    expected = torch.nn.functional.cross_entropy(student[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(distillation_loss(student, IDS, None, 0.0), expected)


def top_targets(teacher, num_kept):
    log_p = teacher.log_softmax(-1).flatten(0, 1)
    top = log_p.topk(num_kept, dim=-1)
    return TopTargets(top.indices.int(), top.values, torch.zeros(len(log_p)))


def test_kept_tokens_give_the_whole_divergence_when_one_is_left_over_and_less_when_more_are():
    student, teacher = logits(4), logits(5)
    whole = slice(0, BATCH * TOKENS)
    log_q = student.log_softmax(-1).flatten(0, 1)
    exact = reference(student, teacher, 0.0)
    found = [top_targets(teacher, kept).divergence(whole, log_q).mean() for kept in (VOCABULARY - 1, 6, 2)]
    torch.testing.assert_close(found[0], exact)
    assert exact > found[1] > found[2] > 0


def test_kept_tokens_train_towards_the_teacher():
    student = logits(6).requires_grad_()
    teacher = logits(7)
    distillation_loss(student, IDS, top_targets(teacher, VOCABULARY - 1), 0.0).backward()
    exact = student.detach().clone().requires_grad_()
    reference(exact, teacher, 0.0).backward()
    torch.testing.assert_close(student.grad, exact.grad, rtol=1e-9, atol=1e-12)


def test_stream_distance_is_relative_to_each_token():
    wanted = torch.tensor([[[3.0, 4.0], [300.0, 400.0]]])
    reached = wanted + torch.tensor([[[0.5, 0.0], [50.0, 0.0]]])
    # 0.5^2 / 25 for both tokens, and nothing for the second pair.
    assert stream_distance([reached, wanted], [wanted, wanted]).item() == pytest.approx(0.005)


def test_recovered_share_of_a_start_that_lost_nothing_is_not_a_number():
    reached = Measures(loss=3.2, kl=0.1, greedy_agreement=0.8, teacher_loss=3.0)
    assert reached.recovered(3.5) == pytest.approx(0.6)
    assert reached.recovered(3.0 + 1e-6) is None  # an exact conversion, up to rounding
    assert reached.recovered(2.9) is None
