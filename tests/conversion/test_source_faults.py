"""Sources that are no LLaMA through and through: refused by field, value and way out, before any weight is read."""

import json
from unittest.mock import MagicMock

import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from random_llamas import SMALL, edit_json, random_llama, saved
from safetensors.torch import load_file, save_file

from conversion import ConversionError, convert_checkpoint
from conversion.source import location as source


CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SMALL}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def folder_with(tmp_path, files):
    folder = tmp_path / "source"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def assert_refused(folder, message, **options):
    """No weights are in these folders: to be refused for another reason, they must be refused before weights."""
    with pytest.raises(ConversionError, match=message) as caught:
        convert_checkpoint(folder, folder.parent / "output", "v1", uncalibrated=True, **options)
    assert "\n" not in str(caught.value)
    assert not (folder.parent / "output").exists()


def test_missing_folder_and_plain_file_are_refused(tmp_path):
    assert_refused(tmp_path / "nowhere", "does not exist")
    (tmp_path / "file").write_text("x")
    assert_refused(tmp_path / "file", "is a file")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "config.json: missing"),
        ({"adapter_config.json": {}}, "convert its base model, with this folder as --adapter"),
        ({"model.gguf": "GGUF"}, "for a GGUF file, give the path of the file itself"),
        ({"consolidated.00.pth": "", "params.json": {}}, "Meta's own format"),
        ({"config.json": "{"}, "config.json"),
        ({"config.json": "[1]"}, "config.json"),
        ({"config.json": {}}, "model_type is None"),
    ],
)
def test_folder_that_is_no_model(tmp_path, files, message):
    assert_refused(folder_with(tmp_path, files), message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral", "sliding_window": 64}, "sliding_window is 64, below max_position_embeddings"),
        ({"model_type": "qwen3_moe"}, "experts in place of the MLP; there is no conversion.*Supported: llama"),
        ({"model_type": "llama4"}, "images.*save its language model alone"),
        ({"model_type": "no\nsuch"}, "something else"),
        ({"model_type": "gemma"}, "scales embeddings"),
        ({"model_type": "phi3"}, "fuses"),
        ({"model_type": "bert"}, "something else"),
        ({"model_type": "diff_llama"}, "converted already"),
        ({"sliding_window": 4096}, "sliding_window is 4096"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "--backbone-only"),
        ({"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 8, "hidden_size": 24}, "--variant v2"),
        ({"num_key_value_heads": 1}, "num_key_value_heads is 1.*--variant v2"),
        ({"num_key_value_heads": 3}, "4 is not a multiple of num_key_value_heads 3"),
        ({"hidden_size": 34}, "34 is not a multiple.*head_dim"),
        ({"head_dim": 7}, "7 wide"),
        ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
        ({"vocab_size": "96"}, "vocab_size is '96'"),
        ({"hidden_size": -1}, "hidden_size is -1"),
        ({"num_attention_heads": True}, "num_attention_heads is True"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
        ({"hidden_act": 3}, "hidden_act"),
        ({"original_max_position_embeddings": "32"}, "original_max_position_embeddings is '32'"),
    ],
)
def test_config_that_is_no_llama(tmp_path, changes, message):
    config = {key: value for key, value in (CONFIG | changes).items() if value is not None or key == "sliding_window"}
    assert_refused(folder_with(tmp_path, {"config.json": config}), message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"type": "spiral", "factor": 2.0}}, "'spiral'"),
        ({"rope_scaling": {"type": "linear"}}, "factor None"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor 0.5"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor '2'"),
        ({"rope_scaling": "linear"}, "expected an object"),
        ({"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}}, "given twice"),
        ({"rope_scaling": {k: v for k, v in LLAMA3.items() if k != "low_freq_factor"}}, "low_freq_factor None"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 0.5}}, "high_freq_factor"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0] * 3}}, "long_factor"),
        ({"rope_theta": -1}, "rope_theta is -1"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "base.*given twice"),
        ({"rope_scaling": LLAMA3, "rope_parameters": {**LLAMA3, "factor": 2.0}}, "scaling.*given twice"),
        ({"rope_scaling": LLAMA3, "original_max_position_embeddings": 64}, "given twice.*64, rope_scaling: 32"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "whole heads"),
    ],
)
def test_contradictory_rotary_settings_are_refused(tmp_path, changes, message):
    assert_refused(folder_with(tmp_path, {"config.json": CONFIG | changes}), message)


def test_rotary_settings_said_twice_alike_are_fine(tmp_path):
    llama = saved(random_llama(), tmp_path / "llama")
    both = {"rope_theta": 10000, "rope_scaling": LLAMA3, "rope_parameters": LLAMA3 | {"rope_theta": 10000.0}}
    edit_json(llama / "config.json", **both)
    convert_checkpoint(llama, tmp_path / "output", "v1", uncalibrated=True, dry_run=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 1}, "num_hidden_layers is 1, but the weights have 2"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3, but the weights have 2"),
        ({"vocab_size": 100}, r"embed_tokens\.weight has shape \(96, 32\)|lm_head"),
        ({"attention_bias": True}, "bias is missing"),
        ({"tie_word_embeddings": True}, "lm_head.weight is not the embedding"),
        ({"num_key_value_heads": 4}, "k_proj.weight has shape"),
    ],
)
def test_weights_that_contradict_the_config_are_refused(tmp_path, changes, message):
    folder = saved(random_llama(), tmp_path / "source")
    edit_json(folder / "config.json", **changes)
    assert_refused(folder, message)


def test_quantized_tensors_are_refused(tmp_path):
    folder = saved(random_llama(), tmp_path / "source")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] = weights["model.layers.0.mlp.up_proj.weight"].char()
    save_file(weights, folder / "model.safetensors")
    assert_refused(folder, "up_proj.weight is torch.int8: quantized")


def test_code_of_the_source_is_neither_run_nor_kept(tmp_path):
    folder = saved(random_llama(), tmp_path / "source")
    edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    (folder / "modeling_evil.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    report = convert_checkpoint(folder, tmp_path / "output", "v1", uncalibrated=True)
    assert any(note.startswith("config.json names model code of its own (auto_map)") for note in report.notes)
    assert not (tmp_path / "run").exists() and not (tmp_path / "output" / "modeling_evil.py").exists()
    assert "evil" not in (tmp_path / "output" / "config.json").read_text().lower()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GatedRepoError, "log in"),
        (RepositoryNotFoundError, "neither a local folder nor"),
        (RevisionNotFoundError, "no revision 'v9'"),
        (ConnectionError, "cannot be reached"),
    ],
)
def test_hub_ids_that_cannot_be_had(tmp_path, monkeypatch, error, message):
    def download(*args, **options):
        raise error("no") if error is ConnectionError else error("no", response=MagicMock())

    monkeypatch.setattr(source, "snapshot_download", download)
    with pytest.raises(ConversionError, match=message):
        convert_checkpoint("owner/name", tmp_path / "output", "v1", uncalibrated=True, revision="v9")


def test_hub_id_is_converted_from_its_snapshot(tmp_path, monkeypatch):
    """What is asked of the Hub: weights and texts and no code; what is recorded: the id and the commit."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = saved(random_llama(), tmp_path / "models--owner--name" / "snapshots" / commit)
    asked = []
    patterns = set()

    def download(hub_id, **options):
        asked.append((hub_id, options["revision"]))
        patterns.update(options["allow_patterns"])
        return str(folder)

    monkeypatch.setattr(source, "snapshot_download", download)
    report = convert_checkpoint("owner/name", tmp_path / "output", "v1", uncalibrated=True, revision="main")
    assert asked == [("owner/name", "main")] * 2 + [("owner/name", commit)], (
        "config.json alone, texts, weights of the texts' own commit"
    )
    assert not any(pattern.endswith((".py", ".bin", ".pth")) or pattern == "*" for pattern in patterns)
    assert report.record["source"]["revision"] == commit
    assert "base_model: owner/name" in (tmp_path / "output" / "README.md").read_text()


def test_revision_of_a_local_folder_is_refused(tmp_path):
    with pytest.raises(ConversionError, match="only Hub ids have revisions"):
        convert_checkpoint(
            saved(random_llama(), tmp_path / "llama"), tmp_path / "output", "v1", uncalibrated=True, revision="main"
        )
