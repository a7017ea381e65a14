"""The largest activations are found, and quantized scores are quantized as they should be."""

import pytest
import torch
from tiny_models import tiny_model
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from modeling_diff.analysis.outliers import (
    Magnitudes,
    mean_loss,
    measure_outliers,
    quantize,
    quantized_attention_forward,
    quantized_scores,
)


KINDS = ["llama", "v1", "v2"]


def build(kind):
    return tiny_model(kind, vocab_size=50, pad_token_id=0)


@pytest.fixture
def rows():
    return torch.randint(1, 50, (3, 20), generator=torch.Generator().manual_seed(1))


def test_streamed_statistics_are_those_of_all_values_at_once():
    values = torch.randn(10, 1001, generator=torch.Generator().manual_seed(0)) ** 5
    found = Magnitudes(k=20)
    for part in values.split([1, 4, 5]):
        found.update(part)
    largest = values.abs().flatten().sort(descending=True).values
    assert [found.top(rank) for rank in (1, 2, 20)] == [largest[i].item() for i in (0, 1, 19)]
    assert found.median() == pytest.approx(values.abs().median().item(), rel=5e-4)  # eleven bits of mantissa
    assert found.count == 10_010
    assert all(value != value for value in (found.top(21), Magnitudes().median()))


def test_a_planted_outlier_is_found():
    model = build("llama")
    for layer in model.model.layers:  # layers that add nothing: hidden states are the embedding
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    with torch.no_grad():
        model.model.embed_tokens.weight[7, 3] = -1000
    found = measure_outliers(model, torch.tensor([[1, 2, 7, 4]])).hidden_states
    seen = model.model.embed_tokens.weight[[1, 2, 7, 4]].abs()
    assert found.top(1) == found.top(2) == 1000  # once per layer
    assert found.top(3) == seen.flatten().topk(2).values[1].item() and found.count == 2 * seen.numel()


def test_attention_logits_are_the_scaled_scores(rows):
    model = build("llama")
    del model.model.layers[1:]
    found = measure_outliers(model, rows, k=5).attention_logits
    wide = build("llama").double()
    attention = wide.model.layers[0].self_attn
    hidden = wide.model.embed_tokens(rows)
    normed = wide.model.layers[0].input_layernorm(hidden)
    cos, sin = wide.model.rotary_emb(hidden, torch.arange(20)[None])
    query = attention.q_proj(normed).view(3, 20, 4, 8).transpose(1, 2)
    key = attention.k_proj(normed).view(3, 20, 2, 8).transpose(1, 2).repeat_interleave(2, 1)
    query, key = apply_rotary_pos_emb(query, key, cos, sin)
    scores = (query @ key.transpose(2, 3) / 8**0.5)[..., torch.ones(20, 20).tril().bool()].abs().flatten()
    expected = scores.sort(descending=True).values
    assert [found.top(i + 1) for i in range(5)] == pytest.approx(expected[:5].tolist(), rel=1e-4)  # float32
    assert found.median() == pytest.approx(scores.median().item(), rel=2e-3)
    assert found.count == len(scores)


def test_levels_are_symmetric_and_reach_the_largest():
    scores = torch.tensor([[-4.0, 1.0, 2.1, 4.0], [0.0, 0.3, 0.0, -0.1], [0.0, 0.0, 0.0, 0.0]])
    third = 4 / 3
    expected = torch.tensor([[-4, third, 2 * third, 4], [0, 0.3, 0, -0.1], [0, 0, 0, 0]])
    torch.testing.assert_close(quantize(scores, 3), expected)  # 7 levels; 4 / 3 and 0.1 apart
    by_head = torch.tensor([[-4, third, 2 * third, 4], [0, 0, 0, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(quantize(scores, 3, "head"), by_head)
    assert quantize(scores, 2).unique().tolist() == pytest.approx([-4, 0, 0.3, 4])


def test_what_is_hidden_does_not_stretch_the_levels():
    visible = torch.tensor([True, True, False])
    assert quantize(torch.tensor([[0.6, 1.0, 90.0]]), 2, visible=visible)[0, :2].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("over", ["row", "head"])
def test_many_bits_change_nothing(kind, over, rows):
    model = build(kind)
    with torch.no_grad():  # scores as large as trained models have, those of padding among them
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 8
    padded = rows.clone()
    mask = torch.ones_like(rows)
    padded[1, :6] = 3  # a token that is embedded, as an end of text is
    mask[1, :6] = 0
    with torch.no_grad():
        before = model(padded, attention_mask=mask).logits
        with quantized_scores(model, 24, over):
            inside = model(padded, attention_mask=mask).logits
        after = model(padded, attention_mask=mask).logits
    torch.testing.assert_close(inside[mask.bool()], before[mask.bool()], atol=1e-4, rtol=1e-4)  # 24 bits, float32
    assert torch.equal(after, before)


@pytest.mark.parametrize("kind", KINDS)
def test_few_bits_change_the_loss_and_the_model_comes_back(kind, rows):
    model = build(kind)
    name = model.config._attn_implementation
    before = mean_loss(model, rows)
    with quantized_scores(model, 2):
        assert abs(mean_loss(model, rows) - before) > 1e-3
    with pytest.raises(RuntimeError), quantized_scores(model, 4):
        raise RuntimeError
    assert model.config._attn_implementation == name and mean_loss(model, rows) == before


def test_quantized_attention_is_its_definition():
    generator = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(1, heads, 5, 8, generator=generator) for heads in (4, 2, 2))
    mask = torch.full((5, 5), torch.finfo(torch.float32).min).triu(1)[None, None]
    output, _ = quantized_attention_forward(None, query, key, value, mask, 0.5, bits=4, over="row")
    for head in range(4):
        for i in range(5):
            scores = [0.5 * float(query[0, head, i].double() @ key[0, head // 2, j].double()) for j in range(i + 1)]
            step = max(map(abs, scores)) / 7
            weights = torch.tensor([step * round(score / step) for score in scores]).double().softmax(0)
            expected = weights @ value[0, head // 2, : i + 1].double()
            torch.testing.assert_close(output[0, i, head].double(), expected, atol=1e-5, rtol=1e-5)  # float32


@pytest.mark.parametrize("kind", KINDS)
def test_generation_runs_on_quantized_scores(kind, rows):
    model = build(kind)
    before = model.generate(rows, max_new_tokens=4, do_sample=False)
    with quantized_scores(model, 20):
        assert torch.equal(model.generate(rows, max_new_tokens=4, do_sample=False), before)


def test_mean_loss_is_transformers_own(rows):
    model = build("llama")
    assert mean_loss(model, rows, batch_size=2) == pytest.approx(model(rows, labels=rows).loss.item(), rel=1e-5)


def test_bad_settings_are_refused(rows):
    model = build("llama")
    with pytest.raises(ValueError, match="bits=1: 2 to 24"), quantized_scores(model, 1):
        pass
    with pytest.raises(ValueError, match="over='tensor'"), quantized_scores(model, 8, "tensor"):
        pass
    other = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=50, bos_token_id=1, eos_token_id=1))
    with pytest.raises(ValueError, match="model_type='gpt2': how it attends is not known"), quantized_scores(other, 8):
        pass
    with pytest.raises(ValueError, match="model_type='gpt2'"):
        measure_outliers(other, rows)
