"""Calibration text that the source writes itself: from its own distribution, once, and the same after a stop."""

import json

import pytest
import torch
from command_line import run
from random_llamas import random_llama
from safetensors.torch import load_file

from conversion import ConversionError, convert_checkpoint
from conversion.calibration import self_text as module
from conversion.calibration.self_text import sample


TOKENS = 16 * 128


def convert(llama, output, **options):
    defaults = {"calibration": "self", "calibration_tokens": TOKENS, "stages": ["pairing", "refit"], "measure": False}
    return convert_checkpoint(llama, output, "v1", **(defaults | options))


def test_tokens_are_drawn_with_the_models_own_probabilities():
    """The second token of many sequences against the softmax after bos: a frequency's error is 3 of its sigmas."""
    model = random_llama().eval()
    rows = sample(model, 4000, 2, seed=0)
    assert rows.shape == (4000, 2) and set(rows[:, 0].tolist()) == {model.config.bos_token_id}
    with torch.no_grad():
        expected = model(torch.tensor([[model.config.bos_token_id]])).logits[0, -1].softmax(-1)
    likely = expected.topk(8).indices
    found = rows[:, 1].bincount(minlength=len(expected)) / len(rows)
    sigma = (expected * (1 - expected) / len(rows)).sqrt()
    assert ((found - expected).abs()[likely] < 4 * sigma[likely]).all()


def test_cached_steps_draw_what_whole_sequences_would():
    model = random_llama().eval()
    rows = sample(model, 3, 12, seed=5)
    generator = torch.Generator().manual_seed(5)
    torch.randint(model.config.vocab_size, (3, 1), generator=generator)
    with torch.no_grad():
        for length in range(1, 12):
            logits = model(rows[:, :length]).logits[:, -1]
            assert torch.equal(torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0], rows[:, length])


def test_the_source_writes_the_text_and_the_record_says_so(llama, tmp_path):
    convert(llama, tmp_path / "v1")
    record = json.loads((tmp_path / "v1/conversion.json").read_text())["calibration"]
    assert record["text"] == "self: sampled from the source at temperature 1" and record["tokens"] == TOKENS
    assert not list(tmp_path.glob(".*")), "kept work goes once all is written"
    convert(llama, tmp_path / "other", seed=1)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("v1", "other"))
    name = "model.layers.0.self_attn.o_proj.weight"
    assert not torch.equal(ours[name], theirs[name]), "another seed, another text"


@pytest.mark.parametrize("resume", [None, False])
def test_a_stopped_run_has_its_text_used_again(llama, tmp_path, monkeypatch, resume):
    def interrupt(*at):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(llama, tmp_path / "v1", calibration_progress=interrupt)
    kept = load_file(tmp_path / ".v1.calibration" / "text.safetensors")["rows"]
    drawn = []
    monkeypatch.setattr(module, "sample", lambda *arguments, **seed: drawn.append(1) or sample(*arguments, **seed))
    convert(llama, tmp_path / "v1", resume=resume)
    assert drawn == ([] if resume is None else [1])
    assert kept.shape == (TOKENS // 128, 128)
    convert(llama, tmp_path / "whole")
    assert (tmp_path / "v1/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_a_file_called_self_is_given_with_its_folder(llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConversionError, match="self: does not exist"):
        convert(llama, tmp_path / "v1", calibration="./self")


def test_the_command_line_takes_self_as_no_file(llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ("--variant", "v1", "--effort", "quick", "--calibration-tokens", TOKENS, "--dry-run")
    written = run("convert", llama, tmp_path / "v1", *options, "--calibration", "self")
    assert written.exit_code == 0 and "tokens that the source writes" in written.stdout + written.stderr
    read = run("convert", llama, tmp_path / "v1", *options, "--calibration", "./self")
    assert read.exit_code != 0 and "self: does not exist" in read.stderr


def test_dry_run_writes_no_text(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "sample", None)
    notes = convert(llama, tmp_path / "v1", dry_run=True).notes
    assert any(note.startswith(f"calibration on {TOKENS:,} tokens that the source writes: about") for note in notes)
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]
