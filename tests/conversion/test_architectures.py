"""Models of another type, and adapters: each way out that a refusal names leads to what the model itself computes."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from random_llamas import random_llama, saved, token_ids
from transformers import AutoModelForCausalLM

from conversion import ConversionError, convert_checkpoint, export_checkpoint
from conversion.describe import describe_checkpoint
from conversion.source.architectures import ARCHITECTURES, UNSUPPORTED, unsupported
from modeling_diff import DiffLlamaForCausalLM


def logits(model_class, folder):
    model = model_class.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32).eval()
    with torch.no_grad():
        return model(token_ids()).logits


@pytest.mark.parametrize("model_type", [*UNSUPPORTED, "never heard of"])
def test_other_model_is_refused_with_reason_way_out_and_what_is_supported(model_type):
    message = str(unsupported(model_type))
    difference, _, supported = message.partition(". Supported: ")
    assert difference.count(";") >= 1 and all(name in supported for name in ARCHITECTURES)
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


@pytest.mark.transformers(since="5.23", reason="its own from_pretrained opens a folder of that name")
def test_folder_called_adapter_config_is_no_adapter(tmp_path):
    """transformers looks for a file."""
    source = saved(random_llama(), tmp_path / "llama")
    (source / "adapter_config.json").mkdir()
    convert_checkpoint(source, tmp_path / "v2", "v2")
    assert torch.equal(logits(DiffLlamaForCausalLM, tmp_path / "v2"), logits(AutoModelForCausalLM, source))
