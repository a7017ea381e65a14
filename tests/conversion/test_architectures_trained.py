"""Conversions of LLaMA's relatives in use: calibrated, healed, with LoRA, and with adapters of the source."""

import pytest
import torch
from healing_toys import TOY, write_training_rows
from planted_pairs import CONTEXT, kl_nats, planted_llama, random_tokens
from random_llamas import RELATIVES, random_relative, saved, token_ids, write_rows
from test_convert_adapter import LINEAR, make_adapter

from conversion import convert_checkpoint, verify_checkpoint
from conversion.calibration.calibrate import Stage, calibrate
from conversion.calibration.gradient_fit import LocalFit
from conversion.calibration.model import calibrated_model
from conversion.heal import heal_checkpoint
from conversion.healing.options import HealingOptions
from conversion.source.architectures import ARCHITECTURES
from modeling_diff import DiffLlamaForCausalLM


peft = pytest.importorskip("peft", reason="peft is not installed")

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

WITH_NEW_TENSORS = ["qwen2", "qwen3"]
COPY = (Stage.COPY,)
CLOSED_FORM = (Stage.COPY, Stage.PAIRING, Stage.REFIT)
QUICK = LocalFit(steps=30, batch_tokens=8 * CONTEXT)
# float32 logits of up to about 60, through two roundings of every product where merging rounds once.
TOLERANCE = 1e-3


@pytest.fixture(scope="module", params=WITH_NEW_TENSORS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def source(name, tmp_path_factory):
    return saved(random_relative(name), tmp_path_factory.mktemp(name) / "source")


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    """A folder with v1/, calibrated in closed form, and v2/."""
    folder = tmp_path_factory.mktemp("converted")
    text = write_rows(folder / "text.jsonl", 8, 128)
    stages = ("pairing", "refit", "values")
    convert_checkpoint(source, folder / "v1", "v1", calibration=text, calibration_tokens=8 * 128, stages=stages)
    convert_checkpoint(source, folder / "v2", "v2")
    return folder


@pytest.mark.parametrize("name", RELATIVES)
def test_planted_pairs_are_found_and_converted(tmp_path, name):
    model_class, config_class, _ = RELATIVES[name]
    model, planted = planted_llama("twins", 4, model_class=model_class, config_class=config_class)
    held_out = random_tokens(8, seed=9)
    folder = saved(model, tmp_path)
    kl = {}
    for stages, norm in ((COPY, "neutral"), (CLOSED_FORM, "neutral"), (COPY, "strict"), (tuple(Stage), "strict")):
        result = calibrate(folder, model.config, random_tokens(32), stages=stages, norm=norm, local=QUICK)
        kl[len(stages), norm] = kl_nats(model, calibrated_model(model, result), held_out)
        found = [
            {frozenset(pair.kv_heads[i : i + 2]) for i in range(0, len(pair.kv_heads), 2)} for pair in result.pairings
        ]
        assert stages == COPY or found == planted
    assert kl[1, "neutral"] > 0.1 and kl[3, "neutral"] < 0.01, kl
    assert kl[5, "strict"] < 0.25 * kl[1, "strict"], kl


def test_calibrated_checkpoint_has_half_the_heads_and_every_tensor_of_the_source(converted, source, name):
    model, info = DiffLlamaForCausalLM.from_pretrained(converted / "v1", output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (2, 1)
    theirs = ARCHITECTURES[name].model_class.from_pretrained(source).state_dict()
    ours = model.state_dict()
    assert {key for key in ours if "diff_lambda" not in key and "sub_norm" not in key} == theirs.keys()
    for key, tensor in theirs.items():
        kept = "q_norm" in key or "k_norm" in key or ".mlp." in key or "layernorm" in key
        assert ours[key].shape == tensor.shape
        assert torch.equal(ours[key], tensor) or not kept
    assert verify_checkpoint(converted / "v1", against=source).passed


def train(model, steps=4):
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    losses = []
    for _ in range(steps):
        losses.append(model(input_ids=token_ids(), labels=token_ids()).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return [loss.item() for loss in losses]


@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_recommended_lora_trains_and_comes_back(converted, tmp_path, variant):
    from modeling_diff.training import lora_config

    model = DiffLlamaForCausalLM.from_pretrained(converted / variant)
    model = peft.get_peft_model(model, lora_config(model, r=4))
    losses = train(model)
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    base = DiffLlamaForCausalLM.from_pretrained(converted / variant)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(token_ids()).logits, model.eval()(token_ids()).logits)


@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_healing_trains_every_new_tensor(converted, source, tmp_path, variant):
    data = write_training_rows(tmp_path / "data.jsonl")
    options = HealingOptions(**TOY)
    report = heal_checkpoint(converted / variant, tmp_path / "healed", options, data=data, teacher=source)
    before, after = (
        DiffLlamaForCausalLM.from_pretrained(f).state_dict() for f in (converted / variant, report.output)
    )
    marks = ("q_norm", "k_norm", "q_proj.bias", "k_proj.bias", "v_proj.bias")
    new = [key for key in before if any(mark in key for mark in marks)]
    assert new and not any(torch.equal(before[key], after[key]) for key in new)


def test_adapter_of_the_source_is_carried_over(converted, source, name, tmp_path):
    adapter = make_adapter(source, tmp_path / "adapter", target_modules=LINEAR)
    theirs = ARCHITECTURES[name].model_class.from_pretrained(source)
    expected = peft.PeftModel.from_pretrained(theirs, adapter)
    convert_checkpoint(source, tmp_path / "v2", "v2", adapter=adapter)
    convert_checkpoint(converted / "v2", tmp_path / "later", adapter=adapter)
    for folder in (tmp_path / "v2/adapter", tmp_path / "later"):
        ours = peft.PeftModel.from_pretrained(DiffLlamaForCausalLM.from_pretrained(converted / "v2"), folder)
        with torch.no_grad():
            logits = [model.eval()(token_ids()).logits for model in (ours, expected)]
        torch.testing.assert_close(*logits, rtol=0, atol=TOLERANCE)
