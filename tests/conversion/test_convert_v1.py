"""LLaMA -> V1: right weights in the right places, shown by the algebra that holds where maps are shared."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from random_llamas import FLAVOURS, SMALL, random_llama, saved, token_ids
from safetensors.torch import load_file, save_file

from conversion import ConversionError, convert_checkpoint
from conversion.mapping.heads import HeadPairing
from modeling_diff import DiffLlamaForCausalLM


PAIRED = [flavour for flavour in FLAVOURS if flavour != "mqa"]


def load(folder, **options):
    return DiffLlamaForCausalLM.from_pretrained(folder, **options).eval()


def share_maps(model, pairings):
    """Gives both heads of every pair the queries and keys of its first: A_1 = A_2, so V1 can say what LLaMA says."""
    d = model.config.head_dim
    with torch.no_grad():
        for layer, pairing in pairings.items():
            attention = model.model.layers[layer].self_attn
            for projection, heads in ((attention.q_proj, pairing.query_heads), (attention.k_proj, pairing.kv_heads)):
                for first, second in zip(heads[0::2], heads[1::2], strict=True):
                    for parameter in projection.parameters():
                        parameter[second * d : second * d + d] = parameter[first * d : first * d + d]
    return model


def adjacent(config):
    return HeadPairing.adjacent(config.num_attention_heads, config.num_key_value_heads)


@torch.no_grad()
def assert_same_logits(model, other, rtol=1e-5):
    expected, found = model(token_ids()).logits, other(token_ids()).logits
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol * expected.abs().max().item())


@pytest.mark.parametrize("flavour", PAIRED)
def test_copy_of_shared_maps_reproduces_llama(tmp_path, flavour):
    llama = random_llama(**FLAVOURS[flavour])
    pairings = dict.fromkeys(range(2), adjacent(llama.config))
    saved(share_maps(llama, pairings), tmp_path / "llama")
    convert_checkpoint(tmp_path / "llama", tmp_path / "v1", "v1", uncalibrated=True, lambda_init=0.0, norm="neutral")
    assert_same_logits(llama, load(tmp_path / "v1"))


def test_given_pairings_reproduce_llama_of_maps_shared_that_way(tmp_path):
    """GQA, two layers paired differently, neither as by default: KV heads 0-3 and 2-1, 3-1 and 0-2, crossed."""
    pairings = {
        0: HeadPairing(query_heads=(1, 6, 0, 7, 4, 3, 5, 2), kv_heads=(0, 3, 2, 1)),
        1: HeadPairing(query_heads=(6, 3, 7, 2, 1, 4, 0, 5), kv_heads=(3, 1, 0, 2)),
    }
    llama = share_maps(random_llama(num_attention_heads=8, num_key_value_heads=4), pairings)
    saved(llama, tmp_path / "llama")
    report = convert_checkpoint(
        tmp_path / "llama", tmp_path / "v1", "v1", uncalibrated=True, pairings=pairings, lambda_init=0, norm="neutral"
    )
    assert_same_logits(llama, load(tmp_path / "v1"))
    assert report.record["options"]["pairings"]["1"]["kv_heads"] == (3, 1, 0, 2)
    convert_checkpoint(tmp_path / "llama", tmp_path / "wrong", "v1", uncalibrated=True, lambda_init=0, norm="neutral")
    with pytest.raises(AssertionError):
        assert_same_logits(llama, load(tmp_path / "wrong"))


def test_layers_left_out_stay_llama(tmp_path):
    """Maps are shared in layer 1 only; layer 0 keeps its own attention, whatever its maps."""
    llama = random_llama()
    saved(share_maps(llama, {1: adjacent(llama.config)}), tmp_path / "llama")
    convert_checkpoint(
        tmp_path / "llama", tmp_path / "v1", "v1", uncalibrated=True, layers=[1], lambda_init=0.0, norm="neutral"
    )
    model = load(tmp_path / "v1")
    assert model.config.differential_layers == [1]
    assert_same_logits(llama, model)


@pytest.mark.parametrize("flavour", PAIRED)
def test_parameter_count_is_llamas_and_six_d_a_layer(tmp_path, flavour):
    llama = random_llama(**FLAVOURS[flavour])
    report = convert_checkpoint(saved(llama, tmp_path / "llama"), tmp_path / "v1", "v1", uncalibrated=True)
    config = llama.config
    expected = llama.num_parameters() + 6 * config.head_dim * config.num_hidden_layers
    assert load(tmp_path / "v1").num_parameters() == report.record["parameters"]["output"] == expected


def test_strict_norm_is_the_papers(tmp_path):
    convert_checkpoint(
        saved(random_llama(), tmp_path / "llama"), tmp_path / "v1", "v1", uncalibrated=True, lambda_init="paper"
    )
    model = load(tmp_path / "v1")
    assert model.config.lambda_init == [0.8 - 0.6 * math.exp(-0.3 * layer) for layer in range(2)]
    for layer in model.model.layers:
        assert torch.equal(layer.self_attn.sub_norm.weight, torch.ones(16))
        assert model.config.sub_norm_eps == 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lambda_is_lambda_init_exactly_and_its_vectors_are_float32(tmp_path, dtype):
    source = saved(random_llama().to(dtype), tmp_path / "llama")
    convert_checkpoint(source, tmp_path / "v1", "v1", uncalibrated=True, lambda_init=[0.02, 0.3])
    weights = load_file(tmp_path / "v1" / "model.safetensors")
    model = load(tmp_path / "v1")
    assert model.dtype == dtype
    for layer, value in enumerate((0.02, 0.3)):
        vectors = {
            n: weights[f"model.layers.{layer}.self_attn.diff_lambda.lambda_{n}"] for n in ("q1", "k1", "q2", "k2")
        }
        assert all(v.dtype == torch.float32 and v.shape == (8,) for v in vectors.values())
        assert 0.02 < vectors["q1"].std() < 0.3 and not torch.equal(vectors["q1"], vectors["k1"])
        assert torch.equal(vectors["q1"], vectors["q2"]) and torch.equal(vectors["k1"], vectors["k2"])
        assert model.model.layers[layer].self_attn.diff_lambda().item() == pytest.approx(value, abs=1e-7)


@pytest.mark.parametrize("norm", ["strict", "neutral"])
def test_every_new_tensor_has_a_gradient(tmp_path, norm):
    convert_checkpoint(saved(random_llama(), tmp_path / "llama"), tmp_path / "v1", "v1", uncalibrated=True, norm=norm)
    model = load(tmp_path / "v1")
    model(token_ids(), labels=token_ids()).loss.backward()
    new = {name: p.grad for name, p in model.named_parameters() if "diff_lambda" in name or "sub_norm" in name}
    assert len(new) == 10
    assert all((gradient != 0).all() for gradient in new.values())


def test_same_seed_same_bytes_whatever_the_shards(tmp_path):
    source = saved(random_llama(), tmp_path / "llama")
    for name, options in {"a": {}, "b": {}, "c": {"seed": 1}, "d": {"max_shard_size": "20KB"}}.items():
        convert_checkpoint(source, tmp_path / name, "v1", uncalibrated=True, **options)
    files = {name: sorted(p.name for p in (tmp_path / name).iterdir()) for name in "abcd"}
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files["a"])
    weights = load_file(tmp_path / "a" / "model.safetensors")
    reseeded = load_file(tmp_path / "c" / "model.safetensors")
    differing = {name for name in weights if not torch.equal(weights[name], reseeded[name])}
    assert differing == {name for name in weights if "diff_lambda" in name}
    shards = [file for file in files["d"] if file.endswith(".safetensors")]
    assert len(shards) > 2
    merged = {k: v for shard in shards for k, v in load_file(tmp_path / "d" / shard).items()}
    assert merged.keys() == weights.keys() and all(torch.equal(merged[k], weights[k]) for k in weights)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_casts_all_but_lambda(tmp_path, dtype):
    convert_checkpoint(
        saved(random_llama(), tmp_path / "llama"), tmp_path / "v1", "v1", uncalibrated=True, dtype=dtype
    )
    weights = load_file(tmp_path / "v1" / "model.safetensors")
    assert {t.dtype for n, t in weights.items() if "diff_lambda" not in n} == {getattr(torch, dtype)}
    assert {t.dtype for n, t in weights.items() if "diff_lambda" in n} == {torch.float32}
    assert json.loads((tmp_path / "v1" / "config.json").read_text())["dtype"] == dtype


def damaged(tmp_path, name, value):
    source = saved(random_llama(), tmp_path / "llama")
    weights = load_file(source / "model.safetensors")
    weights[name][1] = value
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    return source


def test_overflow_to_float16_is_refused_by_name(tmp_path):
    source = damaged(tmp_path, "model.norm.weight", 1e6)
    with pytest.raises(ConversionError, match=r"model\.norm\.weight has entries up to 1e\+06"):
        convert_checkpoint(source, tmp_path / "v1", "v1", uncalibrated=True, dtype="float16")
    assert not (tmp_path / "v1").exists()
    convert_checkpoint(source, tmp_path / "v1", "v1", uncalibrated=True, dtype="bfloat16")


def test_nonfinite_values_are_refused_unless_allowed(tmp_path):
    source = damaged(tmp_path, "model.layers.1.mlp.up_proj.weight", float("nan"))
    with pytest.raises(
        ConversionError, match=r"mlp\.up_proj\.weight has 32 NaN or infinite entries, the first at \(1, 0\)"
    ):
        convert_checkpoint(source, tmp_path / "v1", "v1", uncalibrated=True)
    convert_checkpoint(source, tmp_path / "v1", "v1", uncalibrated=True, allow_nonfinite=True)
    assert load_file(tmp_path / "v1" / "model.safetensors")["model.layers.1.mlp.up_proj.weight"][1].isnan().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "v3"}, "variant"),
        ({"lambda_init": 1.0}, "below 1"),
        ({"lambda_init": [0.1]}, "each of 2 layers"),
        ({"layers": [2]}, "layers names layer 2, and the model has 2 layers"),
        ({"layers": []}, "layers names no layer"),
        ({"norm": "none"}, "norm"),
        ({"dtype": "int8"}, "dtype"),
        ({"lambda_start": 0.3}, "belongs to variant v2"),
        ({"variant": "v2", "lambda_init": 0.1}, "lambda_init belongs to variant v1"),
        ({"variant": "v2", "lambda_start": 1.0}, "between 0 and 1"),
        ({"pairings": {0: HeadPairing.adjacent(8, 8)}}, "pairing of layer 0"),
        ({"max_shard_size": "many"}, "many"),
        ({"max_shard_size": None}, "max_shard_size None: expected a number"),
        ({"layers": [0.5]}, r"layers is \[0.5\], expected indices"),
        ({"layers": 1}, "layers is 1, expected indices"),
        ({"lambda_init": ["small"]}, "lambda_init is .'small'., expected 'paper', a number"),
        ({"variant": "v2", "lambda_start": "half"}, "lambda_start is 'half', expected a number"),
        ({"seed": -1}, "seed is -1, expected a whole number from 0 to 4294967295"),
        ({"seed": 2**70}, "seed is 1180591620717411303424"),
        ({"seed": None}, "seed is None"),
        ({"pairings": {7: HeadPairing.adjacent(4, 2)}}, r"pairings of layers \[7\]: expected indices from 0 to 1"),
        ({"pairings": {"0": HeadPairing.adjacent(4, 2)}}, "pairings is .*, expected pairings by layer"),
        ({"pairings": [HeadPairing.adjacent(4, 2)] * 2}, "pairings is .*, expected pairings by layer"),
        ({"stages": ["refit"]}, "stages needs text to calibrate on"),
        ({"calibration_tokens": 4096}, "calibration_tokens needs text to calibrate on"),
        ({"lambda_floor": 0.1}, "lambda_floor needs text to calibrate on"),
    ],
)
def test_options_that_make_no_sense_are_refused(tmp_path, options, message):
    options = {"variant": "v1"} | options
    llama = saved(random_llama(), tmp_path / "llama")
    with pytest.raises(ConversionError, match=message):
        convert_checkpoint(llama, tmp_path / "v1", uncalibrated=options["variant"] != "v2", **options)
    assert not (tmp_path / "v1").exists()


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ({"layers": range(1)}, {"layers": [0]}),
        ({"layers": {1, 0}}, {"layers": [0, 1]}),
        ({"lambda_init": np.array([0.25, 0.5])}, {"lambda_init": [0.25, 0.5]}),
        ({"lambda_init": torch.tensor([0.25, 0.5])}, {"lambda_init": [0.25, 0.5]}),
        ({"lambda_init": np.float32(0.25)}, {"lambda_init": 0.25}),
        ({"variant": "v2", "lambda_start": "0.25"}, {"lambda_start": 0.25}),
        ({"seed": np.int64(7)}, {"seed": 7}),
        ({"max_shard_size": 40000}, {}),
    ],
)
def test_numbers_of_any_kind_are_understood_and_recorded(tmp_path, given, plain):
    given = {"variant": "v1"} | given
    llama = saved(random_llama(), tmp_path / "llama")
    convert_checkpoint(llama, tmp_path / "out", uncalibrated=given["variant"] == "v1", **given)
    options = json.loads((tmp_path / "out" / "conversion.json").read_text())["options"]
    assert options | plain == options


def test_output_loads_in_a_fresh_process_without_this_package(tmp_path):
    convert_checkpoint(saved(random_llama(), tmp_path / "llama"), tmp_path / "v1", "v1", uncalibrated=True)
    script = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A; "
        f"m = A.from_pretrained({str(tmp_path / 'v1')!r}, trust_remote_code=True); "
        "assert 'modeling_diff' not in sys.modules and type(m).__module__.startswith('transformers_modules'); "
        "print(m.model.layers[0].self_attn.diff_lambda().item())"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        env={"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin"},
    )
    assert float(run.stdout) == pytest.approx(0.05, abs=1e-6)


def test_companions_travel_and_absent_ones_are_reported(tmp_path):
    source = saved(random_llama(), tmp_path / "llama")
    texts = {"tokenizer.json": "{}", "tokenizer_config.json": "{}", "LICENSE.txt": "terms", "USE_POLICY.md": "policy"}
    texts |= {"additional_chat_templates/tools.jinja": "{{ x }}", "modeling_custom.py": "raise SystemExit"}
    (source / "additional_chat_templates").mkdir()
    for name, text in texts.items():
        (source / name).write_text(text)
    (source / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: de\n---\nA model.\n")
    report = convert_checkpoint(source, tmp_path / "v1", "v1", uncalibrated=True)
    for name, text in texts.items():
        assert name.endswith(".py") or (tmp_path / "v1" / name).read_text() == text
    assert not (tmp_path / "v1" / "modeling_custom.py").exists()
    assert [note.split(":")[0] for note in report.notes] == ["uncalibrated"]
    card = (tmp_path / "v1" / "README.md").read_text()
    assert "license: apache-2.0" in card and "needs healing" in card and "base_model" not in card
    assert str(tmp_path) not in card + (tmp_path / "v1" / "conversion.json").read_text()


def test_tied_model_with_a_copy_of_the_embedding(tmp_path):
    """The same head is left out and reported, another one is refused."""
    source = saved(random_llama(tie_word_embeddings=True), tmp_path / "llama")
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    note = "left out: 'lm_head.weight': a copy of the embedding"
    assert note in convert_checkpoint(source, tmp_path / "same", "v1", uncalibrated=True).notes
    weights["lm_head.weight"][0] += 1
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match="tie_word_embeddings is true, but"):
        convert_checkpoint(source, tmp_path / "other", "v1", uncalibrated=True)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        weights[name] = weights["model.embed_tokens.weight"].clone()
        weights[name][0, 0] = float("nan")
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    options = {"uncalibrated": True, "allow_nonfinite": True}
    assert note in convert_checkpoint(source, tmp_path / "nan", "v1", **options).notes


def test_tied_model_whose_embedding_is_stored_as_its_head(tmp_path):
    """transformers loads it alike."""
    source = saved(random_llama(tie_word_embeddings=True), tmp_path / "llama")
    convert_checkpoint(source, tmp_path / "expected", "v1", uncalibrated=True)
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    for options in ({}, {"backbone_only": True}):
        convert_checkpoint(source, tmp_path / "v1", "v1", uncalibrated=True, **options, overwrite=True)
        ours, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("v1", "expected"))
        assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in expected)


def test_interrupted_and_resumed_run_ends_as_if_never_stopped(tmp_path):
    source = saved(random_llama(), tmp_path / "llama")
    options = {"max_shard_size": "20KB", "dtype": "bfloat16"}
    convert_checkpoint(source, tmp_path / "whole", "v1", uncalibrated=True, **options)

    def stop_midway(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(
            source, tmp_path / "v1", "v1", uncalibrated=True, **options, resume=True, progress=stop_midway
        )
    assert not (tmp_path / "v1").exists()
    seen = []
    convert_checkpoint(
        source,
        tmp_path / "v1",
        "v1",
        uncalibrated=True,
        **options,
        resume=True,
        progress=lambda done, total: seen.append(done),
    )
    assert seen[0] > seen[-1] / 4  # finished shards were kept
    expected = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "v1").iterdir()} == expected


def test_dry_run_writes_nothing(tmp_path):
    report = convert_checkpoint(
        saved(random_llama(), tmp_path / "llama"), tmp_path / "v1", "v1", uncalibrated=True, dry_run=True
    )
    assert report.num_bytes == 4 * report.record["parameters"]["output"]
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


@pytest.mark.parametrize("dry_run", [True, False])
def test_license_outside_the_source_is_refused_before_a_byte_is_written(tmp_path, dry_run):
    source = saved(random_llama(), tmp_path / "llama")
    written = []
    (tmp_path / "terms").write_text("terms")
    (source / "LICENSE").symlink_to(tmp_path / "terms")
    with pytest.raises(ConversionError, match=r"LICENSE: links to .*terms, outside the folder"):
        convert_checkpoint(
            source,
            tmp_path / "v1",
            "v1",
            uncalibrated=True,
            dry_run=dry_run,
            progress=lambda *done: written.append(done),
        )
    assert not written


def test_progress_counts_every_byte_once(tmp_path):
    seen = []
    source = saved(random_llama(), tmp_path / "llama")
    report = convert_checkpoint(
        source, tmp_path / "v1", "v1", uncalibrated=True, progress=lambda done, total: seen.append((done, total))
    )
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (report.num_bytes, report.num_bytes)
    assert SMALL["num_hidden_layers"] == 2  # what the parameter counts above take for granted
