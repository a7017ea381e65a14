"""Demonstrations in many orders: what is asked, how labels are scored, and what spread means."""

import random
from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_model
from tiny_tokenizers import TINY_LLAMA
from transformers import AutoModelForCausalLM

from modeling_diff.analysis import order
from modeling_diff.analysis.order import OrderResult, OrderTask, arrange, draw_demonstrations, measure_order


SIZES = {"vocab_size": 2048, "max_position_embeddings": 256}


@pytest.fixture
def drawn():
    return draw_demonstrations(OrderTask(12, labels=3, queries=5), random.Random(0))


def test_demonstrations_share_out_the_labels(drawn):
    words, labels = zip(*drawn.pairs, strict=True)
    assert len(set(words)) == 12 and all(labels.count(label) == 4 for label in drawn.labels)
    assert len(set(drawn.labels)) == 3 and len(set(drawn.queries)) == 5 and set(drawn.queries) <= set(drawn.pairs)


def test_orders_are_permutations_of_the_same(drawn):
    source = random.Random(1)
    orders = [tuple(arrange(drawn, "random", source)) for _ in range(4)]
    assert len(set(orders)) == 4 and all(set(pairs) == set(drawn.pairs) for pairs in orders)


def test_alternate_orders_take_the_classes_in_turn(drawn):
    pairs = arrange(drawn, "alternate", random.Random(1))
    labels = [label for _, label in pairs]
    assert set(pairs) == set(drawn.pairs) and labels == labels[:3] * 4 and len(set(labels[:3])) == 3


@pytest.mark.parametrize("kind", ["llama", "v1", "v2"])
def test_labels_are_scored_as_one_forward_pass_a_label_would(tokenizer, kind):
    model = tiny_model(kind, **SIZES)
    context = "Oslo: 4821\nLima: 17\n"
    questions = ["Oslo:", "Copenhagen:"]
    labels = ["4821", "17", "x"]
    scored = order.label_log_probs(model, tokenizer, context, questions, labels, batch_size=4)
    for i, question in enumerate(questions):
        for j, label in enumerate(labels):
            prompt = tokenizer(context + question)["input_ids"]
            ids = tokenizer(f"{context}{question} {label}", return_tensors="pt")["input_ids"]
            with torch.no_grad():
                log_probs = model(ids).logits[0].double().log_softmax(-1)
            expected = sum(log_probs[t - 1, ids[0, t]].item() for t in range(len(prompt), ids.shape[1]))
            assert scored[i, j].item() == pytest.approx(expected, rel=1e-4)  # float32 against float64


def test_spread_is_best_minus_worst_and_std_is_over_orders():
    result = OrderResult(8, 4, "random", ((1.0, 0.5, 0.75, 0.75), (0.5, 0.5, 0.5, 0.5)))
    assert (result.accuracy, result.spread) == (0.625, 0.25)
    assert result.std == pytest.approx((0.125**0.5 / 2 + 0) / 2)


def test_a_model_that_looks_up_has_no_spread_and_one_that_repeats_has(tokenizer, monkeypatch):
    def look_up(model, tokenizer, context, questions, labels):
        told = dict(line.split(": ") for line in context.splitlines())
        return torch.tensor([[float(told[question[:-1]] == label) for label in labels] for question in questions])

    def repeat_last(model, tokenizer, context, questions, labels):
        return torch.tensor([[float(context.endswith(f"{label}\n")) for label in labels] for _ in questions])

    task = OrderTask(8, labels=2, queries=3, orders=12, sets=2)
    monkeypatch.setattr(order, "label_log_probs", look_up)
    result = measure_order(None, tokenizer, task)
    assert (result.accuracy, result.spread, result.std) == (1, 0, 0)
    monkeypatch.setattr(order, "label_log_probs", repeat_last)
    result = measure_order(None, tokenizer, task)
    # An order is right for the queries of the label it ends with: shares p and 1 - p, of three queries never equal.
    assert result.spread >= 1 / 3 and {min(orders) + max(orders) for orders in result.accuracies} == {1}
    assert measure_order(None, tokenizer, task) == result
    assert measure_order(None, tokenizer, replace(task, seed=1)).accuracies != result.accuracies


def test_the_trained_llama_is_far_above_chance(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32).eval()
    result = measure_order(model, tokenizer, OrderTask(6, labels=3, queries=6, orders=2, sets=2))
    assert result.accuracy > 0.6  # chance is a third


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"labels": 9}, "labels=9"),
        ({"words": ("a", "b")}, "shots=8"),
        ({"arrangement": "sorted"}, "arrangement='sorted'"),
        ({"orders": 0}, "orders=0"),
    ],
)
def test_impossible_tasks_are_refused(settings, field):
    with pytest.raises(ValueError, match=field):
        OrderTask(8, **settings)


def test_what_does_not_fit_the_context_is_refused(tokenizer):
    model = tiny_model("llama", **SIZES)
    with pytest.raises(ValueError, match=r"demonstrations and a question: .* max_position_embeddings is 256"):
        measure_order(model, tokenizer, OrderTask(40))
    with pytest.raises(ValueError, match="tokenizer: missing"):
        measure_order(model, None, OrderTask(8))
