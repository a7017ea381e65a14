"""Against transformers' own DiffLlama and LLaMA, on the same weights."""

import pytest
import torch
from transformers import DiffLlamaConfig as HalvesConfig
from transformers import DiffLlamaForCausalLM as HalvesForCausalLM

from modeling_diff import DiffLlamaForCausalLM
from modeling_diff.diff_transformers_compat import cache_argument, output_cache


# float32 logits of up to about 6; the same sums in another order.
FLOAT32_ATOL = 2e-5


@pytest.fixture
def llama(tiny_model):
    """Builds a LLaMA of the tiny models' sizes, with `num_attention_heads` heads of its own 32 / heads width."""

    def build(num_attention_heads, num_key_value_heads, dtype=torch.float32):
        heads = {"num_attention_heads": num_attention_heads, "num_key_value_heads": num_key_value_heads}
        return tiny_model("llama", seed=1, noise=0, **heads).to(dtype)

    return build


def to_halves(weight, map_dim):
    """Rows of maps 0, 1, 2, 3, ... (paired) in transformers' order 0, 2, ..., 1, 3, ... (halves)."""
    return weight.unflatten(0, (-1, 2, map_dim)).transpose(0, 1).flatten(0, 2)


@pytest.mark.parametrize("num_key_value_heads", [1, 2, 4])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_v1_equals_transformers_diffllama(tiny_model, random_ids, num_key_value_heads, implementation):
    ours = tiny_model(
        "v1", num_key_value_heads=num_key_value_heads, sub_norm_eps=1e-6, attn_implementation=implementation
    )
    for layer in ours.model.layers:
        layer.self_attn.sub_norm.weight.data.fill_(1)  # transformers' norm has no weight
    config = ours.config
    theirs = HalvesForCausalLM(
        HalvesConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=2 * config.num_attention_heads,
            num_key_value_heads=2 * config.num_key_value_heads,
            head_dim=config.map_dim,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters=config.rope_parameters,
            attn_implementation=implementation,
        )
    ).eval()
    assert type(theirs).__module__.startswith("transformers.models.diffllama.")
    weights = {}
    for name, weight in ours.state_dict().items():
        if "sub_norm" in name:
            continue
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            weight = to_halves(weight, config.map_dim)
        weights[name.replace("diff_lambda.", "")] = weight
    theirs.load_state_dict(weights)
    input_ids = random_ids(2, 13)
    torch.testing.assert_close(ours(input_ids).logits, theirs(input_ids).logits, rtol=0, atol=FLOAT32_ATOL)


def mirrored_weights(llama_model, config):
    """V2 weights that compute LLaMA exactly: equal maps leave A - A / 2 = A / 2, doubled by the output projection."""
    weights = {}
    for name, weight in llama_model.state_dict().items():
        if name.endswith("q_proj.weight"):
            rows = weight.unflatten(0, (-1, 1, config.head_dim))
            weight = rows.expand(-1, 2, -1, -1).flatten(0, 2)
        if name.endswith("o_proj.weight"):
            weight = 2 * weight
        weights[name] = weight
    for layer_idx in range(config.num_hidden_layers):
        shape = (config.num_attention_heads, config.hidden_size)
        weights[f"model.layers.{layer_idx}.self_attn.lambda_proj.weight"] = torch.zeros(shape)
    return weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("num_key_value_heads", [2, 4])
def test_mirrored_v2_equals_llama_bit_for_bit(
    tiny_config, llama, random_ids, num_key_value_heads, implementation, dtype
):
    config = tiny_config("v2", num_key_value_heads=num_key_value_heads)
    theirs = llama(4, num_key_value_heads, dtype)
    ours = DiffLlamaForCausalLM(config).to(dtype).eval()
    ours.load_state_dict(mirrored_weights(theirs, config))
    for model in (ours, theirs):
        model.set_attn_implementation(implementation)
    input_ids = random_ids(2, 13)
    with torch.no_grad():
        prefilled = [model(input_ids[:, :9], use_cache=True) for model in (ours, theirs)]
        assert torch.equal(prefilled[0].logits, prefilled[1].logits)
        for t in range(9, 13):
            step = input_ids[:, t : t + 1]
            decoded = [
                model(step, **cache_argument(output_cache(prefill))).logits
                for model, prefill in zip((ours, theirs), prefilled, strict=True)
            ]
            assert torch.equal(*decoded), t


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_v2_without_differential_layers_equals_llama_bit_for_bit(
    tiny_config, llama, random_ids, implementation, dtype
):
    theirs = llama(4, 2, dtype)
    ours = DiffLlamaForCausalLM(tiny_config("v2", differential_layers=[])).to(dtype).eval()
    ours.load_state_dict(theirs.state_dict())
    for model in (ours, theirs):
        model.set_attn_implementation(implementation)
    input_ids = random_ids(2, 13)
    assert torch.equal(ours(input_ids).logits, theirs(input_ids).logits)
    assert torch.equal(greedy(ours, input_ids), greedy(theirs, input_ids))


def greedy(model, input_ids):
    return model.generate(input_ids, max_new_tokens=6, do_sample=False, eos_token_id=None)


def paired_weights(llama_model, map_dim):
    """
    LLaMA's weights for V1 without differential layers. Map m of head i reads half m of key-value pair i // G: the new
    order of LLaMA's heads takes, of two neighboring groups, one head each in turn.
    """
    config = llama_model.config
    num_groups = config.num_attention_heads // config.num_key_value_heads
    heads = torch.arange(config.num_attention_heads).view(-1, 2, num_groups).transpose(1, 2).flatten()
    weights = dict(llama_model.state_dict())
    for name, weight in weights.items():
        if name.endswith("q_proj.weight"):
            weights[name] = weight.unflatten(0, (-1, map_dim))[heads].flatten(0, 1)
        if name.endswith("o_proj.weight"):
            weights[name] = weight.unflatten(1, (-1, map_dim))[:, heads].flatten(1, 2)
    return weights


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("num_key_value_heads", [8, 4, 2])
def test_v1_without_differential_layers_equals_llama(
    tiny_config, llama, random_ids, num_key_value_heads, implementation
):
    theirs = llama(8, num_key_value_heads)
    config = tiny_config("v1", num_key_value_heads=num_key_value_heads // 2, differential_layers=[])
    ours = DiffLlamaForCausalLM(config).eval()
    ours.load_state_dict(paired_weights(theirs, config.map_dim))
    for model in (ours, theirs):
        model.set_attn_implementation(implementation)
    input_ids = random_ids(2, 13)
    torch.testing.assert_close(ours(input_ids).logits, theirs(input_ids).logits, rtol=0, atol=FLOAT32_ATOL)
    assert torch.equal(greedy(ours, input_ids), greedy(theirs, input_ids))


def test_partly_differential_model_decodes_what_it_prefills(tiny_model, variant, random_ids):
    model = tiny_model(variant, differential_layers=[1])
    attention = [layer.self_attn for layer in model.model.layers]
    assert [hasattr(module, "diff_lambda") or hasattr(module, "lambda_proj") for module in attention] == [False, True]
    input_ids = random_ids(2, 13)
    uncached = model(input_ids).logits
    prefill = model(input_ids[:, :12], use_cache=True)
    decoded = model(input_ids[:, 12:], **cache_argument(output_cache(prefill))).logits
    torch.testing.assert_close(decoded, uncached[:, 12:], rtol=0, atol=FLOAT32_ATOL)


@pytest.mark.parametrize("num_key_value_heads", [8, 2])
def test_v1_cache_at_parity_has_llama_bytes(tiny_config, llama, random_ids, num_key_value_heads):
    theirs = llama(8, num_key_value_heads)
    ours = DiffLlamaForCausalLM(tiny_config("v1", num_key_value_heads=num_key_value_heads // 2))
    input_ids = random_ids(3, 13)

    def cache_bytes(model):
        layers = output_cache(model(input_ids, use_cache=True)).layers
        return [(layer.keys.nbytes, layer.values.nbytes) for layer in layers]

    assert cache_bytes(ours) == cache_bytes(theirs)
