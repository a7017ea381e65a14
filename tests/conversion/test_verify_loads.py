"""Verification of what a config says: attention named by a source, default dtypes, short lengths, bidirectional."""

import hashlib
import json

import pytest
import torch
from random_llamas import LONGROPE, SMALL, edit_json, random_llama, saved

from conversion import ConversionError, convert_checkpoint, verify_checkpoint
from conversion.evaluation.behavior import cache_difference, cacheable_length, compare_logits
from conversion.healing.options import HealingOptions
from conversion.healing.teacher import find_teacher, load_teacher
from conversion.source.config import read_source_model


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


def edit(folder, **fields):
    """Changes config.json, and where it is recorded its checksum with it."""
    path = folder / "config.json"
    edit_json(path, **fields)
    if (folder / "conversion.json").exists():
        record = json.loads((folder / "conversion.json").read_text())
        record["sha256"]["config.json"] = hashlib.sha256(path.read_bytes()).hexdigest()
        (folder / "conversion.json").write_text(json.dumps(record))
    return folder


def check_named(report, name):
    return next(check for check in report.checks if check.name == name)


@pytest.mark.parametrize("field", ["_attn_implementation", "attn_implementation"])
@pytest.mark.parametrize("name", ["eager", "flash_attention_2", "someone/kernel", "diff_chunked", 5])
def test_attention_that_a_source_names_neither_travels_nor_acts(tmp_path, field, name):
    """flash_attention_2 and someone's kernel would be an ImportError, eager another result to the bit."""
    source = edit(saved(random_llama(), tmp_path / "llama"), **{field: name})
    convert_checkpoint(source, tmp_path / "v2", "v2")
    assert "attn" not in (tmp_path / "v2" / "config.json").read_text()
    report = verify_checkpoint(tmp_path / "v2", against=source)
    assert report.passed and check_named(report, "logits").values["largest_difference"] == 0


def test_attention_that_a_teacher_names_does_not_act(tmp_path):
    source = edit(saved(random_llama(), tmp_path / "llama"), _attn_implementation="flash_attention_2")
    convert_checkpoint(source, tmp_path / "v2", "v2")
    options = HealingOptions()
    student = read_source_model(source).config  # of the same vocabulary, layers and width
    found = find_teacher(source, student, tmp_path / "v2", options)
    assert load_teacher(found.folder, options).model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_default_load_in_another_dtype_than_the_source_fails(tmp_path, dtype, variant):
    source = saved(random_llama(), tmp_path / "llama")
    convert_checkpoint(source, tmp_path / "ours", variant, uncalibrated=variant == "v1")
    assert check_named(verify_checkpoint(tmp_path / "ours", against=source), "default load").outcome == "passed"
    edit(tmp_path / "ours", dtype=dtype)
    report = verify_checkpoint(tmp_path / "ours", against=source)
    assert (
        not report.passed and f"in float32, this checkpoint in {dtype}" in check_named(report, "default load").detail
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_default_load_in_half_precision_is_compared(tmp_path, dtype):
    source = saved(random_llama().to(getattr(torch, dtype)), tmp_path / "llama")
    convert_checkpoint(source, tmp_path / "v2", "v2")
    check = check_named(verify_checkpoint(tmp_path / "v2", against=source), "default load")
    assert check.outcome == "passed" and f"in {dtype}" in check.detail


def test_dtype_that_was_asked_for_is_not_held_against_a_conversion(tmp_path):
    source = saved(random_llama(), tmp_path / "llama")
    convert_checkpoint(source, tmp_path / "ours", "v2", dtype="bfloat16")
    report = verify_checkpoint(tmp_path / "ours", against=source)
    assert report.passed and "in bfloat16" in check_named(report, "default load").detail


def test_logits_are_compared_where_finite_and_otherwise_by_kind():
    """Worked by hand."""
    nan, inf = float("nan"), float("inf")
    one = torch.tensor([[1.0, -3.0, nan, inf]])
    assert compare_logits([one], [torch.tensor([[1.5, -3.0, nan, inf]])]) == (0.5, 3.0)
    assert compare_logits([one], [torch.tensor([[1.5, -3.0, 0.0, inf]])]) == (inf, 3.0)
    assert compare_logits([one], [torch.tensor([[nan, -3.0, nan, inf]])])[0] == inf


@pytest.mark.parametrize(
    "changes",
    [
        {"max_position_embeddings": 1},
        {"max_position_embeddings": 16},
        {"max_position_embeddings": 17},
        {"max_position_embeddings": 8, "rope_parameters": DYNAMIC},
        {"rope_parameters": LONGROPE},
        {"rope_parameters": LONGROPE | {"original_max_position_embeddings": 1, "attention_factor": 1.0}},
        {"rope_parameters": LONGROPE | {"original_max_position_embeddings": 1000}},
    ],
    ids=str,
)
@pytest.mark.transformers(since="5.16", reason="its LLaMA agrees with itself where later ones do not")
def test_short_lengths_are_verified_as_far_as_llama_agrees_with_itself(tmp_path, changes):
    llama = random_llama(**changes)
    source = saved(llama, tmp_path / "llama")
    convert_checkpoint(source, tmp_path / "v2", "v2")
    report = verify_checkpoint(tmp_path / "v2", against=source)
    assert report.passed, report.checks
    length = cacheable_length(llama.config)
    assert check_named(report, "cache").outcome == ("passed" if length > 1 else "skipped")
    ids = torch.randint(SMALL["vocab_size"], (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        llama(ids)  # dynamic frequencies grow with what was read before
    if 1 < length < 40:  # and no shorter than need be: two tokens on, LLaMA differs from itself
        assert cache_difference(llama, ids[:, : length + 2]) > 1e-2
    if length > 1:
        assert cache_difference(llama, ids[:, :length]) < 1e-4  # float32, logits of about 5


def test_bidirectional_conversion_passes_without_a_cache_check(tmp_path):
    source = edit(saved(random_llama(), tmp_path / "llama"), is_causal=False)
    convert_checkpoint(source, tmp_path / "v2", "v2")
    report = verify_checkpoint(tmp_path / "v2", against=source)
    assert report.passed and check_named(report, "cache").outcome == "skipped"
    edit(tmp_path / "v2", is_causal=True)
    assert check_named(verify_checkpoint(tmp_path / "v2", against=source), "logits").outcome == "failed"


def test_calibration_of_a_bidirectional_model_is_refused(tmp_path):
    source = edit(saved(random_llama(), tmp_path / "llama"), is_causal=False)
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"input_ids": [5] * 5000}))
    with pytest.raises(ConversionError, match=r"is_causal is false.*--variant v2"):
        convert_checkpoint(source, tmp_path / "v1", "v1", calibration=text, calibration_tokens=1024)
