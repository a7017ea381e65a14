"""Token ids that a model has no embedding for are told by every measure, before the model is run."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_model

from modeling_diff.analysis.ablation import loss_nats, mean_head_outputs
from modeling_diff.analysis.head_scores import greedy
from modeling_diff.analysis.maps import visit_maps
from modeling_diff.analysis.needle_runs import generate_replies
from modeling_diff.analysis.order import label_log_probs
from modeling_diff.analysis.outliers import mean_loss
from modeling_diff.analysis.tokens import token_fault


class Words:
    """A tokenizer whose tokens are the numbers that a text names; its padding token was added to it alone."""

    pad_token_id = 50
    eos_token_id = 2

    def __call__(self, text, verbose=True):
        return SimpleNamespace(input_ids=[int(word) for word in text.split()])

    def batch_decode(self, ids, skip_special_tokens):
        return [" ".join(map(str, row)) for row in ids.tolist()]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", vocab_size=50)


IDS = torch.tensor([[3, 50, 4]])
MEASURES = {
    "maps": lambda model: visit_maps(model, IDS, lambda maps: None),
    "loss": lambda model: loss_nats(model, IDS),
    "head outputs": lambda model: mean_head_outputs(model, IDS),
    "rows": lambda model: mean_loss(model, IDS),
    "greedy": lambda model: greedy(model, IDS, 1),
    "needles": lambda model: generate_replies(model, Words(), ["3 4", "3 50 4"], 1),
    "order": lambda model: label_log_probs(model, Words(), "3 4", [" 5"], ["50", "6"]),
}


@pytest.mark.parametrize("measure", MEASURES)
def test_unknown_tokens_are_refused_by_every_measure(model, measure):
    with pytest.raises(ValueError, match="token 50, expected whole numbers from 0 to 49, as vocab_size is 50") as told:
        MEASURES[measure](model)
    assert "use the tokenizer that belongs to the checkpoint" in str(told.value)


def test_padding_without_an_embedding_is_not_read(model):
    """Two texts of different lengths are padded; both continue as they do alone."""
    texts = ["3 4 5 6", "7 8"]
    alone = [generate_replies(model, Words(), [text], 4)[0] for text in texts]
    assert generate_replies(model, Words(), texts, 4) == alone


@pytest.mark.parametrize("ids", [[0, 49], [], torch.tensor([[0, 49]]), torch.empty(0, 2, dtype=torch.long)])
def test_known_tokens_have_no_fault(ids):
    assert token_fault(ids, 50) is None


@pytest.mark.parametrize("token", [50, -1, True, 1.0, "1", None])
def test_what_is_no_row_of_the_embedding_is_named(token):
    assert f"token {token!r}, expected whole numbers from 0 to 49" in str(token_fault([3, token], 50))
