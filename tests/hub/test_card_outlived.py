"""A card never outlives its weights: what it promises of a conversion is not said of weights saved in their place."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import Trainer, TrainingArguments

import modeling_diff
from conversion import convert_checkpoint
from conversion.hub.model_card import GENERATED
from conversion.push import plan_upload
from modeling_diff import diff_saved_card


PROMISES = ("to the last bit", "same function", "raw conversion", "Promise:")


@pytest.fixture
def folder(llama, tmp_path):
    convert_checkpoint(llama, tmp_path / "v2", "v2")
    return tmp_path / "v2"


def saved_over(folder, **options):
    model = modeling_diff.DiffLlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight.add_(0.1)
    model.save_pretrained(folder, **options)
    return folder


def assert_nothing_is_promised(folder):
    card = (folder / "README.md").read_text()
    assert not [promise for promise in PROMISES if promise in card]
    assert ModelCard(card).data.to_dict()["license"] == "llama3.2"
    uploaded = plan_upload(folder, "me/Llama-x").contents["README.md"]
    assert uploaded == folder / "README.md"


def test_marker_is_the_one_that_cards_are_written_with():
    assert GENERATED.startswith(diff_saved_card.GENERATED)


def test_save_pretrained_takes_the_cards_word(folder):
    record = json.loads((folder / "conversion.json").read_text())
    assert_nothing_is_promised(saved_over(folder))
    assert json.loads((folder / "conversion_of_earlier_weights.json").read_text()) == record
    assert not (folder / "conversion.json").exists()


def test_trainer_next_to_the_card_takes_its_word(folder):
    model = modeling_diff.DiffLlamaForCausalLM.from_pretrained(folder)
    rows = [{"input_ids": [1, 5, 9, 13], "labels": [1, 5, 9, 13]}] * 2
    arguments = TrainingArguments(
        str(folder), max_steps=1, per_device_train_batch_size=1, report_to=[], use_cpu=True, save_strategy="no"
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model()
    assert_nothing_is_promised(folder)


def test_results_of_earlier_weights_leave_the_metadata(folder):
    card = (folder / "README.md").read_text()
    results = "model-index:\n- name: x\n  results:\n  - metrics:\n    - type: loss_nats\n      value: 3.1\n"
    (folder / "README.md").write_text(card.replace("---\n", "---\n" + results, 1))
    assert_nothing_is_promised(saved_over(folder))
    assert "3.1" not in (folder / "README.md").read_text()


def test_cards_of_others_are_left_alone(folder, tmp_path):
    (folder / "README.md").write_text("mine")
    assert (saved_over(folder) / "README.md").read_text() == "mine"
    new = tmp_path / "new"
    modeling_diff.DiffLlamaForCausalLM.from_pretrained(folder).save_pretrained(new)
    assert not list(new.glob("conversion*")) and not (new / "README.md").exists()


def test_other_processes_leave_the_folder_alone(folder):
    before = (folder / "README.md").read_text()
    saved_over(folder, is_main_process=False)
    assert (folder / "README.md").read_text() == before and (folder / "conversion.json").exists()


def test_upload_leaves_out_a_card_without_its_record(folder):
    """As after the advice to remove conversion.json once weights were trained by something else."""
    (folder / "conversion.json").unlink()
    plan = plan_upload(folder, "me/Llama-x")
    assert "README.md" not in plan.contents and any("left out" in note for note in plan.notes)


# peft 0.21 asks for it.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_upload_of_an_adapter_leaves_out_the_card_of_the_weights_next_to_it(folder):
    pytest.importorskip("peft")
    from peft import get_peft_model

    from modeling_diff.training import lora_config

    model = modeling_diff.DiffLlamaForCausalLM.from_pretrained(folder)
    get_peft_model(model, lora_config(model)).save_pretrained(folder)
    plan = plan_upload(folder, "me/Llama-x")
    assert "README.md" not in plan.contents and any("left out" in note for note in plan.notes)
