"""`convert --share` and `--max-kl`: costs are the models', the cheapest layers are taken, stops lose nothing."""

import json

import pytest
import torch
from random_llamas import random_llama, saved, token_ids
from safetensors import safe_open
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from conversion import ConversionError, convert_checkpoint
from conversion.calibration.layer_choice import LayerTrials, _largest, num_chosen
from conversion.checkpoint.reader import CheckpointReader
from modeling_diff import DiffLlamaForCausalLM


ROW_TOKENS = 128
NUM_ROWS = 8
QUIET_LAYER = 2  # of the model below
SMALLEST_OUTPUT = 0.02
WITHOUT_TEXT = {"calibration": None, "calibration_tokens": None, "stages": None, "uncalibrated": True}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Four layers, of which the attention of one says little."""
    model = random_llama(num_hidden_layers=4)
    with torch.no_grad():
        model.model.layers[QUIET_LAYER].self_attn.o_proj.weight.mul_(SMALLEST_OUTPUT)
    return saved(model, tmp_path_factory.mktemp("llama"))


@pytest.fixture
def text(tmp_path):
    rows = token_ids(length=ROW_TOKENS, batch=NUM_ROWS, seed=3)
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"input_ids": row.tolist()}) + "\n" for row in rows))
    return path


def convert(llama, output, text, **options):
    options = {
        "calibration": text,
        "calibration_tokens": ROW_TOKENS * NUM_ROWS,
        "stages": ("pairing", "refit"),
    } | options
    return convert_checkpoint(llama, output, "v1", **options)


@torch.no_grad()
def kl_nats(model, other, ids):
    log_p, log_q = (m(ids).logits.double().log_softmax(-1).flatten(0, 1) for m in (model, other))
    return kl_div(log_q, log_p, reduction="batchmean", log_target=True).item()


def test_cost_of_a_layer_is_the_kl_of_the_model_with_it_alone_converted(llama, tmp_path):
    """The expected KL is that of whole models that transformers loads, in float64 after their float32 logits."""
    tokens = token_ids(length=ROW_TOKENS, batch=NUM_ROWS, seed=3)
    work = tmp_path / "work"
    source = LlamaForCausalLM.from_pretrained(llama)
    trials = LayerTrials(CheckpointReader(llama), source.config, tokens, work_folder=work)
    judging = tokens[: trials.tokens // ROW_TOKENS]
    for layer in range(4):
        folder = tmp_path / str(layer)
        convert_checkpoint(llama, folder, "v1", layers=[layer], uncalibrated=True, measure=False)
        model = DiffLlamaForCausalLM.from_pretrained(folder)
        copied = kl_nats(source, model, judging)
        attention = model.model.layers[layer].self_attn
        with safe_open(work / f"layer-{layer:05}.safetensors", framework="pt") as file:
            attention.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
            attention.diff_lambda.lambda_init = json.loads(file.metadata()["calibration"])["lambda_init"]
        # float32: logits of two ways through the same layers differ by 1e-5
        assert trials.costs[layer] == pytest.approx(kl_nats(source, model, judging), abs=1e-4)
        assert trials.costs[layer] < copied, "it was fitted, on what this layer reads"
    assert min(trials.costs) == trials.costs[QUIET_LAYER]
    assert trials.costs[QUIET_LAYER] < 0.1 * max(trials.costs)


@pytest.mark.parametrize(("share", "layers", "count"), [(0.5, 30, 15), (0.01, 30, 1), (1.0, 30, 30), (0.5, 5, 3)])
def test_share_is_that_of_the_layers_and_one_at_least(share, layers, count):
    assert num_chosen(share, layers) == count


@pytest.mark.parametrize("budget", [0.01, 0.05, 0.3, 0.31, 2.0])
def test_budget_is_used_up_by_as_many_layers_as_fit(budget):
    costs = [0.01, 0.02, 0.08, 0.2, 0.5, 1.1]
    together = [sum(costs[:count]) for count in range(len(costs) + 1)]
    expected = max(count for count, cost in enumerate(together) if cost <= budget)
    assert _largest(together.__getitem__, 6, budget) == (expected, together[expected])


def test_share_converts_the_cheapest_layers_as_layers_does(llama, text, tmp_path):
    report = convert(llama, tmp_path / "half", text, share=0.5)
    choice = report.record["layer_choice"]
    cheapest = sorted(sorted(range(4), key=choice["costs"].__getitem__)[:2])
    assert QUIET_LAYER in cheapest and choice["layers"] == cheapest and choice["share"] == 0.5
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").config.differential_layers == cheapest
    assert any(note.startswith("differential layers: ") for note in report.notes)
    convert(llama, tmp_path / "named", text, layers=cheapest)
    found, expected = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("half", "named"))
    assert found == expected


def test_max_kl_takes_what_the_budget_allows(llama, text, tmp_path):
    measured = convert(llama, tmp_path / "all", text, share=1.0).record["layer_choice"]
    much = convert(llama, tmp_path / "much", text, max_kl=1.01 * measured["kl"]).record["layer_choice"]
    assert much["layers"] == [0, 1, 2, 3]
    little = convert(llama, tmp_path / "little", text, max_kl=1.01 * min(measured["costs"])).record["layer_choice"]
    assert little["layers"] == [QUIET_LAYER]
    assert little["kl"] <= little["max_kl"]
    with pytest.raises(ConversionError, match=r"max_kl is 1e-09, and layer 2, which costs least, alone costs"):
        convert(llama, tmp_path / "none", text, max_kl=1e-9)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("stop_at", [2, 5])
def test_a_stopped_choice_is_continued(llama, text, tmp_path, stop_at):
    """`stop_at` counts finished fits of a layer: four for the choice, two for the calibration."""
    finished = []

    def interrupt(layer, num_layers, stage, done):
        if stage == "refit" and done == 1:
            finished.append(layer)
            if len(finished) == stop_at:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(llama, tmp_path / "half", text, share=0.5, calibration_progress=interrupt)
    again = []
    convert(
        llama,
        tmp_path / "half",
        text,
        share=0.5,
        calibration_progress=lambda *at: again.append(at[0]) if at[2:] == ("refit", 1) else None,
    )
    assert len(again) <= 6 - stop_at + 1, "a layer whose fit was saved is not fitted again"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half", text.name]
    convert(llama, tmp_path / "whole", text, share=0.5)
    found, expected = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("half", "whole"))
    assert found == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0.5, "layers": [1]}, "layers and share both say which layers become differential"),
        ({"share": 0.5, "max_kl": 0.1}, "share and max_kl both say"),
        ({"share": 0.0}, "share is 0.0, expected a number above 0 and at most 1"),
        ({"share": 1.5}, "share is 1.5, expected"),
        ({"share": "much"}, "share is 'much', expected"),
        ({"max_kl": -1.0}, "max_kl is -1.0, expected a number above 0, in nats per token"),
        ({"max_kl": float("nan")}, "max_kl is nan, expected"),
        ({"share": 0.5} | WITHOUT_TEXT, "share needs text to calibrate on"),
    ],
)
def test_impossible_amounts_are_refused(llama, text, tmp_path, options, message):
    with pytest.raises(ConversionError, match=message):
        convert(llama, tmp_path / "v1", text, **options)


def test_dry_run_says_how_many_layers_and_promises_what_a_calibration_does(llama, text, tmp_path):
    report = convert(llama, tmp_path / "half", text, share=0.5, dry_run=True)
    assert "2 of 4 layers would become differential, those that cost least" in report.notes
    written = convert(llama, tmp_path / "half", text, share=0.5)
    assert report.record["promise"] == written.record["promise"]


def test_share_without_a_text_is_told_of_the_text_alone(llama, tmp_path):
    with pytest.raises(ConversionError, match="share needs text to calibrate on") as refused:
        convert_checkpoint(llama, tmp_path / "half", "v1", share=0.5)
    assert "uncalibrated" not in str(refused.value)


def test_v2_has_no_share(llama, tmp_path):
    with pytest.raises(ConversionError, match="share belongs to variant v1"):
        convert_checkpoint(llama, tmp_path / "v2", "v2", share=0.5)
