"""`convert --share` and `--max-kl`: costs are the models', the cheapest heads are taken, stops lose nothing."""

import json

import pytest
import torch
from planted_pairs import kl_nats
from random_llamas import random_llama, saved, token_ids
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from conversion import ConversionError, convert_checkpoint
from conversion.calibration.head_choice import _largest, num_chosen
from conversion.calibration.head_trials import HeadTrials, value_groups
from conversion.checkpoint.reader import CheckpointReader
from conversion.mapping.heads import HeadPairing
from modeling_diff import DiffLlamaForCausalLM


ROW_TOKENS = 128
NUM_ROWS = 8
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 64, "head_dim": 8}  # two units per layer
QUIET_LAYER = 1
SMALLEST_OUTPUT = 0.02
WITHOUT_TEXT = {"calibration": None, "calibration_tokens": None, "stages": None, "uncalibrated": True}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Three layers, of which the attention of one says little."""
    model = random_llama(num_hidden_layers=3, **HEADS)
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


def trials_of(llama, folder, **options):
    tokens = token_ids(length=ROW_TOKENS, batch=NUM_ROWS, seed=3)
    config = LlamaForCausalLM.from_pretrained(llama).config
    return HeadTrials(CheckpointReader(llama), config, tokens, work_folder=folder, **options)


def fitted_model(llama, trials, heads, folder):
    """A whole model that transformers loads, converted by the public API, with the attention that was kept for it."""
    pairings = dict(enumerate(trials.layer_pairings))
    options = {"heads": heads, "pairings": pairings, "uncalibrated": True, "measure": False, "overwrite": True}
    convert_checkpoint(llama, folder, "v1", **options)
    model = DiffLlamaForCausalLM.from_pretrained(folder)
    kept = {}
    for layer, chosen in enumerate(heads):
        for name in ("pairing", f"heads-{sum(1 << head for head in chosen):x}") if chosen else ():
            path = trials._store.folder / f"layer-{layer:05}.{name}.safetensors"
            with safe_open(path, framework="pt") as file:
                prefix = f"model.layers.{layer}.self_attn."
                kept |= {prefix + key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                lambda_init = json.loads(file.metadata()["calibration"])["lambda_init"]
        if chosen:
            model.model.layers[layer].self_attn.diff_lambda.lambda_init = lambda_init
    copy = kl_nats(LlamaForCausalLM.from_pretrained(llama), model, judging_tokens(trials))
    assert not model.load_state_dict(kept, strict=False).unexpected_keys
    return model, copy


def judging_tokens(trials):
    return token_ids(length=ROW_TOKENS, batch=NUM_ROWS, seed=3)[: trials.tokens // ROW_TOKENS]


def test_cost_of_heads_is_the_kl_of_the_model_with_them_alone_converted(llama, tmp_path):
    """The expected KL is that of whole models that transformers loads, in float64 after their float32 logits."""
    trials = trials_of(llama, tmp_path / "work")
    assert trials.units == [(0, 1), (2, 3)]
    source = LlamaForCausalLM.from_pretrained(llama)
    for layer in range(3):
        for unit, heads in enumerate(trials.units):
            alone = [list(heads) if index == layer else [] for index in range(3)]
            model, copied = fitted_model(llama, trials, alone, tmp_path / "v1")
            # float32: logits of two ways through the same layers differ by 1e-5
            expected = kl_nats(source, model, judging_tokens(trials))
            assert trials.costs[layer][unit] == pytest.approx(expected, abs=1e-4)
            assert trials.costs[layer][unit] < copied, "it was fitted, on what this layer reads"


def test_heads_of_several_layers_are_judged_together(llama, tmp_path):
    trials = trials_of(llama, tmp_path / "work")
    heads = ((0, 1, 2, 3), (2, 3), ())
    found = trials.together(heads)
    model, copied = fitted_model(llama, trials, heads, tmp_path / "v1")
    expected = kl_nats(LlamaForCausalLM.from_pretrained(llama), model, judging_tokens(trials))
    assert found == pytest.approx(expected, abs=1e-4)  # float32
    assert found < copied


def test_units_of_other_sizes_have_costs_of_their_own_and_share_the_fits(llama, tmp_path):
    trials = trials_of(llama, tmp_path)
    seen = []
    layers = trials_of(llama, tmp_path, units=[range(4)], resume=True, progress=lambda *at: seen.append(at))
    assert layers.cheapest_first[0] == (QUIET_LAYER, 0)
    assert [len(costs) for costs in layers.costs] == [1, 1, 1] != [len(costs) for costs in trials.costs]
    for layer in range(3):
        alone = [range(4) if index == layer else [] for index in range(3)]
        assert layers.costs[layer][0] == pytest.approx(trials.together(alone), rel=1e-5)  # the same weights
    assert [at for at in seen if at[3] == 0] == [], "pairing and lambda are those of the first trials"
    fits = [(layer, 3, "choice", 1.0) for layer in range(3)]
    measured = [(3, 3, "choice", count / 3) for count in (1, 2, 3)]
    assert seen == fits + measured


@pytest.mark.parametrize(
    ("heads", "kv_heads", "expected"),
    [(8, 4, [(0, 1), (2, 3)]), (8, 8, [(0,), (1,), (2,), (3,)]), (9, 3, [(0, 1, 2), (3, 4, 5)]), (4, 2, [(0, 1)])],
)
def test_units_are_the_heads_that_share_values(heads, kv_heads, expected):
    """The expected groups follow from repeat_kv: a key-value head of V1 serves neighbors; odd counts are padded."""
    config = LlamaConfig(num_attention_heads=heads, num_key_value_heads=kv_heads, hidden_size=16 * heads)
    assert value_groups(config) == expected


@pytest.mark.parametrize(("share", "units", "count"), [(0.5, 30, 15), (0.01, 30, 1), (1.0, 30, 30), (0.5, 5, 3)])
def test_share_is_that_of_the_heads_and_one_unit_at_least(share, units, count):
    assert num_chosen(share, units) == count


@pytest.mark.parametrize("budget", [0.01, 0.05, 0.3, 0.31, 2.0])
def test_budget_is_used_up_by_as_many_layers_as_fit(budget):
    costs = [0.01, 0.02, 0.08, 0.2, 0.5, 1.1]
    together = [sum(costs[:count]) for count in range(len(costs) + 1)]
    expected = max(count for count, cost in enumerate(together) if cost <= budget)
    assert _largest(together.__getitem__, 6, budget) == (expected, together[expected])


def test_share_converts_the_cheapest_heads(llama, text, tmp_path):
    report = convert(llama, tmp_path / "half", text, share=0.5)
    choice = report.record["head_choice"]
    flat = [cost for costs in choice["costs"] for cost in costs]
    dearest = sorted(flat)[2]
    cheapest = [
        [head for cost, unit in zip(costs, choice["units"], strict=True) for head in unit if cost <= dearest]
        for costs in choice["costs"]
    ]
    assert choice["heads"] == cheapest and choice["share"] == 0.5
    assert cheapest[QUIET_LAYER] == [0, 1, 2, 3]
    assert sorted(map(len, cheapest)) == [0, 2, 4]
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "half").config
    assert config.differential_heads == cheapest and any(map(config.is_mixed, range(3)))
    assert any(note.startswith("differential heads: 6 of 12: all of layer 1; 2 of 4 in ") for note in report.notes)
    # The indices mean heads of the pairing that was chosen with them, which the calibration has to keep.
    mixed = str(next(layer for layer in range(3) if len(cheapest[layer]) == 2))
    assert report.record["options"]["pairings"] == {mixed: report.record["calibration"]["pairings"][int(mixed)]}
    pairings = dict(enumerate(HeadPairing(**pair) for pair in report.record["calibration"]["pairings"]))
    del pairings[QUIET_LAYER]  # a layer that is converted whole is paired by its calibration
    convert(llama, tmp_path / "named", text, heads=cheapest, pairings=pairings)
    found, expected = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("half", "named"))
    assert found == expected


def test_all_heads_are_the_whole_conversion(llama, text, tmp_path):
    convert(llama, tmp_path / "share", text, share=1.0)
    convert(llama, tmp_path / "whole", text)
    found, expected = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("share", "whole"))
    assert found == expected
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "share").config.differential_heads is None


def test_max_kl_takes_what_the_budget_allows(llama, text, tmp_path):
    measured = convert(llama, tmp_path / "all", text, share=1.0).record["head_choice"]
    much = convert(llama, tmp_path / "much", text, max_kl=1.01 * measured["kl"]).record["head_choice"]
    assert much["heads"] == [[0, 1, 2, 3]] * 3
    costs = [cost for costs in measured["costs"] for cost in costs]
    little = convert(llama, tmp_path / "little", text, max_kl=1.01 * min(costs)).record["head_choice"]
    assert sum(map(len, little["heads"])) == 2
    assert little["kl"] <= little["max_kl"]
    with pytest.raises(
        ConversionError, match=r"max_kl is 1e-09, and the heads that cost least, (0-1|2-3) of layer 1, alone"
    ):
        convert(llama, tmp_path / "none", text, max_kl=1e-9)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("stop_at", [3, 8])
def test_a_stopped_choice_is_continued(llama, text, tmp_path, stop_at):
    """`stop_at` counts refits: six for the choice, one of a whole layer, one per chosen layer for the calibration."""
    finished = []

    def interrupt(layer, num_layers, stage, done):
        if stage in ("choice", "refit") and done == 1 and layer < num_layers:
            finished.append(layer)
            if len(finished) == stop_at:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(llama, tmp_path / "half", text, share=0.5, calibration_progress=interrupt)
    seen = []
    convert(llama, tmp_path / "half", text, share=0.5, calibration_progress=lambda *at: seen.append(at))
    again = [layer for layer, _, stage, done in seen if stage in ("choice", "refit") and done == 1 and layer < 3]
    assert len(again) <= 9 - stop_at + 1, "what was fitted and saved is not fitted again"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half", text.name]
    convert(llama, tmp_path / "whole", text, share=0.5)
    found, expected = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("half", "whole"))
    assert found == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0.5, "layers": [1]}, "layers and share both say which heads become differential"),
        ({"share": 0.5, "max_kl": 0.1}, "share and max_kl both say"),
        ({"share": 0.0}, "share is 0.0, expected a number above 0 and at most 1"),
        ({"share": 1.5}, "share is 1.5, expected"),
        ({"share": "much"}, "share is 'much', expected"),
        ({"max_kl": -1.0}, "max_kl is -1.0, expected a number above 0, in nats per token"),
        ({"max_kl": float("nan")}, "max_kl is nan, expected"),
        ({"share": 0.5} | WITHOUT_TEXT, "share needs text to calibrate on"),
        ({"max_kl": 0.1, "stages": ["copy"]}, "max_kl chooses heads by .* after a refit, which stages copy leaves"),
        ({"share": 0.5, "stages": ["pairing", "values"]}, "share chooses .* leaves out; add refit, or name the heads"),
    ],
)
def test_impossible_amounts_are_refused(llama, text, tmp_path, options, message):
    with pytest.raises(ConversionError, match=message):
        convert(llama, tmp_path / "v1", text, **options)


def test_dry_run_says_how_many_heads_and_promises_what_a_calibration_does(llama, text, tmp_path):
    report = convert(llama, tmp_path / "half", text, share=0.5, dry_run=True)
    assert "6 of 12 heads would become differential, those that cost least" in report.notes
    written = convert(llama, tmp_path / "half", text, share=0.5)
    assert report.record["promise"] == written.record["promise"]


def test_share_without_a_text_is_told_of_the_text_alone(llama, tmp_path):
    with pytest.raises(ConversionError, match="share needs text to calibrate on") as refused:
        convert_checkpoint(llama, tmp_path / "half", "v1", share=0.5)
    assert "uncalibrated" not in str(refused.value)


def test_v2_has_no_share(llama, tmp_path):
    with pytest.raises(ConversionError, match="share belongs to variant v1"):
        convert_checkpoint(llama, tmp_path / "v2", "v2", share=0.5)
