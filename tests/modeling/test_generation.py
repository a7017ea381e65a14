"""Every way of generating, against token-by-token decoding without a cache or against one another."""

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from modeling_diff.diff_transformers_compat import cache_argument, output_cache


GREEDY = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}


@pytest.fixture(params=["eager", "sdpa", "diff_auto"])
def model(request, tiny_model, heads):
    return tiny_model(**heads, attn_implementation=request.param)


@torch.no_grad()
def decode_without_cache(model, input_ids, num_new_tokens=10):
    for _ in range(num_new_tokens):
        next_ids = model(input_ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        input_ids = torch.cat((input_ids, next_ids), dim=1)
    return input_ids


def test_greedy_generation_equals_decoding_without_cache(model, random_ids):
    input_ids = random_ids(2, 7)
    generated = model.generate(input_ids, **GREEDY)
    assert torch.equal(generated, decode_without_cache(model, input_ids))
    assert torch.equal(model.generate(input_ids, use_cache=False, **GREEDY), generated)


def test_left_padded_generation_equals_each_prompt_alone(model, random_ids):
    long, short = random_ids(1, 8, seed=1), random_ids(1, 5, seed=2)
    input_ids = torch.cat((long, torch.nn.functional.pad(short, (3, 0))))
    attention_mask = (input_ids != 0).long()
    generated = model.generate(input_ids, attention_mask=attention_mask, **GREEDY)[:, 8:]
    alone = [model.generate(prompt, **GREEDY)[:, prompt.shape[1] :] for prompt in (long, short)]
    assert torch.equal(generated, torch.cat(alone))


def test_generation_from_embeddings_equals_tokens(model, random_ids):
    input_ids = random_ids(2, 7)
    embeds = model.get_input_embeddings()(input_ids)
    assert torch.equal(model.generate(inputs_embeds=embeds, **GREEDY), model.generate(input_ids, **GREEDY)[:, 7:])


def test_generation_continues_from_a_prefilled_cache(model, random_ids):
    prompt = random_ids(1, 9)
    cache = output_cache(model(prompt[:, :6], use_cache=True))
    continued = model.generate(prompt, **cache_argument(cache), **GREEDY)
    assert torch.equal(continued, model.generate(prompt, **GREEDY))


def test_sampling_repeats_under_one_seed_and_varies_over_seeds(model, random_ids):
    def sample(seed):
        torch.manual_seed(seed)
        return model.generate(random_ids(2, 7), max_new_tokens=10, do_sample=True, top_k=20, eos_token_id=None)

    assert torch.equal(sample(3), sample(3))
    assert not torch.equal(sample(3), sample(4))


def test_beam_search_finds_no_worse_sequence_than_greedy(model, random_ids):
    input_ids = random_ids(2, 7)

    def log_likelihood(sequences):
        log_probs = model(sequences).logits[:, 6:-1].log_softmax(-1)
        return log_probs.gather(-1, sequences[:, 7:, None]).sum((1, 2))

    settings = GREEDY | {"max_new_tokens": 4}
    beams = model.generate(
        input_ids, num_beams=96, num_return_sequences=1, output_scores=True, return_dict_in_generate=True, **settings
    )
    # 96 beams over a vocabulary of 96 keep the best of all two-token continuations; float32 sums of four logarithms.
    torch.testing.assert_close(beams.sequences_scores * 4, log_likelihood(beams.sequences), rtol=0, atol=1e-4)
    assert (log_likelihood(beams.sequences) >= log_likelihood(model.generate(input_ids, **settings)) - 1e-4).all()


def test_assisted_generation_equals_greedy(model, tiny_model, heads, random_ids):
    prompt = random_ids(1, 7)
    expected = model.generate(prompt, **GREEDY)
    for assistant in (tiny_model(heads["kind"], num_hidden_layers=1), tiny_model(**heads)):
        assert torch.equal(model.generate(prompt, assistant_model=assistant, **GREEDY), expected)


def test_prompt_lookup_generation_equals_greedy(model, random_ids):
    prompt = random_ids(1, 4).repeat(1, 3)
    # transformers 5.6 needs an end token here, of LLaMA as well.
    generated = model.generate(prompt, prompt_lookup_num_tokens=3, **GREEDY | {"eos_token_id": -1})
    assert torch.equal(generated, model.generate(prompt, **GREEDY))


def test_generation_stops_at_the_end_token(model, random_ids):
    prompt = random_ids(1, 7)
    expected = model.generate(prompt, **GREEDY)
    end_token = expected[0, 9].item()
    stopped = model.generate(prompt, **GREEDY | {"eos_token_id": end_token})
    assert torch.equal(stopped, expected[:, : (expected[0, 7:] == end_token).nonzero()[0, 0] + 8])


def generate_batch(model, prompts):
    settings = GenerationConfig(max_new_tokens=10, do_sample=False, eos_token_id=-1, pad_token_id=0)
    # The default takes most of the machine's memory for the cache, and seconds to fill it.
    batching = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32)
    outputs = model.generate_batch(
        prompts, generation_config=settings, continuous_batching_config=batching, warmup=False
    )
    by_prompt = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
    return [by_prompt[tuple(prompt)] for prompt in prompts]


@pytest.mark.parametrize("implementation", ["sdpa", "paged|eager", "eager", "diff_chunked", "diff_auto"])
def test_continuous_batching_equals_generate_token_by_token(tiny_model, variant, random_ids, implementation):
    model = tiny_model(variant, attn_implementation="sdpa")
    prompts = [random_ids(1, length, seed=length) for length in (13, 7, 1, 40)]  # 40: more than a batch's tokens
    expected = [model.generate(prompt, **GREEDY)[0, prompt.shape[1] :].tolist() for prompt in prompts]
    model.set_attn_implementation(implementation)
    assert generate_batch(model, [prompt[0].tolist() for prompt in prompts]) == expected


@pytest.mark.parametrize(
    ("variant", "differential"),
    [
        ("v1", {"differential_layers": [0]}),
        ("v2", {"differential_layers": [0]}),
        ("v1", {"differential_heads": [[0, 3], [1]]}),
    ],
    ids=str,
)
def test_continuous_batching_of_a_partly_differential_model_equals_generate(
    tiny_model, random_ids, variant, differential
):
    model = tiny_model(variant, attn_implementation="sdpa", **differential)
    prompts = [random_ids(1, length, seed=length) for length in (13, 7)]
    expected = [model.generate(prompt, **GREEDY)[0, prompt.shape[1] :].tolist() for prompt in prompts]
    assert generate_batch(model, [prompt[0].tolist() for prompt in prompts]) == expected
