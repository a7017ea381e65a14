"""peft on both variants: what trains, what is saved, what comes back, and that merging changes nothing."""

import copy

import pytest
import torch
from trainable_models import random_ids, tiny_model, train
from transformers import BitsAndBytesConfig, GPT2Config, LlamaConfig, TorchAoConfig

from modeling_diff import (
    DiffLlamaForCausalLM,
    DiffLlamaForQuestionAnswering,
    DiffLlamaForSequenceClassification,
    DiffLlamaForTokenClassification,
    DiffLlamaModel,
)
from modeling_diff.diff_sub_norm import SubNorm


peft = pytest.importorskip("peft", reason="peft is not installed")

from modeling_diff.training import LORA_TARGETS, check_adapter, four_bit_config, lora_config  # noqa: E402


# peft 0.21 asks transformers 5.23 by a name that is deprecated there.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

VARIANTS = ("v1", "v2")
# float32 logits of up to about 6: W + B A is rounded once where W x + B (A x) is rounded twice.
MERGE_TOLERANCE = 1e-4


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=random_ids()).logits


def adapted(variant, model=None, **overrides):
    return peft.get_peft_model(
        model or tiny_model(variant), lora_config(model or tiny_model(variant), r=4, **overrides)
    )


def trained(variant, **overrides):
    model = adapted(variant, **overrides)
    train(model)
    return model


def expected_names(variant, differential_layers=(0, 1), dora=False):
    """What LoRA is to train, written out from the layer layout."""
    names = set()
    for layer in range(2):
        attention, mlp = f"layers.{layer}.self_attn", f"layers.{layer}.mlp"
        targets = [f"{attention}.{p}_proj" for p in "qkvo"] + [f"{mlp}.{p}_proj" for p in ("gate", "up", "down")]
        names |= {f"{target}.{matrix}.default.weight" for target in targets for matrix in ("lora_A", "lora_B")}
        names |= {f"{target}.lora_magnitude_vector.default.weight" for target in targets if dora}
        saved = "modules_to_save.default"
        if layer in differential_layers and variant == "v1":
            names |= {f"{attention}.diff_lambda.{saved}.lambda_{name}" for name in ("q1", "k1", "q2", "k2")}
            names |= {f"{attention}.sub_norm.{saved}.weight"}
        elif layer in differential_layers:
            names |= {f"{attention}.lambda_proj.{saved}.weight"}
    return {f"base_model.model.model.{name}" for name in names}


RECIPES = {
    "LoRA": ({}, {}, {}),
    "DoRA": ({}, {"use_dora": True}, {"dora": True}),
    "rsLoRA": ({}, {"use_rslora": True}, {}),
    "one differential layer": ({"differential_layers": [1]}, {}, {"differential_layers": (1,)}),
    "no differential layer": ({"differential_layers": []}, {}, {"differential_layers": ()}),
}


@pytest.mark.parametrize("differential_layers", [None, [1], []])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_servable_adapter_is_lora_alone(variant, differential_layers):
    """vLLM refuses modules_to_save; V2's lambda_proj is a target, V1's lambda and norm are not trained."""
    model = adapted(variant, tiny_model(variant, differential_layers=differential_layers), servable=True)
    names = {name.rpartition(".default")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in names} == {"lora_A", "lora_B"}
    modules = {name.split(".")[-2] for name in names}
    projections = {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    assert modules == projections | ({"lambda_proj"} if variant == "v2" and differential_layers != [] else set())
    assert train(model) == []


def test_a_servable_adapter_of_a_trained_lambda_loads_and_merges(tmp_path):
    model = trained("v2", servable=True)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    base = tiny_model("v2")
    check_adapter(base, tmp_path)
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path))
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=0)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), expected, rtol=0, atol=MERGE_TOLERANCE)


@pytest.mark.parametrize(
    "override", [{"modules_to_save": ["lambda_proj"]}, {"use_dora": True}, {"bias": "all"}], ids=str
)
def test_what_vllm_does_not_serve_is_refused_by_name(override):
    (name,) = override
    with pytest.raises(ValueError, match=f"{name}=.*: vLLM serves LoRA alone"):
        lora_config(tiny_model("v2"), servable=True, **override)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_parameter_of_a_recipe_receives_a_gradient(variant, recipe):
    config, options, expectation = RECIPES[recipe]
    model = adapted(variant, tiny_model(variant, **config), **options)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == expected_names(variant, **expectation)
    assert train(model) == []  # from the second step on: at the first, B = 0 leaves A without


@pytest.mark.parametrize("variant", VARIANTS)
def test_modules_that_train_whole_are_called_with_an_input(variant):
    """PEFT 0.18, which LLaMA-Factory pins, wraps them in modules that require one."""
    model = tiny_model(variant)
    counts = []
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in lora_config(model).modules_to_save:
            module.register_forward_pre_hook(lambda _, inputs: counts.append(len(inputs)))
    logits(model)
    assert counts
    assert all(counts)


@pytest.mark.parametrize("variant", VARIANTS)
def test_full_fine_tuning_reaches_every_parameter(variant):
    model = tiny_model(variant)
    assert all(p.requires_grad for p in model.parameters())
    assert train(model, steps=1) == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_lora_without_targets_finds_them(variant):
    import modeling_diff.training  # noqa: F401  registers the targets

    model = peft.get_peft_model(tiny_model(variant), peft.LoraConfig())
    named = {name.removesuffix(".lora_A.default.weight") for name, _ in model.named_parameters() if "lora_A" in name}
    assert {name.rpartition(".")[2] for name in named} == {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }


METHODS = {
    "IA3": lambda: peft.IA3Config(),
    "AdaLoRA": lambda: peft.AdaLoraConfig(total_step=10),
    "OFT": lambda: peft.OFTConfig(),
    "LoHa": lambda: peft.LoHaConfig(),
    "LoKr": lambda: peft.LoKrConfig(),
    "VeRA": lambda: peft.VeraConfig(),
    "HRA": lambda: peft.HRAConfig(),
    "prefix tuning": lambda: peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "prompt tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "norm tuning": lambda: peft.LNTuningConfig(),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:Position ids are not supported", "ignore:Unsupported layer type")
def test_other_methods_train_save_and_come_back(variant, method, tmp_path):
    model = peft.get_peft_model(tiny_model(variant), METHODS[method]())
    before = logits(model)
    assert train(model) == []
    after = logits(model)
    assert not torch.equal(before, after)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(tiny_model(variant), tmp_path)), after)
    generated = model.generate(
        input_ids=random_ids(), attention_mask=torch.ones(2, 9), max_new_tokens=3, min_length=12
    )
    assert generated.shape == (2, 12)


def test_llama_adapter_is_refused():
    with pytest.raises(ValueError, match="Unsupported model type for adaption prompt: 'diff_llama'"):
        peft.get_peft_model(tiny_model("v1"), peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=1))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
def test_saved_adapter_gives_the_same_logits_and_merges_into_them(variant, options, tmp_path):
    model = trained(variant, **options)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    reloaded = peft.PeftModel.from_pretrained(tiny_model(variant), tmp_path / "adapter")
    assert torch.equal(logits(reloaded), expected)
    assert not torch.equal(logits(tiny_model(variant)), expected)

    reloaded.merge_adapter()
    torch.testing.assert_close(logits(reloaded), expected, rtol=0, atol=MERGE_TOLERANCE)
    reloaded.unmerge_adapter()
    torch.testing.assert_close(logits(reloaded), expected, rtol=0, atol=MERGE_TOLERANCE)

    merged = reloaded.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=MERGE_TOLERANCE)
    merged.save_pretrained(tmp_path / "merged")
    from_disk, report = type(merged).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(from_disk), logits(merged))


@pytest.mark.parametrize("variant", VARIANTS)
def test_new_modules_move_and_come_back_from_disk(variant, tmp_path):
    model = trained(variant)
    model.save_pretrained(tmp_path)
    merged = peft.PeftModel.from_pretrained(tiny_model(variant), tmp_path).merge_and_unload()
    start = tiny_model(variant).state_dict()
    trained_state = model.state_dict()
    new = [name for name in start if "lambda" in name or "sub_norm" in name]
    assert len(new) == {"v1": 2 * 5, "v2": 2}[variant]
    for name in new:
        module, _, parameter = name.rpartition(".")
        saved = trained_state[f"base_model.model.{module}.modules_to_save.default.{parameter}"]
        assert not torch.equal(saved, start[name]), name
        assert torch.equal(merged.state_dict()[name], saved), name
        assert torch.equal(trained_state[f"base_model.model.{module}.original_module.{parameter}"], start[name]), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_adapters_switch_and_can_be_turned_off(variant):
    base = tiny_model(variant)
    plain = logits(base)
    model = adapted(variant, base)
    train(model)
    first = logits(model)
    model.add_adapter("second", lora_config(base, r=2))
    model.set_adapter("second")
    torch.testing.assert_close(logits(model), plain, rtol=0, atol=0)
    train(model)
    second = logits(model)
    model.set_adapter("default")
    assert torch.equal(logits(model), first) and not torch.equal(first, second)
    model.set_adapter("second")
    assert torch.equal(logits(model), second)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_adapters_at_once_add_up(variant):
    """Two LoRAs at once give what the base plus both products gives; peft stacks without modules_to_save alone."""
    model = adapted(variant, modules_to_save=None)
    model.add_adapter("second", lora_config(tiny_model(variant), r=2, modules_to_save=None))
    model.base_model.set_adapter(["default", "second"])
    assert train(model) == []
    expected = tiny_model(variant)
    state = expected.state_dict()
    adapters = model.state_dict()
    for name, weight in state.items():
        for adapter, rank in (("default", 4), ("second", 2)):
            prefix = f"base_model.model.{name.removesuffix('.weight')}"
            if (b := adapters.get(f"{prefix}.lora_B.{adapter}.weight")) is not None:
                weight.add_(b @ adapters[f"{prefix}.lora_A.{adapter}.weight"], alpha=32 / rank)
    torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=MERGE_TOLERANCE)
    model.base_model.merge_adapter()
    torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=MERGE_TOLERANCE)


@pytest.mark.parametrize("trained_on, loaded_on", [("v1", "v2"), ("v2", "v1")])
def test_adapter_of_the_other_variant_is_refused(trained_on, loaded_on, tmp_path):
    adapted(trained_on).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"adapter of variant '{trained_on}', and the model is '{loaded_on}'"):
        check_adapter(tiny_model(loaded_on), tmp_path)
    check_adapter(tiny_model(trained_on), tmp_path)
    with pytest.raises(ValueError, match=r"no adapter_model\.safetensors"):
        check_adapter(tiny_model(trained_on), tmp_path / "nowhere")


def test_kernel_never_normalizes_in_the_place_of_an_adapter():
    model = adapted("v1")
    attention = model.base_model.model.model.layers[0].self_attn
    assert attention.fusable_norm() == {}
    attention = model.merge_and_unload().model.layers[0].self_attn
    assert type(attention.sub_norm) is SubNorm
    assert attention.fusable_norm()["norm_weight"] is attention.sub_norm.weight


@pytest.mark.parametrize(
    "model_class, task, head",
    [
        (DiffLlamaForSequenceClassification, "SEQ_CLS", "score"),
        (DiffLlamaForTokenClassification, "TOKEN_CLS", "score"),
        (DiffLlamaForQuestionAnswering, "QUESTION_ANS", "qa_outputs"),
        (DiffLlamaModel, "FEATURE_EXTRACTION", "lambda_proj"),  # without a head
    ],
)
def test_heads_get_their_task_and_train(model_class, task, head):
    model = tiny_model("v2", model_class)
    config = lora_config(model)
    assert config.task_type == task
    trainable = [name for name, p in peft.get_peft_model(model, config).named_parameters() if p.requires_grad]
    assert any(f"{head}.modules_to_save" in name for name in trainable)
    assert any("lambda_proj.modules_to_save" in name for name in trainable)


def test_a_llama_gets_the_same_targets_and_nothing_whole():
    config = lora_config(LlamaConfig())
    assert config.target_modules == set(LORA_TARGETS)
    assert config.modules_to_save is None
    assert (config.r, config.lora_alpha, config.task_type) == (16, 32, "CAUSAL_LM")


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="model_type='gpt2'"):
        lora_config(GPT2Config())


@pytest.mark.parametrize("variant", VARIANTS)
def test_four_bit_base_trains_and_comes_back(variant, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    tiny_model(variant, hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "base")

    def load():
        model_class = type(tiny_model(variant))
        settings = {"quantization_config": four_bit_config(torch.float32), "dtype": torch.float32}
        return model_class.from_pretrained(tmp_path / "base", **settings)

    base = load()
    assert type(base.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    model = peft.get_peft_model(base, lora_config(base, r=4))
    assert train(model) == []
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(peft.PeftModel.from_pretrained(load(), tmp_path / "adapter")), expected)


@pytest.mark.parametrize(
    "model_class, head, labels",
    [
        (DiffLlamaForSequenceClassification, "score", {"labels": torch.tensor([0, 1])}),
        (DiffLlamaForTokenClassification, "score", {"labels": random_ids() % 2}),
        (
            DiffLlamaForQuestionAnswering,
            "qa_outputs",
            {name: torch.tensor([3, 4]) for name in ("start_positions", "end_positions")},
        ),
    ],
)
def test_head_on_a_four_bit_base_trains(model_class, head, labels, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    tiny_model("v2", model_class, hidden_size=64, intermediate_size=64).save_pretrained(tmp_path)
    base = model_class.from_pretrained(
        tmp_path, quantization_config=four_bit_config(torch.float32), dtype=torch.float32
    )
    model = peft.get_peft_model(base, lora_config(base, r=4))
    model(input_ids=random_ids(), **labels).loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if f"{head}.modules_to_save.default.weight" in name]
    assert len(gradients) == 1 and gradients[0].abs().max() > 0


QUANTIZATIONS = {
    "8 bits": {"load_in_8bit": True},
    "4 bits": {"load_in_4bit": True},
    "4 bits stored as bfloat16": {"load_in_4bit": True, "bnb_4bit_quant_storage": torch.bfloat16},
    "modules to skip": {"load_in_4bit": True, "llm_int8_skip_modules": ["lm_head"]},
}


@pytest.mark.parametrize("bits", QUANTIZATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_lambda_is_never_quantized_and_trains(variant, bits, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    tiny_model(variant, hidden_size=64, intermediate_size=64).save_pretrained(tmp_path)
    base = DiffLlamaForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**QUANTIZATIONS[bits]), dtype=torch.float32
    )
    assert "Linear" in type(base.model.layers[0].self_attn.q_proj).__name__
    assert type(base.model.layers[0].self_attn.q_proj) is not torch.nn.Linear
    assert train(peft.get_peft_model(base, lora_config(base, r=4))) == []


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "model_class, head", [(DiffLlamaForTokenClassification, "score"), (DiffLlamaForQuestionAnswering, "qa_outputs")]
)
def test_heads_are_never_quantized(variant, model_class, head, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    tiny_model(variant, model_class, hidden_size=64, intermediate_size=64).save_pretrained(tmp_path)
    base = model_class.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    assert type(getattr(base, head)) is torch.nn.Linear
    assert type(base.model.layers[0].self_attn.q_proj) is not torch.nn.Linear


def test_lambda_is_never_quantized_by_torchao(tmp_path):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    tiny_model("v2").save_pretrained(tmp_path)
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    attention = DiffLlamaForCausalLM.from_pretrained(tmp_path, quantization_config=config).model.layers[0].self_attn
    assert type(attention.lambda_proj.weight) is torch.nn.Parameter
    assert type(attention.q_proj.weight) is not torch.nn.Parameter


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_never_quantized_is_loaded_in_the_models_dtype(dtype, tmp_path):
    tiny_model("v2").save_pretrained(tmp_path)
    model = DiffLlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert logits(model).isfinite().all()


def test_quantized_module_is_refused_before_it_is_trained_whole(tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    tiny_model("v2", hidden_size=64, intermediate_size=64).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["o_proj"])
    base = DiffLlamaForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    with pytest.raises(ValueError, match=r"lm_head: is quantized.*llm_int8_skip_modules"):
        lora_config(base, modules_to_save=["lambda_proj", "lm_head"])


def test_package_imports_without_peft():
    import subprocess
    import sys

    code = (
        "import sys; sys.modules['peft'] = None\n"
        "import modeling_diff, modeling_diff.training as t\n"
        "assert t.parameter_groups\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


@pytest.mark.parametrize("variant", VARIANTS)
def test_adapted_model_can_be_copied(variant):
    model = trained(variant)
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
