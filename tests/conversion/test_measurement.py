"""A conversion ends with its numbers: in the record, the card, `inspect` and on the terminal; or with why not."""

import json
import shutil

import pytest
import torch
from command_line import run
from random_llamas import edit_json, random_diffllama, saved, token_ids, write_rows
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from conversion import ConversionError, convert_checkpoint
from conversion.describe import describe_checkpoint
from conversion.evaluation import measurement
from conversion.hub.markdown import markdown
from conversion.record import measured_text


COPY = {"variant": "v1", "uncalibrated": True}
ROWS = 3
ROW_TOKENS = 40


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", ROWS, ROW_TOKENS)


def record_of(folder):
    return json.loads((folder / "conversion.json").read_text())


def test_v1_is_measured_next_to_its_source(llama, rows, tmp_path):
    """Against transformers' own loss and torch's own divergence, on the one window that the rows make."""
    report = convert_checkpoint(llama, tmp_path / "v1", **COPY, held_out=rows)
    ids = token_ids(length=ROW_TOKENS, batch=ROWS, seed=3).flatten()[None]
    with torch.no_grad():
        theirs, ours = (
            model_class.from_pretrained(folder, dtype=torch.float32)(ids, labels=ids)
            for model_class, folder in ((LlamaForCausalLM, llama), (AutoModelForCausalLM, tmp_path / "v1"))
        )
    p, q = (output.logits[0].double().log_softmax(-1) for output in (theirs, ours))
    found = record_of(tmp_path / "v1")["measured"]
    assert found == report.record["measured"]
    assert (found["text"], found["tokens"]) == ("rows.jsonl", ROWS * ROW_TOKENS)
    # float32 sums over 120 tokens, and another attention path than sdpa
    values = found["values"]
    assert values["loss_nats"] == pytest.approx(ours.loss.item(), rel=1e-5)
    assert values["source_loss_nats"] == pytest.approx(theirs.loss.item(), rel=1e-5)
    assert values["kl_nats"] == pytest.approx(kl_div(q, p, log_target=True, reduction="batchmean").item(), rel=1e-3)
    assert found["values"]["greedy_agreement"] == pytest.approx(
        (p.argmax(-1) == q.argmax(-1)).double().mean().item(), abs=0.02
    )
    assert found["lambda"] == {"0": 0.05, "1": 0.05}


def test_numbers_are_shown_recorded_and_written_on_the_card(llama, rows, tmp_path):
    shown = run("convert", llama, tmp_path / "v1", "--variant", "v1", "--uncalibrated", "--held-out", rows)
    assert shown.exit_code == 0, shown.stderr
    found = record_of(tmp_path / "v1")["measured"]
    said = measured_text(found)
    assert f"measured: {said}" in shown.stdout and "on rows.jsonl, 120 tokens; lambda per layer 0.050 0.050" in said
    assert (
        f"KL {found['values']['kl_nats']:.4f} nats/token, greedy agreement {found['values']['greedy_agreement']:.1%}"
        in said
    )
    assert f"At the end of the conversion: {markdown(said)}." in (tmp_path / "v1" / "README.md").read_text()
    assert describe_checkpoint(tmp_path / "v1")["conversion"]["measured"] == found
    assert "conversion.measured" in run("inspect", tmp_path / "v1").stdout
    verified = run("verify", tmp_path / "v1", "--against", llama, "--held-out", rows, "--json")
    (converted,) = (check for check in json.loads(verified.stdout)["checks"] if check["name"] == "converted")
    assert converted["text"] == "rows.jsonl", "every number names its text"
    assert converted["values"]["kl_nats"] == pytest.approx(found["values"]["kl_nats"], abs=1e-6)


def test_calibration_is_shown_with_its_text_stages_and_numbers(llama, rows, tmp_path):
    options = {"calibration": rows, "calibration_tokens": ROWS * ROW_TOKENS, "stages": ["copy"]}
    edit_json(llama / "config.json", max_position_embeddings=ROW_TOKENS)
    report = convert_checkpoint(llama, tmp_path / "v1", "v1", **options, held_out=rows)
    assert "fitted" in report.record["promise"]["text"] and "healed" not in report.record["promise"]["text"]
    expected = {"text": "rows.jsonl", "tokens": ROWS * ROW_TOKENS, "effort": None, "stages": ["copy"]}
    expected |= {"lambda_floor": 0.02}
    assert describe_checkpoint(tmp_path / "v1")["conversion"]["calibration"] == expected
    card = (tmp_path / "v1" / "README.md").read_text()
    assert "Calibrated on 120 tokens of `rows.jsonl`: copy, λ at least 0.02." in card
    assert "At the end of the conversion: loss" in card


@pytest.mark.parametrize(("options", "said"), [({}, "bit for bit"), ({"lambda_start": 0.3}, "up to ")])
def test_v2_is_checked_for_its_bits(llama, tmp_path, options, said):
    report = convert_checkpoint(llama, tmp_path / "v2", "v2", **options)
    found = report.record["measured"]
    assert (found["values"]["largest_difference"] == 0) == (said == "bit for bit")
    assert found["values"]["largest_difference"] < 1e-4
    assert f"logits equal {said}" in measured_text(found)


def test_import_is_compared_with_transformers_own_class(tmp_path):
    report = convert_checkpoint(saved(random_diffllama(), tmp_path / "theirs"), tmp_path / "ours")
    assert report.record["measured"]["values"]["largest_difference"] < 1e-4


def test_broken_promise_is_an_error(llama, tmp_path, monkeypatch):
    load = measurement.load_in_float32

    def load_wrong(folder, *arguments):
        model = load(folder, *arguments)
        if folder == tmp_path / "v2":
            model.lm_head.weight.data.mul_(1.5)
        return model

    monkeypatch.setattr(measurement, "load_in_float32", load_wrong)
    with pytest.raises(ConversionError, match=r"its logits differ from the source's by .*, expected the same bits"):
        convert_checkpoint(llama, tmp_path / "v2", "v2")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (COPY, "not measured: no tokenizer"),
        ({"variant": "v2", "backbone_only": True}, "not measured: a backbone without a language model head"),
    ],
)
def test_what_cannot_be_measured_says_why(llama, tmp_path, options, said):
    report = convert_checkpoint(llama, tmp_path / "out", **options)
    assert measured_text(report.record["measured"]) == said
    assert markdown(said) in (tmp_path / "out" / "README.md").read_text()


def test_large_models_on_a_cpu_only_say_how(llama, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(measurement, "CPU_PARAMETERS", 20_000)
    monkeypatch.setattr(measurement.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(measurement, "load_in_float32", None)
    report = convert_checkpoint(llama, tmp_path / "v1", **COPY, held_out=rows)
    said = measured_text(report.record["measured"])
    assert "`diff-llama verify OUTPUT --against SOURCE`" in said and "are many for a CPU" in said


def test_no_measure_measures_nothing(llama, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(measurement, "load_in_float32", None)
    command = ("convert", llama, tmp_path / "v1", "--variant", "v1", "--uncalibrated", "--held-out", rows)
    shown = run(*command, "--no-measure")
    assert shown.exit_code == 0 and "measured" not in shown.stdout
    assert record_of(tmp_path / "v1")["measured"] is None


@pytest.mark.parametrize("error", [MemoryError("no room"), RuntimeError("can't allocate memory"), OSError("gone")])
def test_failing_to_measure_does_not_undo_a_finished_conversion(llama, tmp_path, monkeypatch, caplog, error):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(measurement, "load_in_float32", fail)
    report = convert_checkpoint(llama, tmp_path / "v2", "v2")
    said = f"not measured: {type(error).__name__} when source and conversion were run"
    assert measured_text(report.record["measured"]) == said
    assert str(error) in caplog.text, "the details are for the user's eyes, and are not published"
    assert (tmp_path / "v2" / "model.safetensors").is_file()


def test_text_that_is_missing_is_found_before_anything_is_written(llama, tmp_path):
    with pytest.raises(ConversionError, match=r"missing\.txt: does not exist"):
        convert_checkpoint(llama, tmp_path / "v1", **COPY, held_out=tmp_path / "missing.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_source_whose_logits_are_not_finite_is_not_compared(llama, tmp_path):
    model = LlamaForCausalLM.from_pretrained(llama)
    model.model.norm.weight.data[0] = torch.nan
    shutil.rmtree(llama)
    report = convert_checkpoint(saved(model, llama), tmp_path / "v2", "v2", allow_nonfinite=True)
    assert "the source's own logits are not finite" in report.record["measured"]["not_measured"]


@pytest.mark.parametrize("fault", ["tokenizer", "tensor", "size"])
def test_reasons_that_are_published_name_no_paths(llama, rows, tmp_path, monkeypatch, fault):
    options = {}
    if fault == "tokenizer":
        (llama / "tokenizer_config.json").write_text("{}")
    elif fault == "tensor":
        load = measurement.load_original
        missing = {"missing_keys": {"model.norm.weight"}}
        monkeypatch.setattr(measurement, "load_original", lambda *a, **k: (load(*a, **k)[0], missing))
    else:
        monkeypatch.setattr(measurement, "CPU_PARAMETERS", 20_000)
        options = {"held_out": rows}
    report = convert_checkpoint(llama, tmp_path / "v2", "v2", **options)
    assert report.record["measured"]["not_measured"]
    for name in ("conversion.json", "README.md"):
        assert str(tmp_path) not in (tmp_path / "v2" / name).read_text()
