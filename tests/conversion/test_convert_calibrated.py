"""`convert --calibration`: what was fitted is what lands on disk; bad calls are refused, and nothing is left."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from random_llamas import random_llama, saved, token_ids, write_rows
from safetensors.torch import load_file, save_file
from tiny_tokenizers import TINY_LLAMA
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from conversion import ConversionError, convert_checkpoint, verify_checkpoint
from conversion.calibration.calibrate import calibrate
from conversion.calibration.model import calibrated_model
from conversion.data.text import read_calibration
from conversion.describe import describe_checkpoint
from conversion.errors import FilesError


STAGES = ("pairing", "refit")
ROW_TOKENS = 128
NUM_ROWS = 8


@pytest.fixture
def text(tmp_path):
    return write_rows(tmp_path / "calibration.jsonl", NUM_ROWS, ROW_TOKENS)


def convert(llama, output, text, **options):
    options = {"calibration": text, "calibration_tokens": ROW_TOKENS * NUM_ROWS, "stages": STAGES} | options
    return convert_checkpoint(llama, output, "v1", **options)


def test_calibrated_checkpoint_is_the_calibrated_model(llama, text, tmp_path):
    report = convert(llama, tmp_path / "v1", text)
    source = LlamaForCausalLM.from_pretrained(llama)
    tokens = read_calibration(text, None, ROW_TOKENS * NUM_ROWS, ROW_TOKENS, source.config.vocab_size)
    expected = calibrated_model(source, calibrate(llama, source.config, tokens, stages=STAGES))
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "v1")
    ids = token_ids()
    with torch.no_grad():
        torch.testing.assert_close(converted(ids).logits, expected(ids).logits, rtol=0, atol=0)
    record = json.loads((tmp_path / "v1/conversion.json").read_text())
    assert record["pairing"] == "calibrated"
    assert record["calibration"]["stages"] == list(STAGES)
    assert record["calibration"]["text"] == text.name
    assert len(record["calibration"]["pairings"]) == source.config.num_hidden_layers
    assert report.record["parameters"] == record["parameters"]
    card = (tmp_path / "v1/README.md").read_text()
    assert f"on {ROW_TOKENS * NUM_ROWS} tokens of text" in card and "A raw conversion" not in card


@pytest.mark.slow
def test_calibration_wins_back_most_of_what_the_copy_of_a_trained_llama_loses(tmp_path):
    """Held-out text; two closed-form stages on 16K tokens (compare_conversions.py measures all stages on 64K)."""
    convert(TINY_LLAMA, tmp_path / "fitted", TINY_LLAMA / "calibration.txt", calibration_tokens=16384, measure=False)
    convert_checkpoint(TINY_LLAMA, tmp_path / "copy", "v1", uncalibrated=True, measure=False)
    tokenizer = AutoTokenizer.from_pretrained(TINY_LLAMA)
    ids = tokenizer((TINY_LLAMA / "heldout.txt").read_text(encoding="utf-8"), return_tensors="pt").input_ids
    ids = ids[:, : 8 * 512].view(8, 512)
    losses = {}
    with torch.no_grad():
        for name, folder in (("llama", TINY_LLAMA), ("copy", tmp_path / "copy"), ("fitted", tmp_path / "fitted")):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            losses[name] = model(ids, labels=ids).loss.item()
    assert losses["llama"] < 3.5, "the fixture is a trained model"
    assert losses["fitted"] - losses["llama"] < 0.3 * (losses["copy"] - losses["llama"]), losses


def test_some_layers_alone_are_calibrated(llama, text, tmp_path):
    convert(llama, tmp_path / "v1", text, layers=[1])
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "v1")
    source = LlamaForCausalLM.from_pretrained(llama)
    assert converted.config.differential_layers == [1]
    ids = token_ids()
    with torch.no_grad():
        ours, theirs = (m(ids, output_hidden_states=True).hidden_states[1] for m in (converted, source))
    # float32: the first layer is LLaMA's own, its heads in pairs.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_embedding_stored_as_head_is_calibrated_alike(text, tmp_path):
    source = saved(random_llama(tie_word_embeddings=True), tmp_path / "tied")
    convert(source, tmp_path / "expected", text, stages=["copy"])
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, source / "model.safetensors")
    convert(source, tmp_path / "v1", text, stages=["copy"])
    found, expected = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("v1", "expected"))
    assert found == expected


def test_dry_run_estimates_and_writes_nothing(llama, text, tmp_path):
    report = convert(llama, tmp_path / "v1", text, dry_run=True)
    (note,) = (note for note in report.notes if note.startswith("calibration on"))
    assert re.search("about [0-9]+ (second|minute|hour)s? on this machine", note) and "GB of memory" in note
    assert sorted(path.name for path in tmp_path.iterdir()) == [text.name, "llama"]


@pytest.mark.parametrize("first", [None, True, False])
def test_interrupted_calibration_is_gone_on_from_and_its_work_folder_goes(llama, text, tmp_path, first):
    reached = []

    def interrupt(layer, num_layers, stage, done):
        reached.append((layer, str(stage)))
        if layer == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(llama, tmp_path / "v1", text, resume=first, calibration_progress=interrupt)
    assert (tmp_path / ".v1.calibration").is_dir() and not (tmp_path / "v1").exists()
    again = []
    convert(llama, tmp_path / "v1", text, resume=True, calibration_progress=lambda *at: again.append(at[0]))
    assert set(again) == {1}, "the first layer was there already"
    assert sorted(path.name for path in tmp_path.iterdir()) == [text.name, "llama", "v1"]
    convert(llama, tmp_path / "whole", text)
    same = (tmp_path / "v1/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    assert same


def test_second_calibration_of_one_target_is_refused(llama, text, tmp_path):
    refused = []

    def start_another(*at):
        if not refused:
            with pytest.raises(FilesError, match=r"v1\.calibration\.lock: another run") as caught:
                convert(llama, tmp_path / "new" / "v1", text, resume=True)
            refused.append(caught)

    convert(llama, tmp_path / "new" / "v1", text, resume=True, calibration_progress=start_another)
    assert refused
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["v1"]


@pytest.mark.parametrize("dry_run", [True, False])
def test_full_disk_is_found_before_anything_is_fitted(llama, text, tmp_path, monkeypatch, dry_run):
    monkeypatch.setattr(
        "conversion.checkpoint.output_folder.shutil.disk_usage", lambda folder: SimpleNamespace(free=2**20)
    )
    reached = []
    options = {"dry_run": dry_run, "calibration_progress": lambda *at: reached.append(at)}
    with pytest.raises(FilesError, match=r"0\.034 GB are needed, 0\.001 GB are free"):
        convert(llama, tmp_path / "v1", text, **options)
    assert not reached


def test_tokens_recorded_are_those_in_whole_rows(llama, text, tmp_path):
    options = {"calibration_tokens": ROW_TOKENS * (NUM_ROWS - 1) + 5, "stages": ["copy"]}
    report = convert(llama, tmp_path / "v1", text, **options)
    assert report.record["calibration"]["tokens"] == ROW_TOKENS * (NUM_ROWS - 1)
    notes = convert(llama, tmp_path / "other", text, dry_run=True, **options).notes
    assert any(note.startswith(f"calibration on {ROW_TOKENS * (NUM_ROWS - 1):,} tokens") for note in notes)


def test_text_shorter_than_the_default_is_used_whole_and_said(llama, text, tmp_path):
    report = convert(llama, tmp_path / "v1", text, calibration_tokens=None, dry_run=True)
    assert any(f"calibration on {ROW_TOKENS * NUM_ROWS:,} tokens (all of the text)" in note for note in report.notes)
    asked = convert(llama, tmp_path / "v1", text, dry_run=True)
    assert not any("all of the text" in note for note in asked.notes)
    short = tmp_path / "short.jsonl"
    short.write_text(text.read_text().splitlines()[0])
    with pytest.raises(ConversionError, match="one sequence to judge by; give more text"):
        convert(llama, tmp_path / "v1", short, calibration_tokens=None)


def test_estimate_comes_before_the_calibration_and_a_no_ends_it(llama, text, tmp_path):
    seen = []

    def refuse(calibration):
        seen.append(calibration.note)
        raise ConversionError("no")

    options = {"calibration_progress": lambda *at: seen.append(at), "resume": True}
    with pytest.raises(ConversionError, match="no"):
        convert(llama, tmp_path / "v1", text, before_calibration=refuse, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == [text.name, "llama"]
    convert(llama, tmp_path / "v1", text, before_calibration=lambda calibration: seen.append(calibration), **options)
    assert seen[0].startswith("calibration on") and seen[1].estimate.seconds > 0 and len(seen) > 2
    assert all(isinstance(at, tuple) for at in seen[2:]), "the estimate before the first layer"


@pytest.mark.parametrize("stages", [["copy"], ["pairing"], STAGES, [*STAGES, "values"]], ids=lambda stages: stages[-1])
def test_calibrated_layers_stay_differential(llama, text, tmp_path, stages):
    report = convert(llama, tmp_path / "v1", text, stages=stages)
    assert report.record["calibration"]["lambda_floor"] == 0.02
    assert min(json.loads((tmp_path / "v1" / "config.json").read_text())["lambda_init"]) >= 0.02
    assert not [note for note in report.notes if "not differential" in note]


@pytest.mark.parametrize(
    "options", [{"lambda_init": 0}, {"lambda_init": [0, 0.1]}, {"lambda_init": [0, 0], "layers": [0]}]
)
def test_lambda_of_zero_on_request_is_said_everywhere(llama, text, tmp_path, options):
    report = convert(llama, tmp_path / "v1", text, stages=["copy"], lambda_floor=0, **options)
    where = "layer 0" if options == {"lambda_init": [0, 0.1]} else "every layer"
    said = f"lambda is 0: not differential ({where})"
    assert said in report.notes
    assert describe_checkpoint(tmp_path / "v1")["warning"] == said
    (check,) = (check for check in verify_checkpoint(tmp_path / "v1").checks if check.name == "lambda")
    assert (check.outcome, check.detail) == ("measured", said)
    assert f"**{said}.**" in (tmp_path / "v1" / "README.md").read_text()


def test_lambda_of_zero_of_a_plain_copy_is_said_too(llama, tmp_path):
    report = convert_checkpoint(llama, tmp_path / "v1", "v1", uncalibrated=True, lambda_init=0)
    assert "lambda is 0: not differential (every layer)" in report.notes


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration_tokens": 10**6}, "give more text, ask for fewer tokens, or leave"),
        ({"calibration_tokens": 5}, "fewer than one sequence"),
        ({"stages": ["polish"]}, "polish.*expected one of copy, pairing"),
        ({"calibration_tokens": -5}, "calibration_tokens is -5"),
        ({"calibration_tokens": "5"}, "calibration_tokens is '5'"),
        ({"calibration_tokens": 2 * ROW_TOKENS, "layers": [1], "lambda_init": -0.1}, "lambda_init -0.1"),
        ({"calibration_tokens": ROW_TOKENS}, "one sequence to judge by"),
        ({"calibration": "missing.txt"}, "does not exist"),
        ({"lambda_init": 0}, "--lambda-init 0.0 is below --lambda-floor 0.02"),
        ({"lambda_floor": 1}, "lambda_floor is 1, expected a number from 0 to below 1"),
        ({"lambda_floor": "low"}, "lambda_floor is 'low'"),
    ],
)
def test_bad_calibration_is_refused(llama, text, tmp_path, options, message, dry_run):
    with pytest.raises(ConversionError, match=message):
        convert(llama, tmp_path / "v1", text, dry_run=dry_run, **options)
    assert not (tmp_path / "v1").exists()


def test_calibration_of_v2_is_refused(llama, text, tmp_path):
    with pytest.raises(ConversionError, match="leave it out for v2"):
        convert_checkpoint(llama, tmp_path / "v2", "v2", calibration=text)
