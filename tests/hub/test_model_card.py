"""The model card: metadata that the Hub's own parser takes, and plain words that fit what was done."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

import modeling_diff
from conversion import convert_checkpoint, push_checkpoint
from conversion.data.held_out import STANDARD_NAME
from conversion.hub.licenses import llama_terms
from conversion.hub.model_card import GENERATED, CardFacts, lambda_plot, render_card, source_metadata
from conversion.push import plan_upload
from conversion.record import read_record
from conversion.source.converted import read_our_config
from modeling_diff.training import lora_config


HEALED = {
    "stage": "kl",
    "tokens": 4096,
    "data": ["owner/texts", "mine.txt"],
    "start": {"loss": 3.5, "kl": 0.5},
    "end": {"loss": 3.1, "kl": 0.06, "recovered": 0.97},
}
CALIBRATED = {"text": "owner/other-texts", "tokens": 2048, "stages": ["copy", "refit"]}


@pytest.fixture(params=["v1", "v2"])
def variant(request):
    return request.param


@pytest.fixture
def card(converted, variant):
    return ModelCard((converted[variant] / "README.md").read_text())


def rendered(folder: Path, **changes) -> ModelCard:
    record = read_record(folder) | changes
    metadata = source_metadata(folder)
    facts = CardFacts(metadata, read_our_config(folder), record, {0: 0.1, 1: 0.2}, llama_terms(metadata, folder))
    return ModelCard(render_card(facts))


def python_blocks(card: ModelCard) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)


def test_metadata_is_read_back_by_the_hubs_own_parser(card):
    found = card.data.to_dict()
    found.pop("model-index", None)  # of measured numbers, below
    assert found == {
        "language": "en",
        "library_name": "transformers",
        "license": "llama3.2",
        "pipeline_tag": "text-generation",
        "tags": ["differential-transformer", "diff_llama"],
    }


def test_numbers_of_the_conversions_end_are_on_the_card_under_their_text(converted):
    measured = read_record(converted["v1"])["measured"]
    results = ModelCard((converted["v1"] / "README.md").read_text()).data.eval_results
    assert {result.metric_type: result.metric_value for result in results} == {
        name: pytest.approx(value, abs=1e-6) for name, value in measured["values"].items()
    }
    assert {result.dataset_name for result in results} == {measured["text"]} == {STANDARD_NAME}
    assert "At the end of the conversion: loss" in (converted["v1"] / "README.md").read_text()
    assert (
        "loss" not in rendered(converted["v1"], healing=[HEALED | {"start": {}, "end": {}}]).text.split("## How to")[0]
    )


def test_license_of_another_name_is_inherited_with_its_link(llama, tmp_path):
    source = shutil.copytree(llama, tmp_path / "source")
    block = {"license": "other", "license_name": "own-terms", "license_link": "LICENSE.txt", "extra_gated_prompt": "x"}
    (source / "README.md").write_text(f"---\n{json.dumps(block)}\n---\n")
    convert_checkpoint(source, tmp_path / "v2", "v2")
    data = ModelCard((tmp_path / "v2" / "README.md").read_text()).data.to_dict()
    assert {key: data.get(key) for key in block} == block | {"extra_gated_prompt": None}


@pytest.mark.parametrize("block", ["license: [mit", "license: a: b", "\tlicense: mit", "- mit", "license: !python {}"])
def test_card_that_cannot_be_read_stops_no_conversion(llama, tmp_path, block):
    source = shutil.copytree(llama, tmp_path / "source")
    (source / "README.md").write_text(f"---\n{block}\n---\n")
    convert_checkpoint(source, tmp_path / "v2", "v2", dry_run=True)
    assert source_metadata(source) == {}


def test_no_license_is_invented(llama, tmp_path):
    source = shutil.copytree(llama, tmp_path / "source")
    for path in (*source.glob("LICENSE*"), source / "README.md"):
        path.unlink()
    convert_checkpoint(source, tmp_path / "v2", "v2")
    assert "license" not in ModelCard((tmp_path / "v2" / "README.md").read_text()).data.to_dict()
    assert any("states no license" in note for note in plan_upload(tmp_path / "v2", "me/x").notes)


@pytest.mark.parametrize(
    ("variant", "changes", "said"),
    [
        ("v1", {}, "**A raw conversion, not a usable model**"),
        ("v2", {}, "the same logits to the last bit in float32 (both sdpa, or eager)"),
        ("v2", {"promise": {"kind": "equal", "text": "t"}}, "the same function as its source, up to rounding"),
        ("v1", {"calibration": CALIBRATED}, "**Near its source, not equal to it**"),
        ("v1", {"calibration": CALIBRATED, "healing": [HEALED]}, "**Healed, and not equal to its source**"),
    ],
)
def test_status_is_what_was_done_last(converted, variant, changes, said):
    text = rendered(converted[variant], **changes).text
    statuses = ("A raw conversion", "to the last bit", "up to rounding", "Near its source", "**Healed")
    assert said in text and sum(status in text for status in statuses) == 1


def test_healing_is_told_with_its_numbers(converted):
    card = rendered(converted["v1"], calibration=CALIBRATED, healing=[HEALED])
    assert "4,096 tokens; loss 3.5 → 3.1; kl 0.5 → 0.06; recovered 0.97" in card.text
    assert "Calibrated on 2,048 tokens of `owner/other-texts`: copy, refit" in card.text
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == {
        "loss_nats": 3.1,
        "kl_nats": 0.06,
    }
    assert {result.dataset_name for result in card.data.eval_results} == {"held-out text of owner/texts, mine.txt"}


def test_data_sets_of_the_hub_are_named_and_files_are_not(converted):
    card = rendered(converted["v1"], calibration=CALIBRATED, healing=[HEALED])
    assert card.data.datasets == ["owner/other-texts", "owner/texts"]


def test_base_model_is_a_hub_id_or_nothing(converted):
    source = read_record(converted["v1"])["source"]
    card = rendered(converted["v1"], source=source | {"hub_id": "meta-llama/Llama-3.2-1B", "revision": "a" * 40})
    assert card.data.base_model == "meta-llama/Llama-3.2-1B" and "base_model_relation" not in card.data.to_dict()
    assert "a" * 40 in card.text
    assert rendered(converted["v1"]).data.base_model is None


def test_card_says_how_large_it_is_and_cites_both_papers(card, converted, variant):
    count = sum(p.numel() for p in modeling_diff.DiffLlamaForCausalLM.from_pretrained(converted[variant]).parameters())
    assert f"| parameters | {count:,} (source: " in card.text
    assert card.text.count("title = {Differential Transformer") == 2


def test_nothing_is_loaded_from_elsewhere(card):
    assert "![" not in card.text and "<img" not in card.text and "<script" not in card.text


# peft 0.21 asks for it.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_snippets_of_the_card_run(card, converted, variant):
    """As they stand, with the folder for the repository's name; the adapter trains lambda."""
    pytest.importorskip("peft")
    load, fine_tune = python_blocks(card)
    assert "revision" in load
    assert load.count("trust_remote_code=True)") == load.count("from_pretrained(")  # the tokenizer asks for it, too
    names: dict = {}
    exec(load.replace(card_name(card), str(converted[variant])), names)
    exec(fine_tune, names)
    recommended = lora_config(names["model"])
    assert names["lora"].target_modules == recommended.target_modules
    assert names["lora"].modules_to_save == recommended.modules_to_save
    names["adapted"](input_ids=torch.tensor([[1, 5, 9, 13]]), labels=torch.tensor([[1, 5, 9, 13]])).loss.backward()
    trained = {name for name, parameter in names["adapted"].named_parameters() if parameter.grad is not None}
    assert all(any(module in name for name in trained) for module in recommended.modules_to_save)


def card_name(card: ModelCard) -> str:
    return re.search(r'from_pretrained\("([^"]+)"', card.text)[1]


def test_plot_has_a_bar_a_layer_in_proportion():
    plot = lambda_plot({0: 0.1, 1: 0.4, 3: 0.0}, 4)
    lines = plot.splitlines()[2:-1]
    lengths = [line.count("█") for line in lines]
    assert lengths == [6, 24, 0, 0] and "0.4000" in lines[1]
    assert "LLaMA's own attention" in lines[2] and "0.0000" in lines[3]


def test_lambda_of_the_upload_is_read_from_the_weights(converted):
    model = modeling_diff.DiffLlamaForCausalLM.from_pretrained(converted["v1"])
    expected = [layer.self_attn.diff_lambda().item() for layer in model.model.layers]
    plan = plan_upload(converted["v1"], "me/x")
    card = plan.contents["README.md"].decode()
    for layer, value in enumerate(expected):
        assert f"{layer:5d} {value:7.4f} " in card


def test_card_is_written_anew_only_while_it_is_ours(converted, tmp_path):
    folder = shutil.copytree(converted["v2"], tmp_path / "v2")
    assert "me/somewhere" in plan_upload(folder, "me/somewhere").contents["README.md"].decode()
    (folder / "README.md").write_text((folder / "README.md").read_text().replace(GENERATED, ""))
    assert plan_upload(folder, "me/somewhere").contents["README.md"] == folder / "README.md"


def test_edited_metadata_outlives_the_writing_anew(converted, tmp_path):
    folder = shutil.copytree(converted["v2"], tmp_path / "v2")
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.replace("license: llama3.2", "license: llama3.1"))
    assert "license: llama3.1" in plan_upload(folder, "me/x").contents["README.md"].decode()


def test_dry_run_counts_the_card_that_would_go_up(converted):
    report = push_checkpoint(converted["v2"], "me/Llama-x", dry_run=True)
    assert report.files["README.md"] == len(plan_upload(converted["v2"], "me/Llama-x").contents["README.md"])
