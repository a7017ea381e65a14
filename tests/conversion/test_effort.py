"""`convert --effort`: one name for stages and tokens, which are the same conversion when they are given one by one."""

import json

import pytest
from command_line import run
from random_llamas import random_llama, saved, write_rows

from conversion import ConversionError, convert_checkpoint
from conversion.calibration import estimate


ROW_TOKENS = 128
STAGES = ("copy", "pairing", "refit", "values", "local")
# What the documentation says of each: stages, and tokens of a text that has enough.
PROMISED = {
    "quick": (("pairing", "refit"), 16_384),
    "standard": (STAGES, 65_536),
    "thorough": (STAGES, 262_144),
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """By effort: the folder, the report, the note before the start, and the number of gradient steps."""
    folder = tmp_path_factory.mktemp("efforts")
    llama = saved(random_llama(), folder / "llama")
    text = write_rows(folder / "calibration.jsonl", 8, ROW_TOKENS)
    found = {}
    for effort in PROMISED:
        notes = []
        steps = []
        report = convert(
            llama,
            folder / effort,
            text,
            effort=effort.upper(),
            before_calibration=lambda asked, notes=notes: notes.append(asked.note),
            calibration_progress=lambda *at, steps=steps: steps.append(at[2] == "local"),
        )
        found[effort] = (folder / effort, report, notes[0], sum(steps))
    return found


@pytest.fixture
def text(tmp_path):
    return write_rows(tmp_path / "calibration.jsonl", 8, ROW_TOKENS)


def convert(llama, output, text, **options):
    return convert_checkpoint(llama, output, "v1", calibration=text, measure=False, **options)


@pytest.mark.parametrize("effort", PROMISED)
def test_effort_converts_and_says_so_everywhere(converted, effort):
    folder, report, note, _ = converted[effort]
    calibration = report.record["calibration"]
    assert (calibration["effort"], tuple(calibration["stages"])) == (effort, PROMISED[effort][0])
    assert calibration["tokens"] == 8 * ROW_TOKENS
    assert f"(all of the text), effort {effort}: about" in note
    assert f"of `calibration.jsonl`, effort {effort}: " in (folder / "README.md").read_text()
    shown = json.loads(run("inspect", folder, "--json").stdout)
    assert shown["conversion"]["calibration"]["effort"] == effort


@pytest.mark.parametrize("effort", ["quick", "standard"])
def test_effort_is_the_conversion_of_its_stages_and_tokens(converted, llama, text, tmp_path, effort):
    """Thorough has more gradient steps, which no other option gives."""
    convert(llama, tmp_path / "given", text, stages=PROMISED[effort][0])
    expected, found = (
        (folder / "model.safetensors").read_bytes() for folder in (tmp_path / "given", converted[effort][0])
    )
    assert found == expected


def test_thorough_takes_more_gradient_steps_than_standard_on_the_same_text(converted):
    assert converted["thorough"][3] > converted["standard"][3] > converted["quick"][3] == 0


def test_standard_is_the_default_and_stages_have_no_effort(llama, text, tmp_path):
    report = convert(llama, tmp_path / "v1", text, dry_run=True)
    assert any(", effort standard: about" in note for note in report.notes)
    convert(llama, tmp_path / "copy", text, stages=["copy"])
    record = json.loads((tmp_path / "copy" / "conversion.json").read_text())
    assert record["calibration"]["effort"] is None
    assert "effort" not in (tmp_path / "copy" / "README.md").read_text()


def test_each_effort_reads_more_text_and_takes_longer(llama, tmp_path, monkeypatch):
    """On a machine that does 10^9 operations per second of any dtype."""
    monkeypatch.setattr(estimate, "product_rate", lambda device_type, dtype: 1e9)
    monkeypatch.setattr(estimate, "faster_in_bfloat16", lambda device_type: False)
    text = write_rows(tmp_path / "long.jsonl", 2200, ROW_TOKENS)
    seconds = []

    def refuse(calibration):
        seconds.append(calibration.estimate.seconds)
        assert calibration.text.tokens == PROMISED[calibration.text.effort][1]
        raise ConversionError("seen")

    for effort in PROMISED:
        with pytest.raises(ConversionError, match="seen"):
            convert(llama, tmp_path / "v1", text, effort=effort, before_calibration=refuse)
    assert seconds == sorted(set(seconds)) and len(seconds) == 3


def test_tokens_are_given_in_place_of_the_efforts(llama, text, tmp_path):
    report = convert(llama, tmp_path / "v1", text, effort="quick", calibration_tokens=4 * ROW_TOKENS)
    assert report.record["calibration"]["tokens"] == 4 * ROW_TOKENS
    with pytest.raises(ConversionError, match="give more text, ask for fewer tokens"):
        convert(llama, tmp_path / "more", text, effort="quick", calibration_tokens=16 * ROW_TOKENS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"effort": "hasty"}, "^effort is 'hasty', expected one of quick, standard, thorough"),
        ({"effort": "quick", "stages": ["refit"]}, "^effort and stages both say what is done to each layer; give one"),
        ({"effort": "quick", "calibration": None, "uncalibrated": True}, "^effort needs text to calibrate on"),
    ],
)
def test_effort_that_makes_no_sense_is_refused(llama, text, tmp_path, options, message):
    with pytest.raises(ConversionError, match=message):
        convert_checkpoint(llama, tmp_path / "v1", "v1", **({"calibration": text} | options))
    assert not (tmp_path / "v1").exists()
