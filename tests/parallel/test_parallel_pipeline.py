"""Pipeline parallelism in two processes, and the plan's names against the model's."""

import inspect

import pytest
import torch
from parallel_ranks import TOKENS, generate

from modeling_diff import DiffLlamaForCausalLM


pytestmark = pytest.mark.transformers(since="5.16", reason="it has no DistributedConfig with these plans")


@pytest.fixture(params=["v1", "v2"])
def name(request):
    return request.param


@pytest.fixture
def one_process(checkpoints, name):
    return DiffLlamaForCausalLM.from_pretrained(checkpoints / name)


@pytest.fixture(scope="module")
def pipeline(run_ranks):
    return run_ranks("ranks_pipeline.py")[1]


def test_pipeline_plan_names_modules_and_arguments_of_the_model(one_process):
    backbone_plan = one_process.config.base_model_pp_plan
    assert {"embed_tokens", "layers", "norm"} == set(backbone_plan)
    for module_name, (inputs, _) in backbone_plan.items():
        module = one_process.model.get_submodule(module_name)
        module = module[0] if isinstance(module, torch.nn.ModuleList) else module
        accepted = inspect.signature(one_process.model.forward).parameters.keys()
        accepted |= inspect.signature(module.forward).parameters.keys()
        assert set(inputs) <= accepted, module_name
    assert one_process.pp_plan["lm_head"] == (["hidden_states"], ["logits"])
    assert {f"model.{module_name}" for module_name in backbone_plan} < one_process.pp_plan.keys()


def test_pipeline_stages_hold_different_layers(pipeline, name):
    first, last = (set(results[name]["parameters"]) for results in pipeline)
    assert not first & last
    assert "model.layers.0.self_attn.q_proj.weight" in first
    assert "model.layers.1.self_attn.q_proj.weight" in last


def test_pipeline_logits_equal_one_process(pipeline, one_process, name):
    with torch.no_grad():
        expected = one_process(TOKENS).logits
    for results in pipeline:
        torch.testing.assert_close(results[name]["logits"], expected)


def test_pipeline_generates_as_one_process(pipeline, one_process, name):
    expected = generate(one_process)
    for results in pipeline:
        assert torch.equal(results[name]["generated"], expected)
