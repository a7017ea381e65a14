"""Adapters made for another model are refused by name on every road; a model's own load without a word."""

import json
import shutil
import warnings

import pytest
import torch
from trainable_models import random_ids, tiny_model
from transformers import LlamaForCausalLM

from modeling_diff import DiffLlamaForCausalLM
from modeling_diff.training import check_adapter, lora_config


peft = pytest.importorskip("peft", reason="peft is not installed")

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

VARIANTS = ("v1", "v2")
TARGETS = ["q_proj", "o_proj", "up_proj"]


def by_peft(model, folder):
    return peft.PeftModel.from_pretrained(model, folder)


def by_transformers(model, folder):
    model.load_adapter(str(folder))
    return model


def as_second_adapter(model, folder):
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=TARGETS, task_type="CAUSAL_LM"))
    adapted.load_adapter(folder, "second")
    adapted.set_adapter("second")
    return adapted


ROADS = [by_peft, by_transformers, as_second_adapter]


def save_adapter(model, folder, config=None):
    """A LoRA on `model` whose second matrices are not zero."""
    config = config or peft.LoraConfig(target_modules=TARGETS, task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(folder)
    return adapted.eval()


def set_base(folder, base):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A LLaMA whose tensors have V1's shapes, V1 and V2 on disk, and a LoRA of each: (models, adapters) by name."""
    root = tmp_path_factory.mktemp("saved")
    llama = tiny_model("llama", num_attention_heads=8, num_key_value_heads=4, head_dim=4)
    models, adapters = {}, {}
    for name, model in [("llama", llama), *((variant, tiny_model(variant)) for variant in VARIANTS)]:
        models[name], adapters[name] = root / name, root / f"adapter of {name}"
        model.save_pretrained(models[name])
        save_adapter(type(model).from_pretrained(models[name]), adapters[name])
    return models, adapters


@pytest.fixture
def load(saved):
    return lambda variant: DiffLlamaForCausalLM.from_pretrained(saved[0][variant])


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_adapter_of_a_llama_is_refused_by_name(saved, load, variant, road):
    models, adapters = saved
    with pytest.raises(ValueError, match=r"made for .*llama \(model_type llama\).*diff-llama convert") as caught:
        road(load(variant), adapters["llama"])
    assert str(models["llama"]) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="model_type llama"):
        check_adapter(load(variant), adapters["llama"])


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("variant, other", [("v1", "v2"), ("v2", "v1")])
def test_adapter_of_the_other_variant_is_refused_without_tensors_that_tell(saved, load, variant, other, road):
    with pytest.raises(ValueError, match=f"model_type diff_llama {other}"):
        road(load(variant), saved[1][other])


@pytest.mark.parametrize("road", ROADS)
def test_adapter_whose_model_is_gone_is_warned_of_or_refused_by_its_shapes(saved, load, tmp_path, road):
    folder = shutil.copytree(saved[1]["llama"], tmp_path / "adapter")
    set_base(folder, "meta-llama/not-here")
    with pytest.warns(UserWarning, match=r"made for meta-llama/not-here, which is not on this machine.*convert"):
        road(load("v1"), folder)
    with pytest.raises(ValueError, match=r"self_attn.q_proj has 32 rows in it, and 64 in this diff_llama v2.*convert"):
        road(load("v2"), folder)


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_own_adapter_loads_without_a_word_and_computes_the_same(saved, load, variant, road, tmp_path, monkeypatch):
    models, adapters = saved
    expected = peft.PeftModel.from_pretrained(load(variant), adapters[variant])(random_ids()).logits
    moved = shutil.copytree(adapters[variant], tmp_path / "adapter")
    monkeypatch.chdir(models[variant].parent)
    for base in (str(models[variant]), variant):  # trained on the same folder, called by its relative path
        set_base(moved, base)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            loaded = road(load(variant), moved)
        assert torch.equal(loaded(random_ids()).logits, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_own_modules_in_the_adapter_tell_where_its_model_is_gone(load, variant, tmp_path):
    save_adapter(load(variant), tmp_path, lora_config(load(variant)))
    set_base(tmp_path, "someone/not-here")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        by_peft(load(variant), tmp_path)
        by_transformers(load(variant), tmp_path)


@pytest.mark.parametrize("variant", VARIANTS)
def test_models_without_a_name_load_their_adapters_without_a_word(variant, tmp_path):
    expected = save_adapter(tiny_model(variant), tmp_path)(random_ids()).logits
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert torch.equal(by_peft(tiny_model(variant), tmp_path).eval()(random_ids()).logits, expected)


@pytest.mark.parametrize("method", ["LoHaConfig", "IA3Config", "OFTConfig"])
def test_adapters_of_other_methods_are_refused_as_well(saved, load, method, tmp_path):
    models, _ = saved
    targets = {"target_modules": ["q_proj", "up_proj"]} | (
        {"feedforward_modules": []} if method == "IA3Config" else {}
    )
    config = getattr(peft, method)(task_type="CAUSAL_LM", **targets)
    save_adapter(LlamaForCausalLM.from_pretrained(models["llama"]), tmp_path, config)
    with pytest.raises(ValueError, match="model_type llama"):
        by_peft(load("v1"), tmp_path)


def test_state_dict_of_a_whole_adapted_model_loads_again(load, saved):
    adapted = peft.PeftModel.from_pretrained(load("v1"), saved[1]["v1"])
    state = {name: tensor + 1 for name, tensor in adapted.state_dict().items()}
    adapted.load_state_dict(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in adapted.state_dict().items())
