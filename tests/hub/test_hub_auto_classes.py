"""Auto classes give our classes, never transformers' namesakes, and every saved config names all of them."""

import json

import pytest
import torch
import transformers
from hub_models import HEADS, VARIANTS, head_output
from tiny_models import SIZES, tiny_model
from transformers.models.diffllama import DiffLlamaConfig as BuiltInConfig
from transformers.models.diffllama import DiffLlamaForCausalLM as BuiltInForCausalLM

import modeling_diff
from modeling_diff import DiffLlamaConfig, DiffLlamaForCausalLM


AUTO_MAP = {"AutoConfig": "configuration_diff_llama.DiffLlamaConfig"} | {
    auto_class: f"modeling_diff_llama.{class_name}" for auto_class, class_name in HEADS.items()
}


@pytest.fixture(params=[(variant, auto_class) for variant in VARIANTS for auto_class in HEADS], ids="-".join)
def case(request):
    return request.param


@pytest.fixture(params=VARIANTS)
def variant(request):
    return request.param


def assert_ours(model, class_name: str) -> None:
    assert type(model).__name__ == class_name
    assert type(model).__module__ == "modeling_diff.modeling_diff_llama"
    assert type(model.base_model).__module__ == "modeling_diff.modeling_diff_llama"
    for layer in model.base_model.layers:
        assert type(layer.self_attn).__module__ == "modeling_diff.diff_attention_modules"


def test_auto_config_gives_our_config(saved, case):
    config = transformers.AutoConfig.from_pretrained(saved[case])
    assert type(config).__module__ == "modeling_diff.configuration_diff_llama"
    assert type(transformers.AutoConfig.for_model("diff_llama")) is DiffLlamaConfig


def test_auto_class_gives_our_head_from_a_checkpoint(saved, expected, case):
    model = getattr(transformers, case[1]).from_pretrained(saved[case])
    assert_ours(model, HEADS[case[1]])
    torch.testing.assert_close(head_output(model), expected[case]["output"], rtol=0, atol=0)


def test_auto_class_gives_our_head_from_a_config(tiny_config, case):
    variant, auto_class = case
    assert_ours(getattr(transformers, auto_class).from_config(tiny_config(variant)), HEADS[auto_class])


def test_no_other_auto_class_builds_transformers_namesake_from_our_config(tiny_config):
    config = tiny_config("v1")
    auto_classes = [
        getattr(transformers, name)
        for name in dir(transformers)
        if name.startswith("AutoModel") and hasattr(getattr(transformers, name), "_model_mapping")
    ]
    assert len(auto_classes) > 20
    for auto_class in auto_classes:
        if auto_class.__name__ not in HEADS and type(config) in auto_class._model_mapping:
            model = auto_class.from_config(config)
            assert type(model).__module__ == "modeling_diff.modeling_diff_llama", auto_class.__name__


def test_registration_leaves_transformers_own_diffllama_alone(tmp_path):
    built_in = BuiltInConfig(**SIZES)
    assert type(transformers.AutoModelForCausalLM.from_config(built_in)) is BuiltInForCausalLM
    built_in.save_pretrained(tmp_path)
    assert type(transformers.AutoConfig.from_pretrained(tmp_path)) is BuiltInConfig


def test_auto_map_of_a_saved_model_names_every_head(saved, case):
    assert json.loads((saved[case] / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_auto_map_of_a_saved_config_names_every_head(tiny_config, variant, tmp_path):
    config = tiny_config(variant)
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert json.loads(config.to_json_string(use_diff=True))["auto_map"] == AUTO_MAP
    assert (tmp_path / "configuration_diff_llama.py").is_file()


def test_changing_one_configs_auto_map_changes_no_other(tiny_config):
    tiny_config("v1").to_dict()["auto_map"].clear()
    assert tiny_config("v1").to_dict()["auto_map"] == AUTO_MAP


def test_architectures_of_a_saved_model_name_its_head(saved, case):
    config = json.loads((saved[case] / "config.json").read_text())
    assert config["architectures"] == [HEADS[case[1]]]
    assert config["model_type"] == "diff_llama"


def test_config_reloads_equal(tiny_config, variant, tmp_path):
    config = tiny_config(
        variant,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 5e5,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        differential_layers=[1],
        **(
            {"lambda_init": [-0.0099, 0.25], "sub_norm_eps": [1e-5, 1e-3]}
            if variant == "v1"
            else {"lambda_bias": True}
        ),
    )
    config.save_pretrained(tmp_path)
    for reloaded in (DiffLlamaConfig.from_pretrained(tmp_path), transformers.AutoConfig.from_pretrained(tmp_path)):
        assert reloaded.to_diff_dict() == config.to_diff_dict()
        assert reloaded.map_dim == config.map_dim
        reloaded.save_pretrained(tmp_path / "again")
        assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "config.json").read_text()


def test_saved_config_holds_no_plan(saved, case):
    """The parallel plans follow from the other fields; a saved one would outlive a change of the code."""
    assert not [key for key in json.loads((saved[case] / "config.json").read_text()) if key.endswith("_plan")]


def test_transformers_own_diffllama_folder_is_refused_by_name(tmp_path):
    BuiltInConfig(**SIZES).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lambda_std_dev|model_type='diffllama'"):
        DiffLlamaConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lambda_std_dev|model_type='diffllama'"):
        DiffLlamaForCausalLM.from_pretrained(tmp_path)


def test_llama_folder_is_refused_by_name(tmp_path):
    """Its weights have the shapes of a V1 model: without an error LLaMA would be loaded as a model it is not."""
    tiny_model("llama").save_pretrained(tmp_path)
    for load in (DiffLlamaConfig.from_pretrained, DiffLlamaForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=r"model_type='llama'.*diff-llama convert"):
            load(tmp_path)


def test_package_exports_every_head():
    for class_name in HEADS.values():
        assert class_name in modeling_diff.__all__
        assert getattr(modeling_diff, class_name).config_class is DiffLlamaConfig
