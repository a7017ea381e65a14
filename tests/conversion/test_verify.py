"""Verification passes what is right and names what is wrong."""

import json
import shutil
import subprocess

import pytest
import torch
from command_line import run
from planted_pairs import kl_nats
from random_llamas import FLAVOURS, edit_json, random_diffllama, random_llama, saved
from safetensors.torch import load_file, save_file
from tiny_tokenizers import TINY_LLAMA
from transformers import AutoTokenizer, DynamicCache, LlamaForCausalLM

from conversion import ConversionError, convert_checkpoint, push_checkpoint, verify_checkpoint
from conversion.data.held_out import read_held_out
from conversion.record import read_record, read_report
from modeling_diff import DiffLlamaForCausalLM


def outcomes(report):
    return {check.name: check.outcome for check in report.checks}


@pytest.fixture(scope="module")
def v1(tmp_path_factory):
    """Not to be changed."""
    folder = tmp_path_factory.mktemp("shared")
    convert_checkpoint(saved(random_llama(), folder / "llama"), folder / "v1", "v1", uncalibrated=True)
    return folder / "v1"


def rewrite(folder, change, checksum=True):
    """Changes the weights of a checkpoint, and by default the recorded checksum with them."""
    import hashlib

    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    record = read_record(folder)
    if checksum:
        record["sha256"]["model.safetensors"] = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        (folder / "conversion.json").write_text(json.dumps(record))


@pytest.mark.parametrize("flavour", ["gqa", "biased"])
def test_exact_conversion_passes_every_check(tmp_path, flavour):
    source = saved(random_llama(**FLAVOURS[flavour]), tmp_path / "llama")
    convert_checkpoint(source, tmp_path / "v2", "v2")
    report = verify_checkpoint(tmp_path / "v2", against=source)
    assert report.passed and set(outcomes(report).values()) == {"passed"}
    names = "tensors, checksums, code, parameters, source, default load, logits, tokens, cache, liveness"
    assert [check.name for check in report.checks] == names.split(", ")
    assert json.loads(json.dumps(report.to_dict()))["promise"] == "bit-exact"


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"lambda_start": 0.3}, {"layers": [1]}])
def test_exact_conversions_with_options_pass(tmp_path, llama, options):
    convert_checkpoint(llama, tmp_path / "v2", "v2", **options)
    report = verify_checkpoint(tmp_path / "v2", against=llama)
    assert report.passed, report.checks


def test_parity_conversion_is_measured_beside_a_wrong_one(tmp_path, llama):
    convert_checkpoint(llama, tmp_path / "v1", "v1", uncalibrated=True)
    report = verify_checkpoint(tmp_path / "v1", against=llama)
    assert report.passed, report.checks
    converted, wrong = (check for check in report.checks if check.outcome == "measured")
    assert converted.values.keys() == wrong.values.keys() >= {"kl_nats", "loss_nats", "greedy_agreement"}
    assert converted.values["kl_nats"] > 0 and converted.values != wrong.values


def test_parity_is_measured_without_a_bos_too_where_the_tokenizer_adds_none(tmp_path):
    """Expected from another forward pass, in float64: both models on the windows without their first token."""
    source = shutil.copytree(TINY_LLAMA, tmp_path / "llama")
    edit_json(source / "tokenizer.json", post_processor=None)
    options = {"effort": "quick", "calibration": source / "calibration.txt", "calibration_tokens": 2048}
    report = convert_checkpoint(source, tmp_path / "v1", "v1", measure=False, **options)
    assert [note for note in report.notes if "begin prompts with <s>" in note]
    checks = {check.name: check for check in verify_checkpoint(tmp_path / "v1", against=source).checks}
    found = checks["converted, without a bos"]
    assert found.detail.endswith("without a bos, 4,080 tokens")
    tokenizer = AutoTokenizer.from_pretrained(source)
    windows = torch.cat(read_held_out(tokenizer, len(tokenizer), 512).windows)[:, 1:]
    models = [LlamaForCausalLM.from_pretrained(source), DiffLlamaForCausalLM.from_pretrained(tmp_path / "v1")]
    expected = kl_nats(*(model.double() for model in models), windows)
    assert found.values["kl_nats"] == pytest.approx(expected, abs=1e-5)  # float32: logits differ by 1e-5
    assert checks["converted"].values["kl_nats"] != pytest.approx(expected, abs=1e-4)


def test_a_bos_that_the_tokenizer_adds_is_measured_alone(tmp_path):
    options = {"effort": "quick", "calibration": TINY_LLAMA / "calibration.txt", "calibration_tokens": 2048}
    report = convert_checkpoint(TINY_LLAMA, tmp_path / "v1", "v1", measure=False, **options)
    assert not [note for note in report.notes if "begin prompts" in note]
    assert "converted, without a bos" not in outcomes(verify_checkpoint(tmp_path / "v1"))


def test_import_is_compared_with_transformers_own_class(tmp_path):
    source = saved(random_diffllama(), tmp_path / "theirs")
    convert_checkpoint(source, tmp_path / "ours", "v1", uncalibrated=True)
    report = verify_checkpoint(tmp_path / "ours", against=source)
    assert report.passed and outcomes(report)["logits"] == "passed"


def test_generation_settings_of_the_checkpoint_do_not_matter(tmp_path, llama):
    settings = {"num_return_sequences": 3, "return_dict_in_generate": True, "do_sample": True}
    (llama / "generation_config.json").write_text(json.dumps(settings))
    convert_checkpoint(llama, tmp_path / "v2", "v2")
    assert verify_checkpoint(tmp_path / "v2", against=llama).passed


def test_without_source_the_function_is_not_judged(tmp_path, llama):
    convert_checkpoint(llama, tmp_path / "v2", "v2")
    report = verify_checkpoint(tmp_path / "v2")
    assert report.passed and outcomes(report)["function"] == "skipped"


def test_changed_bytes_and_lost_files_are_found(tmp_path, llama):
    convert_checkpoint(llama, tmp_path / "v2", "v2")
    rewrite(tmp_path / "v2", lambda weights: weights["model.norm.weight"].add_(1), checksum=False)
    (tmp_path / "v2" / "modeling_diff_llama.py").unlink()
    found = outcomes(verify_checkpoint(tmp_path / "v2"))
    assert (found["tensors"], found["checksums"], found["code"]) == ("passed", "failed", "failed")


def edited(name, **fields):
    """A change of a JSON file."""
    return lambda folder: edit_json(folder / name, **fields)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (edited("config.json", rms_norm_eps=0.1), "config.json"),
        (edited("config.json", lambda_init=[0.9, 0.9]), "config.json"),
        (lambda folder: (folder / "modeling_diff_llama.py").write_text(""), "modeling_diff_llama.py"),
        (lambda folder: (folder / "diff_attention.py").write_text("import os\n"), "diff_attention.py"),
    ],
)
def test_changed_config_and_code_are_found(v1, tmp_path, change, name):
    """Unless the record is an older one, which knows the weights alone."""
    folder = shutil.copytree(v1, tmp_path / "v1")
    change(folder)
    check = next(check for check in verify_checkpoint(folder).checks if check.name == "checksums")
    assert (check.outcome, check.detail) == ("failed", f"{name} has changed")
    weights_alone = {"model.safetensors": read_record(folder)["sha256"]["model.safetensors"]}
    edited("conversion.json", sha256=weights_alone)(folder)
    assert outcomes(verify_checkpoint(folder))["checksums"] == "passed"


def test_record_names_all_that_computes_and_nothing_that_is_the_users(v1, tmp_path):
    """Against sha256sum; a card, a license or a chat template may come later."""
    listed = subprocess.run(
        "sha256sum config.json *.safetensors *.py", shell=True, cwd=v1, capture_output=True, text=True
    )
    expected = {name: digest for digest, name in (line.split() for line in listed.stdout.splitlines())}
    assert read_record(v1)["sha256"] == expected and "modeling_diff_llama.py" in expected
    folder = shutil.copytree(v1, tmp_path / "v1")
    for name in ("README.md", "NOTICE", "generation_config.json", "chat_template.jinja"):
        (folder / name).write_text("{}")
    assert verify_checkpoint(folder).passed


def test_code_is_judged_by_what_it_imports(tmp_path, llama):
    """An import of an import that did not travel is found; files of another version's bundle are not called for."""
    convert_checkpoint(llama, tmp_path / "v2", "v2")
    (tmp_path / "v2" / "unused.py").write_text("from .nowhere import nothing\n")
    assert outcomes(verify_checkpoint(tmp_path / "v2"))["code"] == "passed"
    with (tmp_path / "v2" / "configuration_diff_llama.py").open("a") as file:
        file.write("from .elsewhere import something\n")
    check = next(check for check in verify_checkpoint(tmp_path / "v2").checks if check.name == "code")
    assert (check.outcome, check.detail) == ("failed", "elsewhere.py is missing")


def test_missing_tensor_is_found(tmp_path, llama):
    convert_checkpoint(llama, tmp_path / "v2", "v2")
    rewrite(tmp_path / "v2", lambda weights: weights.pop("model.layers.1.self_attn.lambda_proj.weight"))
    report = verify_checkpoint(tmp_path / "v2")
    assert not report.passed and "lambda_proj" in report.checks[0].detail


def test_conversion_that_is_off_in_one_weight_fails(tmp_path, llama):
    convert_checkpoint(llama, tmp_path / "v2", "v2")
    name = "model.layers.1.self_attn.o_proj.weight"
    rewrite(tmp_path / "v2", lambda weights: weights.update({name: weights[name] * 1.01}))
    assert outcomes(verify_checkpoint(tmp_path / "v2", against=llama))["logits"] == "failed"


def test_dead_conversion_fails(tmp_path, llama):
    """All lambda vectors zero: the function of the start, and no gradient in any of them, ever."""
    convert_checkpoint(llama, tmp_path / "v1", "v1", uncalibrated=True)
    rewrite(tmp_path / "v1", lambda ws: [w.zero_() for name, w in ws.items() if "diff_lambda" in name])
    report = verify_checkpoint(tmp_path / "v1")
    assert outcomes(report)["liveness"] == "failed"


def test_tokens_of_a_promise_up_to_rounding_are_measured_and_not_checked(tmp_path, llama):
    convert_checkpoint(llama, tmp_path / "v2", "v2", lambda_start=0.3)
    found = outcomes(verify_checkpoint(tmp_path / "v2", against=llama))
    assert (found["logits"], found["tokens"]) == ("passed", "measured")


def test_another_source_is_found(tmp_path, llama):
    convert_checkpoint(llama, tmp_path / "v2", "v2")
    other = saved(random_llama(seed=5), tmp_path / "other")
    assert outcomes(verify_checkpoint(tmp_path / "v2", against=other))["source"] == "failed"


def test_another_source_of_another_vocabulary_is_found(tmp_path, llama):
    convert_checkpoint(llama, tmp_path / "v1", "v1", uncalibrated=True)
    other = saved(random_llama(vocab_size=24), tmp_path / "other")
    report = verify_checkpoint(tmp_path / "v1", against=other)
    assert outcomes(report)["source"] == "failed"
    check = next(check for check in report.checks if check.name == "function")
    assert check.outcome == "skipped" and check.detail.startswith("not compared: 24 tokens in its vocabulary")


@pytest.mark.parametrize("variant, options", [("v1", {"uncalibrated": True}), ("v2", {})])
def test_source_of_a_backbone_is_looked_at(tmp_path, llama, variant, options):
    output = tmp_path / "backbone"
    convert_checkpoint(llama, output, variant, backbone_only=True, **options)
    report = verify_checkpoint(output, against=llama)
    assert report.passed and outcomes(report)["source"] == "passed" and outcomes(report)["function"] == "skipped"
    other = saved(random_llama(seed=5), tmp_path / "other")
    assert outcomes(verify_checkpoint(output, against=other))["source"] == "failed"
    with pytest.raises(ConversionError, match=f"{tmp_path}/nowhere: does not exist, expected a checkpoint folder"):
        verify_checkpoint(output, against=tmp_path / "nowhere")


@pytest.mark.parametrize("backbone", [False, True])
def test_source_of_another_type_is_refused_in_one_line(tmp_path, llama, backbone):
    for name in ("v2", "other"):
        convert_checkpoint(llama, tmp_path / name, "v2", backbone_only=backbone)
    result = run("verify", tmp_path / "v2", "--against", tmp_path / "other")
    assert result.exit_code == 1 and result.stderr == (
        f"error: --against {tmp_path}/other: model_type is 'diff_llama' in its config.json, expected 'llama' as of "
        "llama, the source of this conversion; give that\n"
    )


def test_a_broken_cache_fails(tmp_path, llama, monkeypatch):
    convert_checkpoint(llama, tmp_path / "v2", "v2")
    update = DynamicCache.update

    def shifted(*arguments, **settings):
        keys, values = update(*arguments, **settings)
        return keys.roll(1, 2), values

    monkeypatch.setattr(DynamicCache, "update", shifted)
    assert outcomes(verify_checkpoint(tmp_path / "v2"))["cache"] == "failed"


def test_folders_that_were_not_converted_are_refused(tmp_path, llama):
    with pytest.raises(ConversionError, match="model_type is 'llama'"):
        verify_checkpoint(llama)
    convert_checkpoint(llama, tmp_path / "v2", "v2")
    (tmp_path / "v2" / "conversion.json").unlink()
    with pytest.raises(ConversionError, match="missing; only checkpoints"):
        verify_checkpoint(tmp_path / "v2")


def changed_record(folder, name, value):
    """The record with one field changed, or without it."""
    record = json.loads((folder / "conversion.json").read_text())
    *path, last = name.split(".")
    place = record
    for key in path:
        place = place[key]
    place[last] = value
    if value is None:
        del place[last]
    return json.dumps(record)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "is a JSON list, expected an object"),
        ("{}", "source.name is missing"),
        ("{", "is not JSON"),
        ({"promise": "parity"}, "promise is 'parity'"),
        ({"promise": {"kind": "new", "text": ""}}, "promise.kind is 'new'"),
        ({"promise": {"kind": [], "text": ""}}, r"promise.kind is \[\]"),
        ({"calibration": 5}, "calibration is 5"),
        ({"calibration": {"text": "a.txt", "tokens": "5", "stages": []}}, "calibration.tokens is '5'"),
        ({"healing": 5}, "healing is 5"),
        ({"healing": [5]}, r"healing\[0\] is 5"),
        ({"healing": [{"end": {"loss": "low"}}]}, r"healing\[0\].end.loss is 'low'"),
        ({"options.lambda_start": True}, "options.lambda_start is True"),
        ({"versions.torch": 2}, "versions.torch is 2"),
        ({"source.sha256": {"model.safetensors": 1}}, r"source.sha256.model.safetensors is 1"),
        ({"parameters.source": "many"}, "parameters.source is 'many'"),
        ({"sha256": ["model.safetensors"]}, r"sha256 is \['model.safetensors'\]"),
        ({"options.dtype": None}, "options.dtype is missing"),
    ],
)
@pytest.mark.parametrize(
    "read", [read_record, verify_checkpoint, lambda folder: push_checkpoint(folder, "me/x", dry_run=True)]
)
def test_records_that_are_not_ours_are_refused_in_one_line(v1, tmp_path, text, message, read):
    if isinstance(text, dict):
        text = changed_record(v1, *next(iter(text.items())))
    folder = shutil.copytree(v1, tmp_path / "v1")
    (folder / "conversion.json").write_text(text)
    with pytest.raises(ConversionError, match=message) as caught:
        read(folder)
    assert str(caught.value).startswith(str(folder / "conversion.json")) and "\n" not in str(caught.value)


CHECK = {"name": "converted", "outcome": "measured", "detail": "", "values": {"loss_nats": 1.5}}
REPORT = {"promise": "parity", "passed": True, "checks": [CHECK]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checks": 5}, "checks is 5"),
        ({"checks": [5]}, r"checks\[0\] is 5"),
        ({"checks": [CHECK | {"values": {"loss_nats": "low"}}]}, r"checks\[0\].values.loss_nats is 'low'"),
        ({"checks": [CHECK | {"name": 1}]}, r"checks\[0\].name is 1"),
        ({"passed": 1}, "passed is 1"),
    ],
)
def test_reports_that_verify_did_not_print_are_refused_in_one_line(tmp_path, change, message):
    path = tmp_path / "report.json"
    path.write_text(json.dumps(REPORT))
    assert read_report(path) == REPORT
    path.write_text(json.dumps(REPORT | change))
    with pytest.raises(ConversionError, match=message) as caught:
        read_report(path)
    assert str(caught.value).startswith(str(path)) and "make it again" in str(caught.value)


def test_kl_and_agreement_are_what_they_are_called():
    """Two tokens, worked by hand: KL((3/4, 1/4) || (1/2, 1/2)) = ln 2 - H(1/4)."""
    from conversion.evaluation.behavior import Behavior, generation_agreement
    from conversion.evaluation.metrics import text_metrics

    original = Behavior([torch.tensor([[0.75, 0.25], [0.75, 0.25]]).log()], [[1, 2, 3, 4]])
    other = Behavior([torch.tensor([[0.5, 0.5 + 1e-6], [0.5 + 1e-6, 0.5]]).log()], [[1, 2, 9, 4]])
    windows = [torch.tensor([[0, 1]])]
    found = text_metrics(other.logits, windows, original.logits)
    assert found.kl_nats == pytest.approx(0.130812, abs=1e-5)
    assert found.greedy_agreement == 0.5
    assert found.source_loss_nats == pytest.approx(1.386294, abs=1e-6)
    assert generation_agreement(original, other) == 0.5
    assert text_metrics(original.logits, windows).to_dict() == {"loss_nats": pytest.approx(1.386294, abs=1e-6)}
