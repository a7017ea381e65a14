"""Layers in which some heads are differential: the others stay LLaMA's, and the calibration fits them as they are."""

import json

import pytest
import torch
from healing_toys import heal, write_training_rows
from planted_pairs import (
    CONTEXT,
    HEADS,
    MAP_DIM,
    copied_first_layer,
    first_layer,
    kl_nats,
    planted_llama,
    random_tokens,
)
from random_llamas import random_llama, saved, token_ids, write_rows
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from conversion import ConversionError, convert_checkpoint, verify_checkpoint
from conversion.calibration.calibrate import Stage, calibrate
from conversion.calibration.candidates import HeadOutputs, left_over
from conversion.calibration.closed_form import refit_outputs
from conversion.describe import describe_checkpoint
from conversion.mapping.heads import HeadPairing, heads_in_words
from conversion.push import plan_upload


# LLaMA's heads and key-value heads, and heads of V1 of which each layer keeps the others.
COUNTS = {
    "gqa": (8, 4, [[0, 1], [2, 3]]),
    "mha": (8, 8, [[1, 2], [0, 1, 2, 3]]),
    "padded": (9, 3, [[0, 1, 2], []]),
    "one of a group": (8, 4, [[1], [0, 2, 3]]),
}


@pytest.fixture(params=COUNTS)
def partial_v1(request, tmp_path):
    """A LLaMA, and the heads of its V1 that are differential, per layer."""
    num_heads, num_kv_heads, heads = COUNTS[request.param]
    sizes = {"hidden_size": num_heads * 8, "head_dim": 8}
    llama = random_llama(num_attention_heads=num_heads, num_key_value_heads=num_kv_heads, **sizes)
    return llama, heads


def uncalibrated(llama, output, heads, **options):
    options = {"uncalibrated": True, "pad_heads": True, "measure": False} | options
    return convert_checkpoint(llama, output, "v1", heads=heads, **options)


def pairs_of(llama):
    counts = [count + count % 2 for count in (llama.config.num_key_value_heads,)]
    group = llama.config.num_attention_heads // llama.config.num_key_value_heads
    return HeadPairing.adjacent(counts[0] * group, counts[0])


def test_heads_that_are_not_differential_are_the_llamas(partial_v1, tmp_path):
    """Where the differential heads write nothing, in both, all that is left is LLaMA's own."""
    llama, heads = partial_v1
    pairing = pairs_of(llama)
    with torch.no_grad():
        for layer, chosen in zip(llama.model.layers, heads, strict=True):
            columns = layer.self_attn.o_proj.weight.unflatten(1, (-1, 8))
            for head in chosen:
                for part in pairing.query_heads[2 * head : 2 * head + 2]:
                    if part < llama.config.num_attention_heads:
                        columns[:, part] = 0
    uncalibrated(saved(llama, tmp_path / "llama"), tmp_path / "v1", heads)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "v1")
    ids = token_ids()
    with torch.no_grad():
        # float32, the same sums in another order
        torch.testing.assert_close(model(ids).logits, llama(ids).logits, rtol=1e-4, atol=1e-4)
        changed = uncalibrated_logits(tmp_path, [[*range(pairing.num_heads)]] * 2, ids)
    assert (changed - llama(ids).logits).abs().max() > 0.1, "the heads that stay matter"


def uncalibrated_logits(folder, heads, ids):
    uncalibrated(folder / "llama", folder / "all", heads)
    return AutoModelForCausalLM.from_pretrained(folder / "all")(ids).logits


def test_differential_heads_are_those_of_the_whole_conversion(partial_v1, tmp_path):
    """The weights are the same whatever is differential; only the config says which heads are."""
    llama, heads = partial_v1
    source = saved(llama, tmp_path / "llama")
    report = uncalibrated(source, tmp_path / "v1", heads)
    uncalibrated(source, tmp_path / "all", None)
    found, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("v1", "all"))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in found.items())
    config = json.loads((tmp_path / "v1/config.json").read_text())
    assert config["differential_heads"] == heads and config.get("differential_layers") is None
    assert report.record["options"]["heads"] == heads
    assert verify_checkpoint(tmp_path / "v1", against=source).passed


@pytest.fixture
def problem(tmp_path):
    """The first layer of a planted LLaMA, of which the heads of the second KV head become differential."""
    return first_layer(tmp_path, heads=(2, 3))


@pytest.fixture
def start(problem):
    return copied_first_layer(problem)


def test_head_outputs_judge_as_the_whole_mixed_layer_does(problem, start):
    """The residual is that of a whole layer that modeling_diff computes; relative tolerances of float32 sums."""
    outputs = HeadOutputs.gather(problem, start)
    assert left_over(problem, start, outputs, refit=False) == pytest.approx(problem.residual(start), rel=1e-5)
    refit = problem.residual(refit_outputs(problem, start))
    assert left_over(problem, start, outputs, refit=True) == pytest.approx(refit, rel=1e-4)
    assert refit < 0.9 * problem.residual(start)


def test_differential_heads_of_a_mixed_layer_keep_their_mean_square(problem, start):
    """The norm is scaled for the heads that it is applied to: theirs is the mean square of what they give."""
    whole = start.replaced({}, heads=None)
    (chunk,) = problem.attend(whole, problem.sample_rows, "sub_norm")
    expected = chunk.inputs["sub_norm"][:, 2 * 2 * MAP_DIM :].square().mean()
    assert HeadOutputs.gather(problem, start).mean_square == pytest.approx(expected.item(), rel=1e-5)


def test_outputs_of_scaled_values_are_scaled_in_differential_heads_alone(problem, start):
    scale = torch.ones(2, 2 * MAP_DIM)
    scale[:, -1] = 3
    values = start.tensors["v_proj.weight"].unflatten(0, (2, -1)).clone()  # (K, D, C)
    values[1, -1] *= 3
    scaled = start.replaced({"v_proj.weight": values.flatten(0, 1)})
    outputs = HeadOutputs.gather(problem, start).scaled(scale)
    assert left_over(problem, scaled, outputs, refit=False) == pytest.approx(problem.residual(scaled), rel=1e-5)


@pytest.mark.parametrize(
    ("heads", "changed"), [((2, 3), (1,)), ((0, 1, 2), (0,)), ((1, 2), ()), ((0, 1, 2, 3), (0, 1))]
)
def test_values_change_their_basis_where_differential_heads_alone_read_them(tmp_path, heads, changed):
    """Four heads of V1 on two key-value heads: values that a head of LLaMA reads as well are LLaMA's, to the bit."""
    llama, _ = planted_llama("plain", 4, num_layers=1)
    llama.save_pretrained(tmp_path)
    stages = (Stage.COPY, Stage.REFIT, Stage.VALUES)
    result = calibrate(tmp_path, llama.config, random_tokens(192), stages=stages, heads={0: heads})
    found = result["model.layers.0.self_attn.v_proj.weight"].unflatten(0, (2, -1))
    source = llama.model.layers[0].self_attn.v_proj.weight.unflatten(0, (2, -1))
    assert [head for head in range(2) if not torch.equal(found[head], source[head])] == list(changed)
    stages = result.records[0]["stages"]
    if changed:
        assert stages["values"]["residual"] < stages["refit"]["residual"], "it was kept, so it is what was written"


def test_a_calibrated_mixed_checkpoint_is_nearer_than_its_copy_and_goes_all_the_way(tmp_path):
    """All stages; the file and the config that are written are read back by transformers."""
    llama, _ = planted_llama("plain", 4)
    source = saved(llama, tmp_path / "llama")
    text = write_rows(tmp_path / "text.jsonl", 64, CONTEXT)
    heads = [[2, 3], [0, 1, 2, 3]]
    options = {"calibration": text, "calibration_tokens": 64 * CONTEXT, "uncalibrated": False}
    uncalibrated(source, tmp_path / "v1", heads, **options)
    uncalibrated(source, tmp_path / "copy", heads)
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("v1", "copy")]
    kl = [kl_nats(llama, model, random_tokens(8, seed=9)) for model in models]
    assert kl[0] < 0.5 * kl[1]
    described = describe_checkpoint(tmp_path / "v1")
    assert described["differential_heads"] == "6 of 8: all of layer 1; 2 of 4 in layer 0"
    assert "6 of 8: all of layer 1; 2 of 4 in layer 0" in (tmp_path / "v1/README.md").read_text()
    assert verify_checkpoint(tmp_path / "v1", against=source).passed


def test_a_mixed_checkpoint_is_healed_and_uploaded(tmp_path):
    saved(random_llama(), tmp_path / "llama")
    uncalibrated(tmp_path / "llama", tmp_path / "v1", [[0], [0, 1]])
    write_training_rows(tmp_path / "data.jsonl")
    report = heal(tmp_path, tmp_path / "healed", max_steps=20, learning_rate=2e-2)
    assert report.table[-1]["kl"] < 0.95 * report.table[0]["kl"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "healed")
    assert model.config.differential_heads == [[0], [0, 1]]
    assert verify_checkpoint(tmp_path / "healed", against=tmp_path / "llama").passed
    card = plan_upload(tmp_path / "healed", "me/mixed").contents["README.md"].decode()
    assert "Differential heads: 3 of 4: all of layer 1; 1 of 2 in layer 0." in card


def test_given_pairings_are_calibrated(tmp_path):
    llama, _ = planted_llama("plain", 4, num_layers=1)
    source = saved(llama, tmp_path / "llama")
    text = write_rows(tmp_path / "text.jsonl", 64, CONTEXT)
    pairing = HeadPairing((6, 2, 7, 3, 0, 4, 1, 5), (3, 1, 0, 2))
    options = {"calibration": text, "calibration_tokens": 64 * CONTEXT, "stages": ["pairing", "refit"]}
    report = convert_checkpoint(source, tmp_path / "v1", "v1", pairings={0: pairing}, **options)
    (found,) = report.record["calibration"]["pairings"]
    assert found == {"query_heads": pairing.query_heads, "kv_heads": pairing.kv_heads}
    q_proj = load_file(tmp_path / "v1/model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    expected = llama.model.layers[0].self_attn.q_proj.weight.unflatten(0, (HEADS, -1))[list(pairing.query_heads)]
    assert torch.equal(q_proj, expected.flatten(0, 1))


@pytest.mark.parametrize(
    ("heads", "options", "message"),
    [
        ([[0]], {}, r"heads is \[\[0\]\], and the model has 2 layers"),
        ([[], []], {}, r"heads is \[\[\], \[\]\], and"),
        ([[0], [4]], {}, "heads names head 4 of layer 1: give some of 0-3"),
        ([[0], ["x"]], {}, "heads is .*, expected a list of heads per layer"),
        ([[0], [1]], {"layers": [0]}, "layers and heads both say which heads become differential"),
        ([[0], [1]], {"variant": "v2", "uncalibrated": False}, "heads belongs to variant v1"),
    ],
)
def test_impossible_heads_are_refused(tmp_path, heads, options, message):
    source = saved(random_llama(num_attention_heads=8, num_key_value_heads=4), tmp_path / "llama")
    variant = options.pop("variant", "v1")
    with pytest.raises(ConversionError, match=message):
        convert_checkpoint(source, tmp_path / "out", variant, heads=heads, **({"uncalibrated": True} | options))


@pytest.mark.parametrize(
    ("heads", "words"),
    [
        ([[0, 1], [0, 1]], "all 4"),
        ([[], []], "none of 4"),
        ([[], [0, 1], [0, 1], [0, 1], [], [0, 1]], "8 of 12: all of layers 1-3, 5"),
        ([[1], [0, 1], [], [0]], "4 of 8: all of layer 1; 1 of 2 in layers 0, 3"),
    ],
)
def test_heads_are_said_in_words(heads, words):
    assert heads_in_words(heads, 2) == words
