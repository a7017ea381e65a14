"""Maps computed beside a model, against float64 definitions and what eager attention returns."""

import subprocess
import sys
from functools import partial

import pytest
import torch
from tiny_models import random_ids, tiny_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForSequenceClassification

from modeling_diff.analysis.maps import attention_layers, collect_maps, visit_maps


# float32 model against float32 maps: sums over 16 components in another order.
TOLERANCE = {"atol": 5e-6, "rtol": 0}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


# peft asks transformers for a property by the name that is deprecated.
allow_peft = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


build = partial(tiny_model, noise=0.3, num_hidden_layers=3, max_position_embeddings=64)


def tokens(batch_size=2, length=17):
    return random_ids(batch_size, length, seed=1)


def eager_maps(model, input_ids, attention_mask=None):
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model(input_ids, attention_mask=attention_mask, output_attentions=True).attentions


def rotate(states, theta=10000.0):
    """Components j and j + d/2 of (T, d) turned by position * theta^(-2j/d), in float64."""
    half = states.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(len(states), dtype=torch.float64)[:, None] * frequencies
    first = states[:, :half]
    second = states[:, half:]
    return torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=1
    )


def map_by_definition(attention, hidden, query_map, key_map, width):
    """One softmax map (T, T) of one text from its weights, row by row, in float64."""
    queries, keys = (
        rotate(hidden @ getattr(attention, name).weight.double()[index * width : (index + 1) * width].T)
        for name, index in (("q_proj", query_map), ("k_proj", key_map))
    )
    rows = torch.zeros(len(hidden), len(hidden), dtype=torch.float64)
    for t in range(len(hidden)):
        exponentials = (keys[: t + 1] @ queries[t] / width**0.5).exp()
        rows[t, : t + 1] = exponentials / exponentials.sum()
    return rows


@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_both_maps_and_lambda_equal_their_definition(variant):
    model = build(variant)
    ids = tokens(batch_size=1)
    embedded = model.model.embed_tokens(ids)[0].double()
    norm = model.model.layers[0].input_layernorm
    hidden = embedded / (embedded.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).sqrt() * norm.weight.double()
    attention = model.model.layers[0].self_attn
    maps = collect_maps(model, ids, layers=[0], heads=[3, 0])[0]
    for place, head in enumerate((3, 0)):
        kv_head = head // 2
        for m, computed in enumerate((maps.positive, maps.negative)):
            key = 2 * kv_head + m if variant == "v1" else kv_head
            expected = map_by_definition(attention, hidden, 2 * head + m, key, attention.map_dim)
            torch.testing.assert_close(computed[0, place].double(), expected, **TOLERANCE)
        if variant == "v2":
            logits = hidden @ attention.lambda_proj.weight.double()[head]
            diff_lambda = 1 / (1 + (-logits).exp())
        else:
            q1, k1, q2, k2 = (getattr(attention.diff_lambda, f"lambda_{n}").double() for n in ("q1", "k1", "q2", "k2"))
            diff_lambda = ((q1 * k1).sum().exp() - (q2 * k2).sum().exp() + 0.2).expand(len(hidden))
        torch.testing.assert_close(maps.diff_lambda[0, place, :, 0].double(), diff_lambda, **TOLERANCE)


@pytest.mark.parametrize("variant", ["v1", "v2"])
@pytest.mark.parametrize("padding", [0, 5])
def test_difference_equals_eager_attentions(variant, padding):
    model = build(variant, use_qk_norm=True)
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    maps = collect_maps(model, ids, attention_mask=mask, block=6)  # three blocks, the last a shorter one
    expected = eager_maps(model, ids, mask)
    assert [layer.layer for layer in maps] == [0, 1, 2]
    for layer, attentions in zip(maps, expected, strict=True):
        torch.testing.assert_close(layer.difference()[0, :, padding:], attentions[0, :, padding:], **TOLERANCE)
        torch.testing.assert_close(layer.difference()[1], attentions[1], **TOLERANCE)


@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_rows_sum_to_one_and_the_difference_to_one_minus_lambda(variant):
    for layer in collect_maps(build(variant), tokens()):
        ones = torch.ones(layer.positive.shape[:3])
        torch.testing.assert_close(layer.positive.sum(-1), ones, **TOLERANCE)
        torch.testing.assert_close(layer.negative.sum(-1), ones, **TOLERANCE)
        torch.testing.assert_close(layer.difference().sum(-1), (1 - layer.diff_lambda[..., 0]), **TOLERANCE)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "num_key_value_heads": 4}),
        ("llama", {"rope_parameters": LLAMA3_ROPE}),
        ("llama", {"model_class": LlamaForSequenceClassification, "pad_token_id": 0}),
        ("mistral", {"head_dim": 16}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 16}),
    ],
    ids=["llama", "bias", "llama3 rope", "classifier", "mistral", "qwen2", "qwen3"],
)
def test_maps_of_llama_like_models_equal_eager_attentions(kind, changes):
    model = build(kind, **changes)
    ids = tokens()
    maps = collect_maps(model, ids)
    for layer, attentions in zip(maps, eager_maps(model, ids), strict=True):
        assert layer.negative is None and layer.diff_lambda is None
        torch.testing.assert_close(layer.difference(), attentions, **TOLERANCE)


@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_layers_that_keep_llamas_attention_have_query_heads(variant):
    model = build(variant, differential_layers=[1])
    ids = tokens()
    counts = [(layer.num_heads, layer.is_differential) for layer in attention_layers(model)]
    assert counts == [(8 if variant == "v1" else 4, False), (4, True), (8 if variant == "v1" else 4, False)]
    maps = collect_maps(model, ids)
    for layer, attentions in zip(maps, eager_maps(model, ids), strict=True):
        torch.testing.assert_close(layer.difference(), attentions, **TOLERANCE)


@torch.no_grad()
def test_layer_with_some_differential_heads_has_the_maps_of_these():
    """Its own reference: eager attention returns A1 and A2 of every head there, side by side."""
    model = build("v1", differential_heads=[[1, 3], [0, 1, 2, 3], []])
    counts = [(layer.num_heads, layer.is_differential, layer.heads_with_maps) for layer in attention_layers(model)]
    assert counts == [(4, True, (1, 3)), (4, True, (0, 1, 2, 3)), (8, False, tuple(range(8)))]
    ids = tokens()
    maps = collect_maps(model, ids)
    assert [layer.heads.tolist() for layer in maps] == [[1, 3], [0, 1, 2, 3], list(range(8))]
    both, *others = eager_maps(model, ids)
    diff_lambda = model.model.layers[0].self_attn.diff_lambda()
    torch.testing.assert_close(maps[0].difference(), both[:, [2, 6]] - diff_lambda * both[:, [3, 7]], **TOLERANCE)
    for layer, attentions in zip(maps[1:], others, strict=True):
        torch.testing.assert_close(layer.difference(), attentions, **TOLERANCE)
    chosen = collect_maps(model, ids, heads={0: [3]})
    torch.testing.assert_close(chosen[0].difference(), maps[0].difference()[:, 1:], **TOLERANCE)
    with pytest.raises(ValueError, match=r"heads=\[0, 1\]: in layer 0 only heads \[1, 3\] are differential"):
        collect_maps(model, ids, heads={0: [0, 1]})


def test_chosen_queries_heads_and_layers_are_parts_of_the_whole():
    model = build("v2")
    ids = tokens()
    whole = collect_maps(model, ids)
    part = collect_maps(model, ids, heads={2: [3, 1], 0: [2]}, queries=[16, 4, 9], block=2)
    assert [layer.layer for layer in part] == [0, 2]
    assert part[1].heads.tolist() == [3, 1] and part[1].queries.tolist() == [16, 4, 9]
    torch.testing.assert_close(part[1].negative, whole[2].negative[:, [3, 1]][:, :, [16, 4, 9]], **TOLERANCE)
    torch.testing.assert_close(part[0].diff_lambda, whole[0].diff_lambda[:, [2]][:, :, [16, 4, 9]], **TOLERANCE)


def test_logits_are_the_scores_before_softmax():
    model = build("v1")
    ids = tokens()
    (maps,) = collect_maps(model, ids, layers=[1], logits=True, block=5)
    for attention, scores in ((maps.positive, maps.positive_logits), (maps.negative, maps.negative_logits)):
        torch.testing.assert_close(scores.softmax(-1), attention, **TOLERANCE)
        hidden_from_query = torch.ones(17, 17).triu(1).bool()
        assert (scores[..., hidden_from_query] == -torch.inf).all() and scores[
            ..., ~hidden_from_query
        ].isfinite().all()


def test_padding_is_not_attended_to_and_has_rows_of_zero():
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    (maps,) = collect_maps(build("llama"), ids, attention_mask=mask, layers=[1])
    assert maps.positive[0, :, :, :4].eq(0).all() and maps.positive[0, :, :4].eq(0).all()
    torch.testing.assert_close(maps.positive[0, :, 4:].sum(-1), torch.ones(4, 13), **TOLERANCE)


def test_low_precision_models_give_float32_maps():
    (maps,) = collect_maps(build("v2").bfloat16(), tokens(), layers=[0])
    assert maps.positive.dtype == maps.diff_lambda.dtype == torch.float32
    torch.testing.assert_close(maps.positive.sum(-1), torch.ones(2, 4, 17), **TOLERANCE)  # bfloat16 would miss by 1e-3


@allow_peft
def test_adapters_count():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = build("v2")
    ids = tokens()
    bare = collect_maps(model, ids)[0].positive
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "lambda_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, lora).eval()
    maps = collect_maps(adapted, ids)
    assert (maps[0].positive - bare).abs().max() > 0.05
    for layer, attentions in zip(maps, eager_maps(adapted.get_base_model(), ids), strict=True):
        torch.testing.assert_close(layer.difference(), attentions, **TOLERANCE)


@allow_peft
def test_learned_prompts_are_refused():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="learned prompts"):
        collect_maps(peft.get_peft_model(build("llama"), prompts), tokens())


def test_code_from_the_checkpoint_is_looked_at_as_well(tmp_path):
    model = build("v1")
    model.save_pretrained(tmp_path)
    script = tmp_path / "apart.py"
    script.write_text(
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()\n"
        "from modeling_diff import DiffLlamaForCausalLM\n"
        "from modeling_diff.analysis.maps import collect_maps\n"
        "assert not isinstance(model, DiffLlamaForCausalLM), 'the checkpoint brought no code of its own'\n"
        "ids = torch.randint(3, 96, (2, 17), generator=torch.Generator().manual_seed(1))\n"
        "torch.save([layer.difference() for layer in collect_maps(model, ids)], sys.argv[2])\n"
    )
    command = [sys.executable, str(script), str(tmp_path), str(tmp_path / "maps.pt")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    ours = collect_maps(model, tokens())
    for layer, differences in zip(ours, torch.load(tmp_path / "maps.pt"), strict=True):
        torch.testing.assert_close(layer.difference(), differences, **TOLERANCE)


def test_hooks_are_gone_afterwards_even_after_an_error():
    model = build("llama")

    def fail(maps):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        visit_maps(model, tokens(), fail)
    assert not any(layer.module._forward_pre_hooks for layer in attention_layers(model))


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"layers": [3]}, "layers=.*there are 3 layers"),
        ({"layers": []}, "layers=.*there are 3 layers"),
        ({"heads": [4]}, "heads=.*there are 4 heads in layer 0"),
        ({"heads": [1, 1]}, "heads=.*each once"),
        ({"heads": [-1]}, "heads=.*from 0 to 3"),
        ({"queries": [17]}, "queries=.*there are 17 tokens"),
        ({"block": 0}, "block=0"),
        ({"attention_mask": torch.ones(2, 16)}, "attention_mask of shape"),
    ],
)
def test_choices_out_of_range_are_named(choices, message):
    with pytest.raises(ValueError, match=message):
        collect_maps(build("v1"), tokens(), **choices)


def test_models_and_texts_that_will_not_do_are_refused():
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=96))
    with pytest.raises(ValueError, match="GPT2Model of model_type='gpt2'"):
        collect_maps(gpt2, tokens())
    with pytest.raises(ValueError, match="Linear: not a model of transformers"):
        collect_maps(torch.nn.Linear(2, 2), tokens())
    with pytest.raises(ValueError, match=r"65 tokens.*max_position_embeddings=64"):
        collect_maps(build("llama"), tokens(length=65))
    with pytest.raises(ValueError, match="at least one token"):
        collect_maps(build("llama"), torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(ValueError, match="sliding_window=8 in layer 0"):
        collect_maps(build("mistral", sliding_window=8, head_dim=8), tokens())


def test_transformers_own_diffllama_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"model_type='diffllama'.*diff-llama convert"):
        collect_maps(build("diffllama"), tokens())


def test_backbones_and_heads_have_the_same_maps():
    model = build("v1")
    ids = tokens()
    with_head = collect_maps(model, ids)
    without = collect_maps(model.model, ids)
    assert all(torch.equal(a.positive, b.positive) for a, b in zip(with_head, without, strict=True))


MEMORY_SCRIPT = """
import resource, torch
from modeling_diff import DiffLlamaConfig, DiffLlamaForCausalLM
from modeling_diff.analysis.maps import visit_maps
config = DiffLlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=8192)
model = DiffLlamaForCausalLM(config).eval()
ids = torch.randint(128, (1, 8192), generator=torch.Generator().manual_seed(0))
visit_maps(model, ids[:, :64], lambda maps: None)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows = []
visit_maps(model, ids, lambda maps: rows.append(maps.difference().shape[2]), heads=[0, 1])
assert sum(rows) == 8192
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
def test_8192_tokens_stay_within_4_gigabytes():
    result = subprocess.run([sys.executable, "-c", MEMORY_SCRIPT], capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr[-2000:]
    growth_bytes = int(result.stdout.split()[-1])
    assert growth_bytes < 4 * 2**30
    # One whole map of one head would be 268 MB, so two heads' two maps 1074: they were never held.
    assert growth_bytes < 700 * 2**20
