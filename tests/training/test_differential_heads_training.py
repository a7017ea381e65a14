"""Training of layers in which some heads are differential (V1): adapters, lambda in the log, resume."""

import pytest
import torch
from trainable_models import random_ids, random_rows, tiny_model, train, training_arguments

from modeling_diff import DiffLlamaForCausalLM
from modeling_diff.training import DiffTrainer, LambdaCallback, lora_config


pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

HEADS = [[0, 2], [1]]
# float32 logits of up to about 6: W + B A is rounded once where W x + B (A x) is rounded twice.
MERGE_ATOL = 1e-4


def mixed_model(**changes):
    return tiny_model("v1", **({"differential_heads": HEADS} | changes))


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=random_ids()).logits


def test_adapter_trains_lambda_and_norm_and_comes_back(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = peft.get_peft_model(mixed_model(), lora_config(mixed_model(), r=4))
    names = [name.split(".self_attn.")[-1] for name, _ in model.named_parameters() if "modules_to_save" in name]
    assert {name.partition(".")[0] for name in names} == {"diff_lambda", "sub_norm"}
    assert train(model) == []
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(mixed_model(), str(tmp_path))
    assert torch.equal(logits(loaded), expected)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), expected, rtol=0, atol=MERGE_ATOL)


def test_adapter_of_a_model_without_differential_heads_is_lora_alone():
    pytest.importorskip("peft", reason="peft is not installed")
    assert lora_config(mixed_model(differential_heads=[[], []])).modules_to_save is None
    assert lora_config(mixed_model(differential_heads=[[], [1]])).modules_to_save == ["diff_lambda", "sub_norm"]


def test_cancelled_share_is_that_of_differential_heads(tmp_path):
    """Two models of the same weights: the maps of their only layer are equal, whichever of its heads subtract."""
    whole = tiny_model("v1", attn_implementation="eager", num_hidden_layers=1)
    row = random_rows(1)
    maps = {}
    with torch.no_grad():
        whole(input_ids=row[0]["input_ids"][None], attention_maps_by_layer=maps)
    overlap = torch.minimum(maps[0].positive, maps[0].diff_lambda * maps[0].negative).sum(-1).mean((0, 2))  # (H,)
    model = mixed_model(num_hidden_layers=1, differential_heads=[[0, 2]])
    model.load_state_dict(whole.state_dict())
    arguments = training_arguments(tmp_path, max_steps=1, per_device_train_batch_size=1)
    trainer = DiffTrainer(model, arguments, train_dataset=row, callbacks=[LambdaCallback()])
    trainer.train()
    expected = overlap[[0, 2]].mean().item()
    assert abs(expected - overlap.mean().item()) > 1e-3
    assert trainer.state.log_history[0]["lambda/layer_0/cancelled"] == pytest.approx(expected, abs=1e-6)


def test_resumed_training_equals_an_uninterrupted_run(tmp_path):
    def trainer(name):
        arguments = training_arguments(tmp_path / name, save_strategy="steps", save_steps=2)
        callbacks = [LambdaCallback(floor=0.02)]
        return DiffTrainer(mixed_model(), arguments, train_dataset=random_rows(), callbacks=callbacks)

    whole = trainer("whole")
    whole.train()
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    names = [name for name in whole.state.log_history[3] if name.startswith("lambda/")]
    assert len(names) > 8
    assert all(whole.state.log_history[3][name] == resumed.state.log_history[3][name] for name in names)
    expected = whole.model.state_dict()
    saved = DiffLlamaForCausalLM.from_pretrained(tmp_path / "resumed/checkpoint-4")
    assert saved.config.differential_heads == HEADS
    for model in (resumed.model, saved):
        assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())
