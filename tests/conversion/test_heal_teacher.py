"""`heal`: which LLaMA may teach, what is said of another, and that distances are measured against all of it."""

import json
import logging
import shutil

import pytest
import torch
from command_line import run
from healing_toys import heal, make_toys
from huggingface_hub import ModelCard
from random_llamas import edit_json, random_llama, saved
from saved_checkpoints import names
from transformers import AutoModelForCausalLM

from conversion import ConversionError
from conversion.heal import _risen
from conversion.healing.options import HealingOptions
from conversion.record import read_record
from modeling_diff import DiffLlamaConfig


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    return make_toys(tmp_path_factory.mktemp("toys"))


def test_few_cached_logits_measure_what_the_whole_teacher_measures(toys, tmp_path):
    """The same KL with 4 kept tokens of 96 as with the teacher in memory, and as transformers' own logits give."""
    live = heal(toys, tmp_path / "live").table
    cached = heal(toys, tmp_path / "cached", cached_logits=4, arguments={"cache_folder": tmp_path / "cache"}).table
    for name in ("kl", "loss", "greedy_agreement"):
        assert cached[0][name] == pytest.approx(live[0][name], rel=1e-5), name  # float32
    assert cached[-1]["teacher_loss"] == pytest.approx(live[-1]["teacher_loss"], rel=1e-5)
    rows = [json.loads(line)["input_ids"] for line in (toys / "data.jsonl").read_text().splitlines()[:4]]
    log_p, log_q = (
        AutoModelForCausalLM.from_pretrained(folder)(torch.tensor(rows)).logits.detach().double().log_softmax(-1)
        for folder in (toys / "llama", tmp_path / "cached")
    )
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    assert cached[-1]["kl"] == pytest.approx(expected, rel=1e-4)  # float32
    assert read_record(tmp_path / "cached")["healing"][0]["end"]["kl"] == cached[-1]["kl"]


def refused(*arguments, **options):
    with pytest.raises(ConversionError) as caught:
        heal(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def with_adapter(toys):
    """As `convert --calibration --adapter` leaves it, for whom the adapter is merged into the LLaMA first."""
    folder = shutil.copytree(toys / "v1", toys / "adapted")
    edit_json(folder / "conversion.json", adapter={"name": "mine", "merged": True, "sha256": {}})
    return folder


def test_adapter_that_was_merged_is_not_trained_away(toys, tmp_path, with_adapter):
    for options in ({}, {"stage": "local"}, {"stage": "lm"}):
        message = refused(toys, tmp_path / "out", "adapted", **options)
        assert message.startswith(f"{with_adapter}: an adapter was merged before the conversion, and teacher llama is")
        assert "merge it into the LLaMA and give that" in message
    assert names(tmp_path) == []


def test_converted_with_an_adapter_learns_from_text_or_from_the_adapted_llama(toys, tmp_path, with_adapter, caplog):
    heal(toys, tmp_path / "text", "adapted", max_steps=1, stage="lm", arguments={"teacher": None})
    assert read_record(tmp_path / "text")["healing"][0]["teacher_is_source"] is None
    adapted = saved(random_llama(seed=5), tmp_path / "llama-with-it")
    heal(toys, tmp_path / "taught", "adapted", max_steps=1, arguments={"teacher": adapted})
    (said,) = [entry.message for entry in caplog.records if entry.name.startswith("conversion")]
    assert "(llama, with an adapter merged into it)" in said


@pytest.mark.parametrize("other", [False, True])
def test_teacher_that_is_not_the_source_is_told_of(toys, tmp_path, other, caplog):
    teacher = saved(random_llama(seed=5), tmp_path / "tuned") if other else toys / "llama"
    with caplog.at_level(logging.WARNING, "conversion"):
        heal(toys, tmp_path / "out", max_steps=1, arguments={"teacher": teacher})
    said = [entry.message for entry in caplog.records if entry.name.startswith("conversion")]
    expected = f"the teacher tuned is not what {toys / 'v1'} was converted from (llama): distances are those from"
    assert [line.startswith(expected) for line in said] == ([True] if other else [])
    (entry,) = read_record(tmp_path / "out")["healing"]
    assert entry["teacher_is_source"] is not other
    card = ModelCard((tmp_path / "out" / "README.md").read_text())
    to_source = {"kl_nats", "greedy_agreement"}
    assert {result.metric_type for result in card.data.eval_results} == {"loss_nats"} | (set() if other else to_source)
    assert ("teacher tuned, not the source" in card.text) is other


def test_converted_teacher_is_named_with_what_was_expected(toys, tmp_path):
    command = ["heal", toys / "v1", tmp_path / "out", "--data", toys / "data.jsonl", "--teacher", toys / "v2"]
    result = run(*command)
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert f"--teacher {toys / 'v2'}: model_type is 'diff_llama', a converted checkpoint, expected" in result.stderr
    assert "give the LLaMA that it was converted from" in result.stderr


def test_teacher_of_another_kind_gets_no_advice_for_conversions(toys, tmp_path):
    teacher = saved(random_llama(), tmp_path / "teacher")
    edit_json(teacher / "config.json", architectures=["LlamaForSequenceClassification"])
    message = refused(toys, tmp_path / "out", arguments={"teacher": teacher})
    assert message.startswith(f"teacher {teacher}: config.json: architectures is ['LlamaForSequenceClassification']")
    assert message.endswith("; give the LLaMA that was converted") and "--backbone-only" not in message


def risen(before, after, end_lambda_init=0.05, lambdas=(0.05, 0.05), **options):
    table = [{"kl": before, "lambda": list(lambdas)}, {"kl": after, "lambda": list(lambdas)}]
    start, end = (DiffLlamaConfig(num_hidden_layers=2, lambda_init=[init] * 2) for init in (0.05, end_lambda_init))
    return _risen(HealingOptions(**options), table, start, end)


def test_rise_that_is_rounded_away_is_none():
    assert risen(0.13811, 0.13814) == []
    assert risen(0.1381, 0.1380) == []
    (note,) = risen(0.1381, 0.1382)
    assert note.startswith("KL on the held-out text rose from 0.1381 to 0.1382") and "learning_rate=0.0001" in note


@pytest.mark.parametrize(
    ("given", "blamed"),
    [
        ({"lambda_mode": "paper", "end_lambda_init": 0.3}, "paper's schedule (lambda_mode='paper')"),
        ({"lambda_floor": 0.1}, "raised to its floor (lambda_floor=0.1)"),
        ({"lambda_mode": "paper", "lambda_floor": 0.1}, "raised to its floor (lambda_floor=0.1)"),
        ({"lambda_floor": 0.1, "lambda_mode": "free"}, "the learning rate of 0.001"),
        ({"lambda_floor": 0.05, "lambdas": (0.0499, 0.3)}, "the learning rate of 0.001"),
        ({"lambda_mode": "paper"}, "the learning rate of 0.001"),
        ({"lambda_floor": 0.1, "lambdas": ()}, "the learning rate of 0.001"),
    ],
)
def test_rise_is_blamed_on_a_lambda_that_was_moved(given, blamed):
    (note,) = risen(0.1, 0.2, **given)
    assert blamed in note and ("learning rate" in note) == ("learning rate" in blamed)
