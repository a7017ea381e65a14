"""Every cache of transformers: decoding step by step gives what one pass without a cache gives."""

import importlib.util

import pytest
import torch
from transformers import DynamicCache, QuantizedCache, StaticCache

from modeling_diff.diff_transformers_compat import cache_argument, output_cache


# float32 logits of up to about 6; prefill and decoding multiply the same rows in other shapes.
FLOAT32_ATOL = 2e-5


@pytest.fixture(params=["eager", "sdpa"])
def model(request, tiny_model, heads):
    return tiny_model(**heads, attn_implementation=request.param)


def decode_step_by_step(model, input_ids, cache, prefill_length=7, **kwargs):
    logits = [model(input_ids[:, :prefill_length], use_cache=True, **cache_argument(cache), **kwargs).logits]
    for t in range(prefill_length, input_ids.shape[1]):
        logits.append(model(input_ids[:, t : t + 1], use_cache=True, **cache_argument(cache), **kwargs).logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize(
    "build_cache",
    [
        lambda config: DynamicCache(config=config),
        lambda config: StaticCache(config=config, max_cache_len=13),
        lambda config: StaticCache(config=config, max_cache_len=40),
    ],
    ids=["dynamic", "static_full", "static_with_room"],
)
@torch.no_grad()
def test_cached_decoding_equals_one_pass(model, random_ids, build_cache):
    input_ids = random_ids(2, 13)
    decoded = decode_step_by_step(model, input_ids, build_cache(model.config))
    torch.testing.assert_close(decoded, model(input_ids, use_cache=False).logits, rtol=0, atol=FLOAT32_ATOL)


@torch.no_grad()
def test_prefill_in_chunks_equals_one_pass(model, random_ids):
    input_ids = random_ids(2, 13)
    cache = DynamicCache(config=model.config)
    chunks = [model(chunk, **cache_argument(cache)).logits for chunk in input_ids.split((5, 1, 7), dim=1)]
    torch.testing.assert_close(torch.cat(chunks, dim=1), model(input_ids).logits, rtol=0, atol=FLOAT32_ATOL)


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@torch.no_grad()
def test_sliding_window_cache_equals_a_banded_mask(tiny_model, variant, random_ids, kind):
    """LLaMA masks no window of its own, so that the whole prompt is the window and only decoding slides."""
    window = 6
    num_tokens = 13
    model = tiny_model(variant, num_hidden_layers=1)
    model.config.sliding_window = window
    model.config.layer_types = ["sliding_attention"]
    input_ids = random_ids(2, num_tokens)
    settings = {} if kind is DynamicCache else {"max_cache_len": num_tokens}
    cache = kind(config=model.config, **settings)
    for t in range(num_tokens):
        last = model(input_ids[:, t : t + 1], **cache_argument(cache)).logits
    assert cache.layers[0].keys.shape[-2] <= window
    model.config.sliding_window = model.config.layer_types = None
    rows = torch.arange(num_tokens)[:, None]
    columns = torch.arange(num_tokens)[None]
    visible = (columns <= rows) & (columns > rows - window)
    banded = model(input_ids, attention_mask=visible[None, None].expand(2, 1, -1, -1)).logits
    torch.testing.assert_close(last, banded[:, -1:], rtol=0, atol=FLOAT32_ATOL)


def test_cache_holds_key_value_heads_of_head_dim(model, random_ids):
    config = model.config
    cache = output_cache(model(random_ids(3, 5), use_cache=True))
    expected = (3, config.num_key_value_heads, 5, config.head_dim)
    assert [tuple(layer.keys.shape) for layer in cache.layers] == [expected] * config.num_hidden_layers
    assert [tuple(layer.values.shape) for layer in cache.layers] == [expected] * config.num_hidden_layers


@torch.no_grad()
def test_reordered_and_repeated_cache_continues_each_sequence(model, random_ids):
    input_ids = random_ids(2, 9)
    cache = output_cache(model(input_ids[:, :8], use_cache=True))
    order = torch.tensor([1, 0, 1])
    cache.batch_select_indices(order)
    decoded = model(input_ids[order, 8:], **cache_argument(cache)).logits
    expected = model(input_ids[order]).logits[:, 8:]
    torch.testing.assert_close(decoded, expected, rtol=0, atol=FLOAT32_ATOL)


@torch.no_grad()
def test_cropped_cache_continues_from_the_cut(model, random_ids):
    input_ids = random_ids(2, 9)
    cache = output_cache(model(input_ids, use_cache=True))
    cache.crop(-4)
    decoded = model(input_ids[:, 5:], **cache_argument(cache)).logits
    torch.testing.assert_close(decoded, model(input_ids).logits[:, 5:], rtol=0, atol=FLOAT32_ATOL)


@pytest.mark.filterwarnings("ignore:.*past_key_values:FutureWarning")  # transformers 5.24 renamed it
@torch.no_grad()
def test_old_name_of_the_cache_is_still_taken(model, random_ids):
    input_ids = random_ids(2, 9)
    cache = DynamicCache(config=model.config)
    model(input_ids[:, :8], past_key_values=cache)
    decoded = model(input_ids[:, 8:], past_key_values=cache)
    torch.testing.assert_close(decoded.logits, model(input_ids).logits[:, 8:], rtol=0, atol=FLOAT32_ATOL)
    assert decoded.past_key_values is cache


@pytest.mark.parametrize(("backend", "package"), [("quanto", "optimum.quanto"), ("hqq", "hqq")])
@torch.no_grad()
def test_quantized_cache_stays_near_one_pass(model, random_ids, backend, package):
    if importlib.util.find_spec(package.partition(".")[0]) is None:
        pytest.skip(f"{package} is not installed")
    input_ids = random_ids(2, 13)
    cache = QuantizedCache(backend, config=model.config, nbits=8, q_group_size=16, residual_length=4)
    if backend == "quanto":
        cache = QuantizedCache(backend, config=model.config, nbits=4, q_group_size=16, residual_length=4)
    decoded = decode_step_by_step(model, input_ids, cache)
    expected = model(input_ids).logits
    # A few of 13 tokens are held in 4 or 8 bits: the direction of the logits stays.
    assert torch.cosine_similarity(decoded.flatten(), expected.flatten(), dim=0) > 0.95


@pytest.mark.parametrize("implementation", ["static", "dynamic"])
def test_generate_with_named_cache_equals_default(model, random_ids, implementation):
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    input_ids = random_ids(2, 7)
    default = model.generate(input_ids, **settings)
    assert torch.equal(model.generate(input_ids, cache_implementation=implementation, **settings), default)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static", "static"])
def test_generate_on_gpu_with_named_cache_equals_default(model, random_ids, implementation):
    model = model.to("cuda")
    input_ids = random_ids(2, 7).to("cuda")
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    default = model.generate(input_ids, **settings)
    assert torch.equal(model.generate(input_ids, cache_implementation=implementation, **settings), default)
