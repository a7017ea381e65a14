"""What has to be chosen is asked for: a LLaMA's variant, and whether its V1 is calibrated; of an import nothing."""

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from random_llamas import random_diffllama, saved

from conversion import ConversionError, convert_checkpoint
from conversion.source import location as source


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--variant is missing, expected v2 or v1: v2 .* last bit .* v1, .* size .*--calibration TEXT"),
        ({"variant": None}, "--variant is missing"),
        ({"layers": [0]}, "--variant is missing"),
        ({"variant": "v1"}, "needs --calibration TEXT.* 5.06 nats after 3.18.*--uncalibrated .*--variant v2"),
        ({"variant": "v1", "lambda_init": "paper"}, "needs --calibration TEXT"),
        ({"variant": "v2", "uncalibrated": True}, "--uncalibrated belongs to variant v1"),
        ({"variant": "v1", "uncalibrated": True, "calibration": "text"}, "exclude each other"),
        ({"uncalibrated": True}, "--variant is missing"),
    ],
)
def test_llama_without_a_choice_is_refused(tmp_path, llama, options, message):
    with pytest.raises(ConversionError, match=message) as caught:
        convert_checkpoint(llama, tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


@pytest.mark.parametrize("options", [{}, {"variant": "v1"}])
def test_import_of_a_diffllama_needs_no_choice_of_variant(tmp_path, options):
    report = convert_checkpoint(saved(random_diffllama(), tmp_path / "theirs"), tmp_path / "ours", **options)
    assert report.record["promise"]["kind"] == "equal"
    assert not [note for note in report.notes if "uncalibrated" in note]


def test_faults_of_a_source_come_before_the_choice(tmp_path, llama):
    (llama / "config.json").write_text("[]")
    with pytest.raises(ConversionError, match="expected an object"):
        convert_checkpoint(llama, tmp_path / "out")


def test_hub_source_is_asked_for_its_config_alone_before_the_choice(tmp_path, llama, monkeypatch):
    asked = []

    def download(hub_id, **options):
        asked.append(options["allow_patterns"])
        return str(llama)

    monkeypatch.setattr(source, "snapshot_download", download)
    with pytest.raises(ConversionError, match="--variant is missing"):
        convert_checkpoint("owner/name", tmp_path / "out")
    assert asked == [["config.json"]]


def test_hub_that_cannot_be_reached_is_said_before_the_choice(tmp_path, monkeypatch):
    def download(hub_id, **options):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(source, "snapshot_download", download)
    with pytest.raises(ConversionError, match="cannot be reached"):
        convert_checkpoint("owner/name", tmp_path / "out")


@pytest.mark.parametrize("dry_run", [True, False])
def test_uncalibrated_v1_says_what_is_lost(tmp_path, llama, dry_run):
    report = convert_checkpoint(llama, tmp_path / "v1", "v1", uncalibrated=True, dry_run=dry_run)
    (note,) = (note for note in report.notes if note.startswith("uncalibrated: "))
    assert "5.06 nats after 3.18" in note and "no recall" in note
