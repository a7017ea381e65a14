"""Calibrated conversions of planted LLaMAs: what is found, that every stage helps, resuming, refusals."""

import math
import os
import shutil

import pytest
import torch
from planted_pairs import CONTEXT, HEADS, MAP_DIM, kl_nats, planted_llama, random_tokens
from transformers import LlamaConfig

from conversion.calibration.calibrate import DEFAULT_STAGES, Stage, calibrate
from conversion.calibration.estimate import duration_text, estimate_calibration
from conversion.calibration.gradient_fit import LocalFit
from conversion.calibration.model import calibrated_model
from conversion.calibration.streams import LlamaLayers, Streams
from conversion.checkpoint.reader import CheckpointReader
from conversion.errors import ConversionError, FilesError


QUICK = LocalFit(steps=30, batch_tokens=8 * CONTEXT)
CLOSED_FORM = (Stage.COPY, Stage.PAIRING, Stage.REFIT)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """saved(kind, num_kv_heads) -> planted LLaMA, its folder, its pairs; each built once."""
    made = {}

    def make(kind, num_kv_heads):
        if (kind, num_kv_heads) not in made:
            model, pairs = planted_llama(kind, num_kv_heads)
            folder = tmp_path_factory.mktemp(f"{kind}-{num_kv_heads}")
            model.save_pretrained(folder)
            made[kind, num_kv_heads] = model, folder, pairs
        return made[kind, num_kv_heads]

    return make


@pytest.mark.parametrize("num_kv_heads", [8, 4])
@pytest.mark.parametrize("kind", ["twins", "idle"])
def test_planted_pairs_are_found_and_converted(saved, kind, num_kv_heads):
    llama, folder, planted = saved(kind, num_kv_heads)
    held_out = random_tokens(8, seed=9)
    result = calibrate(folder, llama.config, random_tokens(32), stages=CLOSED_FORM, norm="neutral")
    for pairing, pairs in zip(result.pairings, planted, strict=True):
        heads = pairing.kv_heads
        found = {frozenset(heads[i : i + 2]) for i in range(0, len(heads), 2)}
        if kind == "twins":
            assert found == pairs
        else:  # any idle KV head will do for a strong one
            strong = {max(pair, key=lambda head: output_norm(llama, planted.index(pairs), head)) for pair in pairs}
            assert all(len(pair & strong) == 1 for pair in found)
    copy = calibrate(folder, llama.config, random_tokens(32), stages=(Stage.COPY,), norm="neutral")
    assert kl_nats(llama, calibrated_model(llama, copy), held_out) > 0.1
    assert kl_nats(llama, calibrated_model(llama, result), held_out) < 0.01


def output_norm(llama, layer, kv_head):
    weight = llama.model.layers[layer].self_attn.o_proj.weight
    return weight.unflatten(1, (llama.config.num_key_value_heads, -1))[:, kv_head].norm().item()


def test_every_stage_comes_nearer_under_the_strict_norm(saved):
    llama, folder, _ = saved("plain", 4)
    tokens = random_tokens(192)
    held_out = random_tokens(16, seed=9)
    fit = LocalFit(steps=60, batch_tokens=8 * CONTEXT, learning_rate=0.1)
    result = calibrate(folder, llama.config, tokens, local=fit)
    for record in result.records:
        assert list(record["stages"]) == [stage.value for stage in DEFAULT_STAGES if stage is not Stage.COPY]
        residuals = [stage["residual"] for stage in record["stages"].values()]
        assert residuals == sorted(residuals, reverse=True) and residuals[-1] < 0.9 * residuals[0]
        assert record["lambda"] > fit.lambda_floor - 1e-6 > 0
    assert result.sub_norm_eps == (1e-5, 1e-5)
    # The fit moved lambda; its vectors are as unmoved as those of a start, so that healing moves it by little steps.
    assert result.lambda_init == pytest.approx([record["lambda"] for record in result.records], abs=1e-6)
    for layer in calibrated_model(llama, result).model.layers:
        vectors = layer.self_attn.diff_lambda
        assert torch.equal(vectors.lambda_q1, vectors.lambda_q2) and torch.equal(vectors.lambda_k1, vectors.lambda_k2)
    ladder = [(Stage.COPY,), (Stage.PAIRING,), CLOSED_FORM]
    models = [calibrated_model(llama, calibrate(folder, llama.config, tokens, stages=stages)) for stages in ladder]
    kl = [kl_nats(llama, model, held_out) for model in (*models, calibrated_model(llama, result))]
    assert kl == sorted(kl, reverse=True), kl
    assert kl[-1] < 0.98 * kl[-2] and kl[-2] < 0.8 * kl[0]


@pytest.mark.parametrize("projection", ["v_proj", "o_proj"])
def test_attention_that_writes_nothing_still_writes_nothing(tmp_path, projection):
    """Layers that LLaMA-Pro adds have an o_proj of zeros, and pruned heads a v_proj of zeros: the difference is 0."""
    llama, _ = planted_llama("plain", 4)
    getattr(llama.model.layers[1].self_attn, projection).weight.zero_()
    llama.save_pretrained(tmp_path)
    fit = LocalFit(steps=10, batch_tokens=8 * CONTEXT)
    result = calibrate(tmp_path, llama.config, random_tokens(32), layers=[1], local=fit)
    assert abs(kl_nats(llama, calibrated_model(llama, result), random_tokens(8, seed=9))) < 1e-6  # float32


def test_streams_are_those_of_the_whole_models(saved):
    llama, folder, _ = saved("idle", 4)
    tokens = random_tokens(16)
    layers = LlamaLayers(CheckpointReader(folder), llama.config, torch.device("cpu"))
    streams = Streams.start(layers.embed(tokens))
    result = calibrate(folder, llama.config, tokens, stages=CLOSED_FORM, lambda_init=0.1)
    model = calibrated_model(llama, result)
    with torch.no_grad():
        ours = model(input_ids=tokens, output_hidden_states=True).hidden_states
        theirs = llama(input_ids=tokens, output_hidden_states=True).hidden_states
    for index in range(2):
        torch.testing.assert_close(streams.original, theirs[index], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(streams.converted, ours[index], rtol=1e-4, atol=1e-4)
        streams.look_ahead(layers, layers.layer(index, layers.tensors(index)), index)
        streams.advance(layers, model.model.layers[index])


def test_start_cancels_exponentials_and_every_parameter_is_alive(saved):
    llama, folder, _ = saved("twins", 8)
    result = calibrate(folder, llama.config, random_tokens(32), stages=CLOSED_FORM, lambda_init="paper")
    model = calibrated_model(llama, result)
    for index, layer in enumerate(model.model.layers):
        assert layer.self_attn.diff_lambda().item() == pytest.approx(0.8 - 0.6 * math.exp(-0.3 * index), abs=1e-7)
    model(input_ids=random_tokens(2), labels=random_tokens(2)).loss.backward()
    attention = [(name, p) for name, p in model.named_parameters() if ".self_attn." in name]
    assert [name for name, p in attention if p.grad is None or not p.grad.abs().max() > 0] == []


def test_layers_left_out_are_not_replaced(saved):
    llama, folder, _ = saved("twins", 4)
    result = calibrate(folder, llama.config, random_tokens(32), stages=(Stage.COPY,), layers=[1])
    assert result.names and all(name.startswith("model.layers.1.self_attn.") for name in result.names)
    assert result.records[0] == {}


class Interrupted(Exception):
    pass


def test_interrupted_run_is_taken_up_and_ends_the_same(saved, tmp_path):
    llama, folder, _ = saved("twins", 4)
    arguments = (folder, llama.config, random_tokens(32))
    options = {"local": QUICK, "lambda_init": 0.05, "dtype": torch.bfloat16}
    whole = calibrate(*arguments, **options, work_folder=tmp_path / "whole")

    def interrupt(layer, num_layers, stage, done):
        if (layer, stage) == (1, Stage.LOCAL) and done > 0.5:
            raise Interrupted

    with pytest.raises(Interrupted):
        calibrate(*arguments, **options, work_folder=tmp_path / "torn", progress=interrupt)
    begun = []
    resumed = calibrate(
        *arguments, **options, work_folder=tmp_path / "torn", progress=lambda *seen: begun.append(seen[::2])
    )
    assert set(begun) == {(1, Stage.LOCAL)}
    assert resumed.names == whole.names and resumed.lambda_init == whole.lambda_init
    for name in whole.names:
        assert torch.equal(resumed[name], whole[name]), name
        narrow = "diff_lambda" not in name
        assert whole[name].dtype == (torch.bfloat16 if narrow else torch.float32)
    assert sorted(path.name for path in (tmp_path / "torn").iterdir()) == [
        "identity.json",
        "layer-00000.safetensors",
        "layer-00001.safetensors",
    ]


def test_torn_files_are_fitted_again_and_results_of_another_run_are_kept_from_loss(saved, tmp_path):
    llama, folder, _ = saved("twins", 4)
    (tmp_path / "notes.txt").write_text("mine")
    first = calibrate(folder, llama.config, random_tokens(32), stages=(Stage.COPY,), work_folder=tmp_path)
    before = {name: first[name] for name in first.names}
    (tmp_path / "layer-00001.safetensors").write_bytes(b"torn")
    again = calibrate(folder, llama.config, random_tokens(32), stages=(Stage.COPY,), work_folder=tmp_path)
    assert all(torch.equal(again[name], before[name]) for name in before)
    for resume in (None, True):
        with pytest.raises(FilesError, match=r"finished layers, .* with different options; .*--no-resume"):
            calibrate(folder, llama.config, random_tokens(32), stages=CLOSED_FORM, work_folder=tmp_path, resume=resume)
    assert all(torch.equal(again[name], before[name]) for name in before)
    other = calibrate(folder, llama.config, random_tokens(32), stages=CLOSED_FORM, work_folder=tmp_path, resume=False)
    assert any(not torch.equal(other[name], before[name]) for name in before)
    assert (tmp_path / "notes.txt").read_text() == "mine"


CHANGES = {
    "source": lambda folder, config: (folder, replace_config(config, rms_norm_eps=1e-3), random_tokens(32)),
    "text": lambda folder, config: (folder, config, random_tokens(32).flip(0)),
}


def replace_config(config, **changes):
    return type(config)(**(config.to_dict() | changes))


@pytest.mark.parametrize("part", [*CHANGES, "weights"])
def test_work_is_another_runs_by_the_content_of_weights_config_and_text(saved, tmp_path, part):
    llama, folder, _ = saved("twins", 4)
    calibrate(folder, llama.config, random_tokens(32), stages=(Stage.COPY,), work_folder=tmp_path / "work")
    moved = shutil.copytree(folder, tmp_path / "moved")
    calibrate(moved, llama.config, random_tokens(32), stages=(Stage.COPY,), work_folder=tmp_path / "work")
    arguments = (moved, llama.config, random_tokens(32)) if part == "weights" else CHANGES[part](moved, llama.config)
    if part == "weights":
        path = moved / "model.safetensors"
        before = path.stat()
        path.write_bytes(path.read_bytes()[:-2] + b"\0\0")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(FilesError, match=f"different {'source' if part == 'weights' else part}"):
        calibrate(*arguments, stages=(Stage.COPY,), work_folder=tmp_path / "work")


@pytest.mark.parametrize("damage", ["cut", "list", "missing"])
def test_a_damaged_state_is_named_with_the_way_out(saved, tmp_path, damage):
    llama, folder, _ = saved("twins", 4)
    arguments = (folder, llama.config, random_tokens(32))
    first = calibrate(*arguments, stages=(Stage.COPY,), work_folder=tmp_path)
    path = tmp_path / "identity.json"
    if damage == "missing":
        path.unlink()
    else:
        path.write_text({"cut": path.read_text()[:-9], "list": "[]"}[damage])
    fault = "missing" if damage == "missing" else "damaged"
    with pytest.raises(FilesError, match=rf"identity\.json: {fault}, .*discard its work \(--no-resume\)"):
        calibrate(*arguments, stages=(Stage.COPY,), work_folder=tmp_path)
    again = calibrate(*arguments, stages=(Stage.COPY,), work_folder=tmp_path, resume=False)
    assert all(torch.equal(again[name], first[name]) for name in first.names)


BAD_TOKENS = {
    "not rows": (lambda: random_tokens(8)[0], "expected token ids"),
    "floats": (lambda: random_tokens(8).float(), "expected token ids"),
    "unknown id": (lambda: random_tokens(8) + 90, "token .*, as vocab_size is 96"),
    "long rows": (lambda: random_tokens(8).view(4, -1), "max_position_embeddings is 48"),
    "one row": (lambda: random_tokens(1), "one sequence to judge by"),
    "too few": (lambda: random_tokens(2), rf"48 are fitted, but the refit needs {HEADS * MAP_DIM}"),
}


@pytest.mark.parametrize("name", BAD_TOKENS)
def test_bad_tokens_are_refused(saved, name):
    llama, folder, _ = saved("twins", 4)
    make, reason = BAD_TOKENS[name]
    with pytest.raises(ConversionError, match=reason):
        calibrate(folder, llama.config, make())


@pytest.mark.parametrize("value", ["schedule", -0.1, 1.0, [0.1, 2.0]])
def test_bad_lambda_is_refused(saved, value):
    llama, folder, _ = saved("twins", 4)
    with pytest.raises(ConversionError, match="lambda_init"):
        calibrate(folder, llama.config, random_tokens(8), stages=(Stage.COPY,), lambda_init=value)


CLOSED_FORM_STAGES = [(Stage.COPY,), (Stage.PAIRING,), CLOSED_FORM, (*CLOSED_FORM, Stage.VALUES)]


@pytest.mark.parametrize("stages", CLOSED_FORM_STAGES, ids=lambda stages: stages[-1])
def test_no_stage_takes_lambda_below_the_floor(saved, stages):
    """Of idle heads 0 loses least, which is what is chosen where it is allowed."""
    llama, folder, _ = saved("idle", 4)
    reached = {
        floor: calibrate(folder, llama.config, random_tokens(16), stages=stages, local=LocalFit(lambda_floor=floor))
        for floor in (0.0, 0.03)
    }
    assert min(reached[0.0].lambda_init) == 0
    assert min(reached[0.03].lambda_init) == 0.03
    assert all(record["lambda"] > 0.03 - 1e-6 for record in reached[0.03].records)


@pytest.mark.parametrize("value", [0, 0.01, [0.1, 0.0]])
def test_lambda_below_the_floor_is_refused_unless_the_floor_is_lowered(saved, value):
    llama, folder, _ = saved("idle", 4)
    options = {"stages": (Stage.COPY,), "lambda_init": value}
    with pytest.raises(ConversionError, match=r"--lambda-init 0.* is below --lambda-floor 0\.02.*as well"):
        calibrate(folder, llama.config, random_tokens(8), **options)
    calibrate(folder, llama.config, random_tokens(8), **options, local=LocalFit(lambda_floor=0.0))


def test_activations_that_are_not_finite_are_refused(tmp_path):
    llama, _ = planted_llama("twins", 4)
    llama.model.layers[1].mlp.down_proj.weight[3, 2] = torch.nan
    llama.save_pretrained(tmp_path)
    with pytest.raises(ConversionError, match="layer 1: LLaMA's own activations are NaN or Inf"):
        calibrate(tmp_path, llama.config, random_tokens(8), stages=(Stage.COPY,))


def test_heads_that_cannot_pair_are_refused(saved):
    _, folder, _ = saved("twins", 4)
    config = LlamaConfig(num_attention_heads=3, num_key_value_heads=3, hidden_size=48)
    with pytest.raises(ConversionError, match="pairs"):
        calibrate(folder, config, random_tokens(8))


def test_estimate_of_memory_does_not_grow_with_depth():
    def estimate(layers):
        config = LlamaConfig(
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=layers,
            num_attention_heads=32,
            num_key_value_heads=8,
        )
        return estimate_calibration(config, 65536, 1024)

    deep, shallow = estimate(32), estimate(8)
    assert deep.memory_bytes == shallow.memory_bytes < 40e9
    assert deep.work.float32 == pytest.approx(4 * shallow.work.float32)
    assert deep.seconds == pytest.approx(4 * shallow.seconds)
    assert deep.seconds > 0


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "1 second"),
        (40.4, "40 seconds"),
        (59.6, "1 minute"),
        (61, "1 minute"),
        (754, "13 minutes"),
        (3599, "1 hour"),
        (3 * 3600 + 11 * 60, "3 hours 10 minutes"),
        (24 * 3600 + 29 * 60, "24 hours 30 minutes"),
        (10731 * 60, "7 days 11 hours"),
        (48 * 3600, "2 days"),
    ],
)
def test_durations_are_in_human_units(seconds, words):
    assert duration_text(seconds) == words


@pytest.mark.gpu
def test_gpu_finds_what_the_cpu_finds(saved):
    llama, folder, planted = saved("twins", 4)
    result = calibrate(folder, llama.config, random_tokens(32), stages=CLOSED_FORM, norm="neutral", device="cuda")
    for pairing, pairs in zip(result.pairings, planted, strict=True):
        assert {frozenset(pairing.kv_heads[i : i + 2]) for i in (0, 2)} == pairs
    assert kl_nats(llama, calibrated_model(llama, result), random_tokens(8, seed=9)) < 0.01
