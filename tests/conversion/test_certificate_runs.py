"""Certificates of the small trained LLaMA's conversions: V2 keeps everything, a plain V1 copy fails by name."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import run
from random_llamas import random_llama, saved
from safetensors.torch import load_file, save_file

from conversion import ConversionError, certify, convert_checkpoint, verify_checkpoint
from conversion.evaluation import certificate, certification, performance, suite


ROOT = Path(__file__).parents[2]
LLAMA = ROOT / "examples" / "assets" / "tiny-llama"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Not to be changed."""
    folder = tmp_path_factory.mktemp("certified")
    convert_checkpoint(LLAMA, folder / "v2", "v2")
    convert_checkpoint(LLAMA, folder / "v1", "v1", uncalibrated=True)
    return folder


@pytest.fixture
def short_suite(monkeypatch):
    """Few prompts, as most of a run does not depend on their number."""
    facts = suite._facts()[:4]
    monkeypatch.setattr(suite, "_facts", lambda: facts)
    monkeypatch.setattr(suite, "LOOKUPS", 8)
    monkeypatch.setattr(suite, "NEEDLE_PROMPTS", 2)
    monkeypatch.setattr(suite, "NEEDLE_TOKENS", (128,))
    for module in (performance, certificate):
        monkeypatch.setattr(module, "NEW_TOKENS", 16)


def verify(*arguments):
    return run("verify", *arguments)


def edited(path, change):
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


@pytest.mark.slow
def test_exact_conversion_keeps_everything_and_a_fresh_process_finds_the_same(folders, tmp_path):
    path = tmp_path / "v2.json"
    result = verify(folders / "v2", "--against", LLAMA, "--certificate", path)
    assert result.exit_code == 0, result.output
    found = json.loads(path.read_text())
    assert found["passed"] and {measure["relative"] for measure in found["measures"]} == {1.0}
    for side, folder in (("model", folders / "v2"), ("source", LLAMA)):
        digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        assert found[side]["weights"] == {"model.safetensors": digest}
    # The small LLaMA recalls; README of the asset: 85 % of four needles, 93 % of tables of eight pairs like its own.
    scores = {measure["name"]: measure["source"] for measure in found["measures"]}
    assert scores["needles"] > 0.8 and scores["lookup"] > 0.5
    process = subprocess.run(
        [sys.executable, "-m", "conversion", "verify", folders / "v2", "--against", LLAMA, "--check", path, "--json"],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    outcomes = {check["name"]: check["outcome"] for check in json.loads(process.stdout)["checks"]}
    assert outcomes.pop("environment") == "measured" and set(outcomes.values()) == {"passed"}
    assert outcomes.keys() == {"statements", *scores}


def test_plain_copy_fails_by_name_and_its_certificate_checks_out(folders, tmp_path, short_suite):
    path = tmp_path / "v1.json"
    result = verify(folders / "v1", "--against", LLAMA, "--certificate", path)
    assert result.exit_code == 1 and "relative 15.3% (at least 95%)" in result.stdout
    found = json.loads(path.read_text())
    assert not found["passed"] and {"held-out loss", "KL", "greedy agreement", "needles"} <= set(found["failed"])
    assert "98.3% (arXiv:2505.03005)" in result.stdout
    assert verify(folders / "v1", "--against", LLAMA, "--check", path).exit_code == 0
    edited(path, lambda filed: filed["measures"][1].update(model=0.01))
    result = verify(folders / "v1", "--against", LLAMA, "--check", path)
    assert result.exit_code == 1 and "model is 0.01 in the certificate, and 1.85277 here" in result.stdout


def change_weights(folder):
    """A checkpoint whose record fits it, as after another healing."""
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    edited(folder / "conversion.json", lambda record: record["sha256"].update({"model.safetensors": digest}))


def test_changed_weights_and_texts_are_named(folders, tmp_path, short_suite, monkeypatch):
    """Before anything is run: a model that is loaded here is an error of another kind."""
    output, source, path = tmp_path / "v1", tmp_path / "llama", tmp_path / "v1.json"
    shutil.copytree(folders / "v1", output)
    shutil.copytree(LLAMA, source)
    certify(output, source).write(path)
    monkeypatch.setattr(certification, "load_in_float32", None)

    def refusal():
        result = verify(output, "--against", source, "--check", path)
        assert result.exit_code == 1 and result.stderr.count("\n") == 1, result.output
        return result.stderr

    standard = suite.FACTS_TEXT.read_text()
    other = tmp_path / "facts.jsonl"
    other.write_text(standard.replace("herring", "whale"))
    with monkeypatch.context() as patched:
        patched.setattr(suite, "FACTS_TEXT", other)
        assert f"error: {path}: its facts.jsonl is not that of this diff-llama" in refusal()
    shutil.copyfile(LLAMA / "tokenizer.json", output / "tokenizer.json")
    edited(output / "tokenizer.json", lambda tokenizer: tokenizer["model"]["merges"].pop(0))
    assert "its set of token windows is not that of this diff-llama with the tokenizer of" in refusal()
    shutil.copyfile(LLAMA / "tokenizer.json", output / "tokenizer.json")
    change_weights(output)
    assert refusal() == f"error: {output}/model.safetensors: not the weights that {path} certifies; certify again\n"
    with (source / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    assert f"{source}/model.safetensors: not the weights that v1 was converted from; give its source" in refusal()
    shutil.rmtree(output)
    assert str(output) in refusal()


def test_changed_config_is_named_and_older_certificates_do_not_say(folders, tmp_path, short_suite, monkeypatch):
    """Before anything is run, unless no number depends on what has changed."""
    output, path = tmp_path / "v1", tmp_path / "v1.json"
    shutil.copytree(folders / "v1", output)
    certify(output, LLAMA).write(path)
    edited(output / "config.json", lambda config: config.update(use_cache=False, dtype="float32"))
    assert verify(output, "--against", LLAMA, "--check", path).exit_code == 0
    edited(output / "config.json", lambda config: config["lambda_init"].__setitem__(2, 0.4))
    load = certification.load_in_float32
    monkeypatch.setattr(certification, "load_in_float32", None)
    result = verify(output, "--against", LLAMA, "--check", path)
    assert result.exit_code == 1 and result.stderr == (
        f"error: {output}/config.json: not the config that {path} certifies, in fields that numbers depend on; put it "
        "back as it was, or certify again\n"
    )
    monkeypatch.setattr(certification, "load_in_float32", load)
    edited(path, lambda filed: filed["model"].pop("config_fields"))
    result = verify(output, "--against", LLAMA, "--check", path)
    assert result.exit_code == 1 and "in the certificate, and" in result.stdout


def test_judge_scores_each_answer_once_and_out_of_range_is_refused(folders, short_suite):
    asked = []

    def judge(question, context, answer):
        asked.append((question, answer))
        assert question.endswith("?") and len(context) > 100
        return 0.75

    found = {measure["name"]: measure for measure in certify(folders / "v2", LLAMA, judge=judge).content["measures"]}
    assert found["facts, judged"]["source"] == found["facts, judged"]["model"] == 0.75
    assert len(asked) == len(set(asked)) == 4, "both models answer alike"
    with pytest.raises(ConversionError, match=r"judge: gave 7 for .*, expected a number from 0 to 1"):
        certify(folders / "v2", LLAMA, judge=lambda *_: 7)


def test_nothing_is_written_where_no_certificate_can_be_made(folders, tmp_path):
    path = tmp_path / "certificate.json"
    cases = [
        ((folders / "v2", "--certificate", path), "--against: not given; a certificate compares with the source"),
        ((folders / "v2", "--certificate", path, "--check", path), "--certificate and --check are both given"),
        ((folders / "v2", "--certificate", path, "--held-out", LLAMA / "heldout.txt"), "--held-out: given, but"),
        ((folders / "v2", "--against", LLAMA, "--certificate", tmp_path), "is a folder, expected a file"),
        (
            (folders / "v2", "--against", LLAMA, "--certificate", folders / "v2" / "config.json", "--overwrite"),
            "is no certificate",
        ),
        ((folders / "v2", "--against", LLAMA, "--certificate", LLAMA / "new.json"), "is inside the source"),
        ((folders / "v2", "--against", LLAMA, "--check", path), "missing; make it with"),
    ]
    for arguments, message in cases:
        result = verify(*arguments)
        assert result.exit_code in (1, 3) and message in result.stderr and result.stderr.count("\n") == 1, message
    assert not path.exists() and not (LLAMA / "new.json").exists()


def test_models_that_the_suite_is_not_for_are_refused(tmp_path):
    source = saved(random_llama(max_position_embeddings=1024), tmp_path / "llama")
    convert_checkpoint(source, tmp_path / "v2", "v2")
    with pytest.raises(ConversionError, match="has no tokenizer, and a certificate is of text"):
        certify(tmp_path / "v2", source)
    short = saved(random_llama(), tmp_path / "short")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(LLAMA / name, short / name)
    convert_checkpoint(short, tmp_path / "v2-short", "v2")
    with pytest.raises(ConversionError, match=r"max_position_embeddings is 128, and the prompts .* need 512"):
        certify(tmp_path / "v2-short", short)


def test_broken_checkpoint_gets_no_certificate(folders, tmp_path):
    output = shutil.copytree(folders / "v2", tmp_path / "v2")
    weights = load_file(output / "model.safetensors")
    save_file({name: weights[name] for name in sorted(weights)[1:]}, output / "model.safetensors")
    report = verify_checkpoint(output, LLAMA, certificate=tmp_path / "certificate.json")
    assert not report.passed and not (tmp_path / "certificate.json").exists()


def test_model_that_computes_nothing_is_refused(folders, tmp_path, short_suite, monkeypatch):
    load = certification.load_in_float32

    def broken(folder, *arguments):
        model = load(folder, *arguments)
        if folder == folders / "v2":
            torch.nn.init.constant_(model.model.norm.weight, float("nan"))
        return model

    monkeypatch.setattr(certification, "load_in_float32", broken)
    with pytest.raises(ConversionError, match="v2: its logits on the held-out text are not finite"):
        certify(folders / "v2", LLAMA)
