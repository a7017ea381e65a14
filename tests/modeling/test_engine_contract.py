"""
What vLLM's transformers backend asks of a model, stated without vLLM (.ci/serving runs vLLM itself).

Rules as in vLLM 0.32 and 0.33, vllm/model_executor/models/transformers.
"""

import ast
import inspect
import sys
import textwrap
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import AttentionInterface
from transformers.models.llama.modeling_llama import LlamaAttention

from modeling_diff import DiffLlamaConfig, DiffLlamaModel
from modeling_diff.diff_attention_modules import DiffLlamaAttention, MixedAttention, PairedLlamaAttention
from modeling_diff.diff_engines import VLLM_CONVERTORS, register_with_vllm
from modeling_diff.diff_transformers_compat import HAS_TENSOR_PARALLEL


ATTENTION_CLASSES = [LlamaAttention, DiffLlamaAttention, MixedAttention, PairedLlamaAttention]
# float32 logits of up to about 6.
FLOAT32_ATOL = 2e-5


def forward_tree(attention_class):
    return ast.parse(textwrap.dedent(inspect.getsource(attention_class.forward)))


def calls_of(tree, is_callee):
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call) and is_callee(node.func)]


def is_own_module(name):
    return lambda callee: ast.unparse(callee) == f"self.{name}"


# LLaMA's own attention shows that the rules are stated as they are meant.
@pytest.mark.parametrize("attention_class", ATTENTION_CLASSES)
def test_forward_holds_one_interface_call_with_readable_scaling(attention_class):
    tree = forward_tree(attention_class)
    names = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign | ast.AnnAssign) or not isinstance(node.value, ast.Call):
            continue
        if ast.unparse(node.value.func).startswith("ALL_ATTENTION_FUNCTIONS."):
            names |= {target.id for target in (node.targets if isinstance(node, ast.Assign) else [node.target])}
    (call,) = calls_of(tree, lambda callee: isinstance(callee, ast.Name) and callee.id in names)
    (scaling,) = (keyword.value for keyword in call.keywords if keyword.arg == "scaling")
    assert ast.unparse(scaling) == "self.scaling"


def test_source_of_the_model_lets_the_attention_be_chosen():
    """transformers and vLLM read the model's own file: an attention class in it has to hold the interface call."""
    assert DiffLlamaModel._can_set_attn_implementation()


@pytest.mark.parametrize("attention_class", ATTENTION_CLASSES)
def test_projections_can_be_fused(attention_class):
    tree = forward_tree(attention_class)
    for name in ("q_proj", "k_proj", "v_proj"):
        (call,) = calls_of(tree, is_own_module(name))
        assert [ast.unparse(argument) for argument in call.args] == ["hidden_states"]
    # A fourth module of the same input would leave open which three are the queries, keys and values.
    assert not calls_of(tree, is_own_module("lambda_proj"))


def engine_attention(module, query, key, value, attention_mask, scaling, attention_instances=None, **kwargs):
    """One sequence of packed tokens, without a mask, to (tokens, 2HD), as vLLM's attention does."""
    num_tokens = query.shape[-2]
    assert attention_mask is None
    assert query.shape[1] == attention_instances[module.layer_idx].num_heads
    assert query.shape[-1] == key.shape[-1] == value.shape[-1]
    outputs = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return outputs.transpose(1, 2).reshape(num_tokens, -1), None


@pytest.fixture
def engine_model(tiny_model, monkeypatch):
    """Builds a model and vLLM's keyword arguments of its forward pass."""
    monkeypatch.setitem(AttentionInterface._global_mapping, "vllm", engine_attention)

    def build(variant, num_heads=8, **overrides):
        model = tiny_model(variant, **overrides)
        instances = dict.fromkeys(range(model.config.num_hidden_layers), SimpleNamespace(num_heads=num_heads))
        return model, {"use_cache": False, "return_dict": False, "attention_instances": instances}

    return build


CHECKPOINTS = [
    ("v1", {}),
    ("v2", {}),
    ("v1", {"differential_layers": [1]}),
    ("v1", {"differential_heads": [[0, 2], [1]]}),
]


@torch.no_grad()
@pytest.mark.parametrize(("variant", "differential"), CHECKPOINTS)
def test_attention_of_an_engine_gives_equal_logits(engine_model, random_ids, variant, differential):
    extras = {"attention_bias": True, "attention_out_bias": False, "use_qk_norm": True}
    model, arguments = engine_model(variant, **differential, **extras)
    input_ids = random_ids(1, 13)
    model.set_attn_implementation("eager")
    expected = model(input_ids).logits
    model.config._attn_implementation = "vllm"
    torch.testing.assert_close(model(input_ids, **arguments)[0], expected, rtol=0, atol=FLOAT32_ATOL)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(input_ids, **arguments)[0], expected, rtol=0, atol=FLOAT32_ATOL)


@pytest.mark.parametrize(("variant", "differential_layers"), [("v1", None), ("v2", None), ("v1", [])])
def test_an_engine_that_counts_one_map_per_head_is_refused(engine_model, random_ids, variant, differential_layers):
    model, arguments = engine_model(variant, num_heads=4, differential_layers=differential_layers)
    model.config._attn_implementation = "vllm"
    with pytest.raises(
        ValueError, match=r"the engine counts 4 attention heads in layer 0, and the attention call has 8"
    ):
        model(random_ids(1, 5), **arguments)


def test_a_rank_that_does_not_know_its_differential_heads_is_refused(engine_model, random_ids):
    model, arguments = engine_model("v1", num_heads=4, differential_heads=[[0, 2], [1]])
    attention = model.model.layers[0].self_attn
    for name in ("q_proj", "k_proj", "v_proj"):  # half of them, as the first of two ranks has
        weight = getattr(attention, name).weight
        weight.data = weight.data[: len(weight) // 2]
    model.config._attn_implementation = "vllm"
    with pytest.raises(ValueError, match=r"differential_heads: layer 0 holds 2 heads and knows of 4 .*pip install"):
        model(random_ids(1, 5), **arguments)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("differential_layers", [[], [0]])
def test_v2_with_llama_layers_is_refused_by_name(tiny_config, differential_layers, engine):
    config = tiny_config("v2", differential_layers=differential_layers)
    config._attn_implementation = engine
    with pytest.raises(ValueError, match=r"differential_layers=.* every layer is differential"):
        DiffLlamaModel(config)


def test_sglang_finds_nothing_to_refuse_or_replace(tiny_config, variant, monkeypatch):
    """SGLang 0.5.23 refuses other styles than these, and puts its own kernel where a class is named ...RMSNorm."""
    monkeypatch.setitem(AttentionInterface._global_mapping, "sglang", engine_attention)
    config = tiny_config(variant)
    config._attn_implementation = "sglang"
    model = DiffLlamaModel(config)
    styles = {"colwise", "colwise_rep", "rowwise", "rowwise_rep", "replicate", "embedding_rowwise"}
    assert {name: style for name, style in model.tp_plan.items() if style not in styles} == {}
    named = {name for name, module in model.named_modules() if type(module).__name__.endswith("RMSNorm")}
    assert {name.rpartition(".")[2] for name in named} == {"input_layernorm", "post_attention_layernorm", "norm"}


def test_sglang_that_counts_one_map_per_head_is_refused(engine_model, random_ids, variant):
    model, arguments = engine_model(variant)
    model.config._attn_implementation = "vllm"
    instances = dict.fromkeys(range(2), SimpleNamespace(tp_q_head_num=4))
    with pytest.raises(ValueError, match=r"the engine counts 4 attention heads"):
        model(random_ids(1, 5), **(arguments | {"attention_instances": instances}))


class ConvertorBase:
    """As vLLM's ModelArchConfigConvertorBase reads a config."""

    def __init__(self, hf_config, hf_text_config):
        self.hf_config = hf_config
        self.hf_text_config = hf_text_config

    def get_total_num_attention_heads(self):
        return self.hf_text_config.num_attention_heads


def test_vllm_counts_both_maps_of_a_head(tiny_config, variant, monkeypatch):
    module = ModuleType(VLLM_CONVERTORS)
    module.MODEL_ARCH_CONFIG_CONVERTORS = {}
    module.ModelArchConfigConvertorBase = ConvertorBase
    monkeypatch.setitem(sys.modules, VLLM_CONVERTORS, module)
    config = tiny_config(variant, head_dim=24)
    convertor = module.MODEL_ARCH_CONFIG_CONVERTORS["diff_llama"](config, config)
    heads = (convertor.get_total_num_attention_heads(), convertor.get_total_num_kv_heads(), convertor.get_head_size())
    assert heads == (8, 2, 24)
    assert config.num_attention_heads == 4


def test_a_vllm_without_the_table_is_left_alone(monkeypatch):
    module = ModuleType(VLLM_CONVERTORS)
    monkeypatch.setitem(sys.modules, VLLM_CONVERTORS, module)
    register_with_vllm()
    DiffLlamaConfig()
    assert not hasattr(module, "MODEL_ARCH_CONFIG_CONVERTORS")


@pytest.mark.skipif(not HAS_TENSOR_PARALLEL, reason="this transformers has another interface for plans")
def test_projections_keep_the_plan_of_llama(tiny_model, variant):
    model = tiny_model(variant)
    plan = model.tp_plan
    for name in ("q_proj", "k_proj", "v_proj"):
        assert plan[f"model.layers.*.self_attn.{name}"] == "colwise"
    assert plan["model.layers.*.self_attn.o_proj"] == "rowwise"
    if variant == "v2":
        assert plan["model.layers.*.self_attn.lambda_proj"] == "colwise"
