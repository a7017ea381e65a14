"""Tensor rules against transformers' own state dicts, against definitions written out, and against their inverses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_llamas import FLAVOURS, SMALL, random_llama
from transformers import LlamaConfig

from conversion.mapping.heads import HeadPairing, Sizes
from conversion.mapping.layout import halves_layout, interleaved_layout, llama_tensors, mirrored_layout, paired_layout
from conversion.mapping.rules import diffllama_export_rules, diffllama_rules, llama_v1_rules, llama_v2_rules
from modeling_diff import DiffLlamaConfig, DiffLlamaForCausalLM


C = 3  # hidden size where it does not matter


@st.composite
def head_counts(draw, even=True):
    """(H, G, d): H query heads over G KV heads of even width d."""
    kv_heads = draw(st.integers(1, 4)) * (2 if even else 1)
    return kv_heads * draw(st.integers(1, 4)), kv_heads, draw(st.sampled_from((2, 4, 6)))


@st.composite
def pairings(draw):
    """Any legal pairing: KV heads in any order, query heads within their KV pair in any order."""
    num_heads, kv_heads, d = draw(head_counts())
    group = num_heads // kv_heads
    order = draw(st.permutations(range(kv_heads)))
    query_heads = []
    for g in range(kv_heads // 2):
        firsts, seconds = (
            [kv * group + j for j in draw(st.permutations(range(group)))] for kv in order[2 * g : 2 * g + 2]
        )
        query_heads += [head for pair in zip(firsts, seconds, strict=True) for head in pair]
    return HeadPairing(tuple(query_heads), tuple(order)), d


def sizes_of(config) -> Sizes:
    return Sizes(
        config.vocab_size,
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        not config.tie_word_embeddings,
        config.attention_bias,
        config.attention_bias,
        config.mlp_bias,
    )


def weight(role: str, num_heads: int, num_kv_heads: int, d: int) -> torch.Tensor:
    rows = num_heads * d if role in ("queries", "outputs") else num_kv_heads * d
    numbers = torch.arange(rows * C, dtype=torch.float32)
    return numbers.view(C, rows) if role == "outputs" else numbers.view(rows, C)


def assert_inverse(layout, num_heads, num_kv_heads, d):
    for role, transform in layout.items():
        tensor = weight(role, num_heads, num_kv_heads, d)
        changed = transform(tensor)
        assert tuple(changed.shape) == transform.shape(tuple(tensor.shape))
        assert torch.equal(transform.inverse()(changed), tensor), role


@given(pairings())
def test_paired_layout_inverse_is_identity(pairing_and_d):
    pairing, d = pairing_and_d
    assert_inverse(
        paired_layout(pairing, len(pairing.query_heads), len(pairing.kv_heads), d),
        len(pairing.query_heads),
        len(pairing.kv_heads),
        d,
    )


@given(head_counts())
def test_halves_and_interleaved_layout_inverse_is_identity(counts):
    assert_inverse(halves_layout(*counts), *counts)
    assert_inverse(interleaved_layout(*counts), *counts)


@given(head_counts(even=False))
def test_mirrored_layout_inverse_is_identity(counts):
    num_heads, _, d = counts
    assert_inverse(mirrored_layout(num_heads, d, lambda_bias=0.0), *counts)


@given(pairings())
def test_paired_layout_moves_rows_and_columns_together(pairing_and_d):
    """Every map keeps its own keys, values and output columns: the head's slices, cut out one by one."""
    pairing, d = pairing_and_d
    num_heads, num_kv_heads = len(pairing.query_heads), len(pairing.kv_heads)
    layout = paired_layout(pairing, len(pairing.query_heads), len(pairing.kv_heads), d)
    source = {role: weight(role, num_heads, num_kv_heads, d) for role in layout}
    target = {role: transform(source[role]) for role, transform in layout.items()}
    group = num_heads // num_kv_heads
    for head in range(num_heads // 2):
        for m in (0, 1):
            llama_head = pairing.query_heads[2 * head + m]
            ours = slice((2 * head + m) * d, (2 * head + m + 1) * d)
            theirs = slice(llama_head * d, llama_head * d + d)
            assert torch.equal(target["queries"][ours], source["queries"][theirs])
            assert torch.equal(target["outputs"][:, ours], source["outputs"][:, theirs])
            ours = slice((2 * (head // group) + m) * d, (2 * (head // group) + m + 1) * d)
            theirs = slice(llama_head // group * d, llama_head // group * d + d)
            assert torch.equal(target["keys"][ours], source["keys"][theirs])
            assert torch.equal(target["values"][ours], source["values"][theirs])


def test_adjacent_pairing_is_the_documented_one():
    pairing = HeadPairing.adjacent(num_heads=8, num_kv_heads=4)
    assert pairing.kv_heads == (0, 1, 2, 3)
    assert pairing.query_heads == (0, 2, 1, 3, 4, 6, 5, 7)


@pytest.mark.parametrize(
    ("query_heads", "kv_heads"),
    [((0, 1, 2), (0, 1)), ((0, 0), (0, 1)), ((1, 0), (0, 1)), ((0, 1, 2, 3), (0, 1)), ((), ())],
)
def test_pairing_refuses_what_is_none(query_heads, kv_heads):
    with pytest.raises(ValueError, match="head"):
        HeadPairing(query_heads, kv_heads)


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.sampled_from((2, 4, 8, 16)))
def test_interleaved_layout_gives_the_same_scores(seed, d):
    """Interleaved rotary on the authors' rows is half-split rotary on ours, both written out as complex numbers."""
    torch.manual_seed(seed)
    query, key = torch.randn(2, d, 1, dtype=torch.float64)
    angles = torch.rand(2, d // 2, dtype=torch.float64)  # of the query's and of the key's position

    def turned_pairs(real, imaginary, angle):
        return torch.complex(real, imaginary) * torch.polar(torch.ones_like(angle), angle)

    def theirs(x, angle):
        return turned_pairs(x[0::2, 0], x[1::2, 0], angle)

    def ours(x, angle):
        return turned_pairs(x[: d // 2, 0], x[d // 2 :, 0], angle)

    layout = interleaved_layout(1, 1, d)
    expected = (theirs(query, angles[0]) * theirs(key, angles[1]).conj()).real.sum()
    found = (ours(layout["queries"](query), angles[0]) * ours(layout["keys"](key), angles[1]).conj()).real.sum()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_table_has_the_names_and_shapes_of_transformers_llama(flavour):
    model = random_llama(**FLAVOURS[flavour])
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert {name: shape for name, shape, _, _ in llama_tensors(sizes_of(model.config))} == expected


def v1_rules(sizes: Sizes, layers):
    pairing = HeadPairing.adjacent(sizes.num_heads, sizes.num_kv_heads)
    return llama_v1_rules(sizes, [pairing] * sizes.num_layers, layers, [1.0] * sizes.num_layers, 0.1, seed=0)


@pytest.mark.parametrize("layers", [[0, 1], [1]])
@pytest.mark.parametrize("flavour", ["gqa", "mha", "biased", "tied", "wide-heads"])
def test_rules_write_what_the_model_class_expects(flavour, layers):
    config = LlamaConfig(**{**SMALL, **FLAVOURS[flavour]})
    sizes = sizes_of(config)
    shared = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "architectures", "dtype")}
    halved = {
        "num_attention_heads": config.num_attention_heads // 2,
        "num_key_value_heads": config.num_key_value_heads // 2,
        "head_dim": 2 * config.head_dim,
    }
    for variant, rules, changes in (
        ("v1", v1_rules(sizes, layers), halved),
        ("v2", llama_v2_rules(sizes, layers, lambda_bias=0.3), {"lambda_bias": True}),
    ):
        with torch.device("meta"):
            fields = shared | changes | {"variant": variant, "differential_layers": layers}
            model = DiffLlamaForCausalLM(DiffLlamaConfig(**fields))
        expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        assert {rule.target: rule.shape for rule in rules} == expected


def test_export_rules_undo_import_rules():
    sizes = sizes_of(LlamaConfig(**SMALL))
    generator = torch.Generator().manual_seed(0)
    imports = diffllama_rules(sizes)
    exports = diffllama_export_rules(sizes)
    theirs = {name: torch.randn(shape, generator=generator) for rule in imports for name, shape in rule.sources}
    ours = {rule.target: rule.build(*(theirs[name] for name, _ in rule.sources)) for rule in imports}
    again = {rule.target: rule.build(*(ours[name] for name, _ in rule.sources)) for rule in exports}
    assert again.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(again[name], tensor), name
