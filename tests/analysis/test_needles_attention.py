"""Attention to the answer and to noise, where it is known or computed otherwise."""

from functools import partial

import pytest
import torch
from tiny_models import tiny_model

from modeling_diff.analysis.attention_mass import REGIONS, measure_attention, region_shares, token_regions
from modeling_diff.analysis.needles import NeedleTask, make_prompts


LENGTH = 120
SIZES = {"vocab_size": 2048, "max_position_embeddings": 512, "initializer_range": 0.5}
build = partial(tiny_model, **SIZES, attn_implementation="eager")


@pytest.fixture(scope="module")
def prompts(tokenizer, filler):
    return make_prompts(NeedleTask(LENGTH, 0.5, 3), tokenizer, filler, 2)


def place_of_number(tokenizer, prompt):
    """First token of the asked number and one past its last: digits are tokens of their own here."""
    start = len(tokenizer(prompt.text[: prompt.asked[0].number_span[0]])["input_ids"])
    return start, start + 4


@pytest.mark.parametrize("kind", ["llama", "v1", "v2"])
def test_uniform_attention_gives_a_span_its_share_of_the_length(tokenizer, prompts, kind):
    model = build(kind)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.q_proj.weight)
    mass = measure_attention(model, tokenizer, prompts)
    # The four digits are asked for from the space before them on, which is token LENGTH.
    expected = sum(4 / (LENGTH + 1 + i) for i in range(4)) / 4
    for view in set(mass.by_layer) - {"signed"}:
        assert mass.answer(view) == pytest.approx(expected, rel=1e-5)  # float32 softmax
        assert mass.by_layer[view].sum(-1).tolist() == pytest.approx([1.0, 1.0], rel=1e-5)
    if kind == "v1":
        shares = [(1 - layer.self_attn.diff_lambda().item()) * expected for layer in model.model.layers]
        assert mass.by_layer["signed"][:, 0].tolist() == pytest.approx(shares, rel=1e-4)


def test_llamas_shares_are_those_of_its_own_attentions(tokenizer, prompts):
    model = build("llama")
    mass = measure_attention(model, tokenizer, prompts)
    found = []
    for prompt in prompts:
        ids = tokenizer(f"{prompt.text} {prompt.asked[0].number}", return_tensors="pt")["input_ids"]
        maps = torch.stack(model.double()(ids, output_attentions=True).attentions)  # layers, batch, heads, T, S
        start, end = place_of_number(tokenizer, prompt)
        found.append(maps[..., LENGTH : LENGTH + 4, start:end].sum(-1).mean())
    model.float()
    # float32 against float64
    assert mass.answer("positive") == pytest.approx(torch.stack(found).mean().item(), rel=1e-4)


@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_diff_shares_are_those_of_the_eager_maps(tokenizer, prompts, variant):
    model = build(variant)
    mass = measure_attention(model, tokenizer, prompts[:1])
    ids = tokenizer(f"{prompts[0].text} {prompts[0].asked[0].number}", return_tensors="pt")["input_ids"]
    maps: dict = {}
    with torch.no_grad():
        model.double()(ids, attention_maps_by_layer=maps)
    start, end = place_of_number(tokenizer, prompts[0])
    for layer, both in maps.items():
        diff_lambda = both.diff_lambda if variant == "v1" else both.diff_lambda.transpose(1, 2).unsqueeze(-1)
        difference = (both.positive - diff_lambda * both.negative)[:, :, LENGTH : LENGTH + 4]
        views = {
            "positive": both.positive[:, :, LENGTH : LENGTH + 4],
            "negative": both.negative[:, :, LENGTH : LENGTH + 4],
            "clamped": difference.relu() / difference.relu().sum(-1, keepdim=True),
            "absolute": difference.abs() / difference.abs().sum(-1, keepdim=True),
            "signed": difference,
        }
        for view, weights in views.items():
            expected = weights[..., start:end].sum(-1).mean().item()
            assert mass.by_layer[view][layer, 0].item() == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_every_token_has_its_region(tokenizer, prompts):
    prompt = prompts[0]
    ids, regions = token_regions(tokenizer, prompt, f"{prompt.text} {prompt.asked[0].number}")
    said = {
        name: tokenizer.decode([i for i, region in zip(ids, regions, strict=True) if REGIONS[region] == name])
        for name in REGIONS
    }
    asked = prompt.asked[0]
    assert said["answer"] == asked.number
    assert said["wording"] == f"\nThe magic number of {asked.city} is ."
    others = [prompt.text[slice(*needle.span)] for needle in prompt.needles if needle is not asked]
    assert sorted(said["distractors"].split("\n")) == sorted("".join(others).split("\n"))
    assert said["rest"] == f"<s>\nThe magic number of {asked.city} is {asked.number}"


def test_a_head_on_the_answer_gives_it_everything():
    regions = torch.tensor([4, 3, 0, 0, 1, 2])
    weights = torch.zeros(1, 2, 1, 6)
    weights[0, 0, 0, 2] = weights[0, 1, 0, 3] = 1
    assert region_shares(weights, regions).tolist() == [1, 0, 0, 0, 0]
    weights[0, 1, 0] = torch.tensor([0.5, 0, 0, 0, 0, 0.5])
    assert region_shares(weights, regions).tolist() == [0.5, 0, 0.25, 0, 0.25]


def test_a_tokenizer_that_knows_no_places_is_refused(prompts):
    with pytest.raises(ValueError, match="load the fast one"):
        token_regions(object(), prompts[0], prompts[0].text)
