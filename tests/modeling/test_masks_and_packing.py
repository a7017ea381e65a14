"""Padding, packed sequences, custom masks, embeddings as input, logits to keep: same tokens, same logits."""

import pytest
import torch
from transformers.masking_utils import find_packed_sequence_indices


# float32 logits of up to about 6; padding and packing multiply the same rows in other shapes.
FLOAT32_ATOL = 2e-5


@pytest.fixture(params=["eager", "sdpa", "diff_auto"])
def model(request, tiny_model, variant):
    return tiny_model(variant, attn_implementation=request.param)


def pad(sequences, side, pad_token_id=0):
    length = max(sequence.shape[1] for sequence in sequences)
    rows, masks = [], []
    for sequence in sequences:
        padding = torch.full((1, length - sequence.shape[1]), pad_token_id)
        parts = (padding, sequence) if side == "left" else (sequence, padding)
        rows.append(torch.cat(parts, dim=1))
        ones = torch.ones_like(sequence)
        zeros = torch.zeros_like(padding)
        masks.append(torch.cat((zeros, ones) if side == "left" else (ones, zeros), dim=1))
    return torch.cat(rows), torch.cat(masks)


@pytest.fixture
def sequences(random_ids):
    return [random_ids(1, 9, seed=1), random_ids(1, 5, seed=2), random_ids(1, 7, seed=3)]


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_logits_equal_each_sequence_alone(model, sequences, side):
    input_ids, attention_mask = pad(sequences, side)
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(input_ids, attention_mask=attention_mask, position_ids=position_ids).logits
    assert logits.isfinite().all()
    for row, sequence in enumerate(sequences):
        expected = model(sequence).logits[0]
        torch.testing.assert_close(logits[row, attention_mask[row].bool()], expected, rtol=0, atol=FLOAT32_ATOL)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_leaves_gradients_finite_and_unchanged(model, sequences, side):
    input_ids, attention_mask = pad(sequences[1:2], "left")
    padded = torch.nn.functional.pad(input_ids, (3, 0) if side == "left" else (0, 3))
    padded_mask = torch.nn.functional.pad(attention_mask, (3, 0) if side == "left" else (0, 3))
    gradients = []
    for ids, mask in ((input_ids, attention_mask), (padded, padded_mask)):
        model.zero_grad()
        labels = ids.masked_fill(mask == 0, -100)
        if side == "left" and ids is padded:
            labels[:, 3] = -100  # padding predicts the first token: alone, nothing does
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
        model(ids, attention_mask=mask, position_ids=position_ids, labels=labels).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, expected in gradients[0].items():
        tolerance = 1e-4 * expected.abs().max().item()  # float32, relative to the tensor's largest entry
        torch.testing.assert_close(gradients[1][name], expected, rtol=0, atol=tolerance, msg=name)


@torch.no_grad()
def test_packed_sequences_equal_separate_ones(model, sequences):
    packed = torch.cat(sequences, dim=1)
    position_ids = torch.cat([torch.arange(sequence.shape[1]) for sequence in sequences])[None]
    assert find_packed_sequence_indices(position_ids)[0, -1] == len(sequences) - 1
    logits = model(packed, position_ids=position_ids, use_cache=False).logits[0]
    expected = torch.cat([model(sequence).logits[0] for sequence in sequences])
    torch.testing.assert_close(logits, expected, rtol=0, atol=FLOAT32_ATOL)


@torch.no_grad()
def test_custom_4d_mask_hides_exactly_its_tokens(model, random_ids):
    """A boolean and an additive mask that hide the last three of nine tokens from all but themselves."""
    input_ids = random_ids(2, 9)
    visible = torch.ones(9, 9, dtype=torch.bool).tril()
    visible[6:, :6] = False
    visible = visible.expand(2, 1, -1, -1)
    position_ids = torch.arange(9).expand(2, -1)
    boolean = model(input_ids, attention_mask=visible, position_ids=position_ids).logits
    lowest = torch.finfo(torch.float32).min
    additive = torch.zeros(visible.shape).masked_fill(~visible, lowest)
    torch.testing.assert_close(
        model(input_ids, attention_mask=additive, position_ids=position_ids).logits, boolean, rtol=0, atol=FLOAT32_ATOL
    )
    first = model(input_ids[:, :6]).logits
    second = model(input_ids[:, 6:], position_ids=position_ids[:, 6:]).logits
    torch.testing.assert_close(boolean, torch.cat((first, second), dim=1), rtol=0, atol=FLOAT32_ATOL)


def test_future_tokens_change_nothing_before_them(model, random_ids):
    input_ids = random_ids(2, 9)
    changed = input_ids.clone()
    changed[:, 6:] = random_ids(2, 3, seed=5)
    torch.testing.assert_close(model(input_ids).logits[:, :6], model(changed).logits[:, :6], rtol=0, atol=0)


def test_inputs_embeds_equal_input_ids(model, random_ids):
    input_ids = random_ids(2, 9)
    embeds = model.get_input_embeddings()(input_ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(input_ids).logits)
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model(input_ids, inputs_embeds=embeds)


@pytest.mark.parametrize("logits_to_keep", [1, 4, torch.tensor([0, 5])], ids=["last", "last_four", "indices"])
def test_logits_to_keep_are_the_full_logits_rows(model, random_ids, logits_to_keep):
    input_ids = random_ids(2, 9)
    full = model(input_ids).logits
    rows = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    kept = model(input_ids, logits_to_keep=logits_to_keep).logits
    torch.testing.assert_close(kept, full[:, rows], rtol=0, atol=FLOAT32_ATOL)


def test_position_ids_shift_leaves_logits_relative(model, random_ids):
    """Rotary scores depend on distances alone."""
    input_ids = random_ids(2, 9)
    shifted = model(input_ids, position_ids=torch.arange(50, 59)[None]).logits
    # float32 angles of up to 59 radians carry about 4e-6 of rounding, over two layers.
    torch.testing.assert_close(shifted, model(input_ids).logits, rtol=0, atol=1e-4)
