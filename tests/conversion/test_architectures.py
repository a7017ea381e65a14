"""Other models and adapters: each way out that a refusal names leads to what the model itself computes."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from random_llamas import SMALL, random_llama, random_model, saved, token_ids
from transformers import (
    AutoModelForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from conversion import ConversionError, convert_checkpoint, export_checkpoint
from conversion.describe import describe_checkpoint
from conversion.source.architectures import OTHERS, SUPPORTED, unsupported
from modeling_diff import DiffLlamaForCausalLM


MODELS = {
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}, {}),
    "mistral in its window": (MistralForCausalLM, MistralConfig, {"sliding_window": 64}, {"sliding_window": None}),
    "qwen2": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {},
        {"attention_bias": True, "sliding_window": None},
    ),
}


def logits(model_class, folder):
    model = model_class.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32).eval()
    with torch.no_grad():
        return model(token_ids()).logits


@pytest.mark.parametrize("name", MODELS)
def test_way_out_of_another_model_keeps_its_function(tmp_path, name):
    """The advice followed to the letter, against the other model's own class."""
    model_class, config_class, fields, advice = MODELS[name]
    source = saved(random_model(model_class, config_class(**SMALL, **fields)), tmp_path / "source")
    expected = logits(model_class, source)
    with pytest.raises(ConversionError, match='set model_type to "llama" in a copy') as caught:
        convert_checkpoint(source, tmp_path / "v2", "v2")
    assert all(field in str(caught.value) for field in advice)
    config = json.loads((source / "config.json").read_text()) | advice | {"model_type": "llama"}
    config = {field: value for field, value in config.items() if value is not None}
    (source / "config.json").write_text(json.dumps(config))
    convert_checkpoint(source, tmp_path / "v2", "v2")
    assert torch.equal(logits(DiffLlamaForCausalLM, tmp_path / "v2"), expected)


@pytest.mark.parametrize("model_type", [*OTHERS, "never heard of"])
def test_other_model_is_refused_with_reason_way_out_and_what_is_supported(model_type):
    message = str(unsupported({"model_type": model_type}))
    difference, _, supported = message.partition(". Supported: ")
    assert difference.count(";") >= 1 and all(name in supported for name in SUPPORTED)
    assert "\n" not in message


@pytest.fixture
def adapted(tmp_path):
    """Whole weights and a LoRA that changes what they compute, in one folder."""
    source = saved(random_llama(), tmp_path / "llama")
    plain = logits(AutoModelForCausalLM, source)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(source), config).save_pretrained(source)
    assert not torch.equal(logits(AutoModelForCausalLM, source), plain), "from_pretrained applies it"
    return source, plain


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's get_peft_model asks for it
def test_adapter_next_to_weights_is_refused_and_its_ways_out_convert_the_weights(adapted, tmp_path):
    source, plain = adapted
    for action in (lambda: convert_checkpoint(source, tmp_path / "v2", "v2"), lambda: describe_checkpoint(source)):
        with pytest.raises(
            ConversionError, match=r"applies this adapter.*convert --adapter .*remove adapter_config.json"
        ):
            action()
    assert convert_checkpoint(source, tmp_path / "both", "v2", adapter=source, dry_run=True)
    (source / "adapter_config.json").unlink()
    convert_checkpoint(source, tmp_path / "v2", "v2")
    assert torch.equal(logits(DiffLlamaForCausalLM, tmp_path / "v2"), plain)


def test_adapter_next_to_a_converted_checkpoint_is_not_left_out_of_its_export(tmp_path):
    source = saved(random_llama(), tmp_path / "llama")
    options = {"uncalibrated": True, "lambda_init": "paper"}
    convert_checkpoint(source, tmp_path / "v1", "v1", **options)
    (tmp_path / "v1" / "adapter_config.json").write_text("{}")
    with pytest.raises(ConversionError, match="applies this adapter"):
        export_checkpoint(tmp_path / "v1", tmp_path / "theirs")


def test_folder_called_adapter_config_is_no_adapter(tmp_path):
    """transformers looks for a file."""
    source = saved(random_llama(), tmp_path / "llama")
    (source / "adapter_config.json").mkdir()
    convert_checkpoint(source, tmp_path / "v2", "v2")
    assert torch.equal(logits(DiffLlamaForCausalLM, tmp_path / "v2"), logits(AutoModelForCausalLM, source))
