"""The heads next to language modeling: what they compute, each problem type, and their loss."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForTokenClassification

from modeling_diff import (
    DiffLlamaForQuestionAnswering,
    DiffLlamaForSequenceClassification,
    DiffLlamaForTokenClassification,
    DiffLlamaModel,
)


HEADS = [DiffLlamaForSequenceClassification, DiffLlamaForTokenClassification, DiffLlamaForQuestionAnswering]
# float32 logits of order 1; padding multiplies the same rows in other shapes.
FLOAT32_ATOL = 2e-5
SMALL = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(params=HEADS, ids=lambda head: head.__name__)
def head(request, tiny_model, variant):
    return tiny_model(variant, model_class=request.param)


def test_backbone_is_ours(head):
    """transformers builds it by class name, and has a DiffLlamaModel of its own."""
    backbone = getattr(head, head.base_model_prefix)
    assert type(backbone) is DiffLlamaModel


def test_head_saves_and_loads_with_equal_logits(head, random_ids, tmp_path):
    input_ids = random_ids(2, 9)
    head.save_pretrained(tmp_path)
    loaded = type(head).from_pretrained(tmp_path)
    outputs = zip(loaded(input_ids).to_tuple(), head(input_ids).to_tuple(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in outputs if torch.is_tensor(ours))


@pytest.mark.parametrize(
    ("problem_type", "labels", "loss_function"),
    [
        ("regression", torch.tensor([[0.3, -0.2, 0.1], [1.0, 0.0, 2.0]]), nn.functional.mse_loss),
        ("single_label_classification", torch.tensor([2, 0]), nn.functional.cross_entropy),
        (
            "multi_label_classification",
            torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]),
            nn.functional.binary_cross_entropy_with_logits,
        ),
    ],
)
def test_sequence_classification_loss_follows_the_problem_type(
    tiny_model, variant, random_ids, problem_type, labels, loss_function
):
    model = tiny_model(
        variant, model_class=DiffLlamaForSequenceClassification, num_labels=3, problem_type=problem_type
    )
    output = model(random_ids(2, 9), labels=labels)
    assert output.logits.shape == (2, 3)
    torch.testing.assert_close(output.loss, loss_function(output.logits, labels))
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_sequence_classification_infers_the_problem_type(tiny_model, variant, random_ids):
    for num_labels, labels, expected in (
        (1, torch.tensor([[0.5], [1.0]]), "regression"),
        (3, torch.tensor([1, 2]), "single_label_classification"),
        (3, torch.tensor([[1.0, 0, 0], [0, 1, 1]]), "multi_label_classification"),
    ):
        model = tiny_model(variant, model_class=DiffLlamaForSequenceClassification, num_labels=num_labels)
        assert model(random_ids(2, 9), labels=labels).loss.isfinite()
        assert model.config.problem_type == expected


@pytest.mark.parametrize("side", ["left", "right"])
def test_sequence_classification_reads_the_last_token_that_is_no_padding(tiny_model, variant, random_ids, side):
    model = tiny_model(variant, model_class=DiffLlamaForSequenceClassification, num_labels=3)
    short = random_ids(1, 5)
    padded = nn.functional.pad(short, (4, 0) if side == "left" else (0, 4))
    mask = (padded != 0).long()
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(padded, attention_mask=mask, position_ids=position_ids).logits
    torch.testing.assert_close(logits, model(short).logits, rtol=0, atol=FLOAT32_ATOL)


def test_token_classification_scores_every_token(tiny_model, variant, random_ids):
    model = tiny_model(variant, model_class=DiffLlamaForTokenClassification, num_labels=5)
    labels = torch.randint(5, (2, 9))
    output = model(random_ids(2, 9), labels=labels)
    assert output.logits.shape == (2, 9, 5)
    expected = nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize(
    "dropouts", [{}, {"classifier_dropout": None}, {"hidden_dropout": 0.3}, {"classifier_dropout": 0.0}], ids=str
)
def test_token_classification_drops_out_as_llama(tiny_model, variant, dropouts):
    model = tiny_model(variant, model_class=DiffLlamaForTokenClassification, **dropouts)
    llama = LlamaForTokenClassification(LlamaConfig(**SMALL, **dropouts))
    assert model.dropout.p == llama.dropout.p


def test_question_answering_scores_starts_and_ends(tiny_model, variant, random_ids):
    model = tiny_model(variant, model_class=DiffLlamaForQuestionAnswering)
    starts, ends = torch.tensor([1, 3]), torch.tensor([4, 8])
    output = model(random_ids(2, 9), start_positions=starts, end_positions=ends)
    assert output.start_logits.shape == output.end_logits.shape == (2, 9)
    cross_entropy = nn.functional.cross_entropy
    expected = (cross_entropy(output.start_logits, starts) + cross_entropy(output.end_logits, ends)) / 2
    torch.testing.assert_close(output.loss, expected)


def test_language_model_loss_is_the_shifted_cross_entropy(tiny_model, variant, random_ids):
    model = tiny_model(variant)
    input_ids = random_ids(2, 9)
    labels = input_ids.clone()
    labels[0, :4] = -100
    output = model(input_ids, labels=labels)
    shifted = output.logits[:, :-1].flatten(0, 1)
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(shifted, labels[:, 1:].flatten()))
