"""train_tiny_llama.py runs in seconds with --smoke, and the model it trained is what its record says."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from conversion.calibration.speed import faster_in_bfloat16


ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "examples" / "studies" / "train_tiny_llama.py"
ASSET = ROOT / "examples" / "assets" / "tiny-llama"
RECORD_FIELDS = {
    "command",
    "date",
    "versions",
    "hardware",
    "products",
    "seed",
    "size",
    "parameters",
    "text",
    "steps",
    "tokens_seen",
    "train_seconds",
    "wall_seconds",
    "curve",
    "final",
}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smoke") / "model"
    command = [sys.executable, SCRIPT, "--smoke", "--kv-heads", "4", "--layers", "1", "--output", folder]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ, HF_HUB_OFFLINE="1"))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def main():
    """The script's own main, for what it refuses before it does any work."""
    return importlib.import_module("train_tiny_llama").main


@pytest.fixture(scope="module")
def asset():
    """The committed model in fp32, its tokenizer and its record."""
    model = AutoModelForCausalLM.from_pretrained(ASSET, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(ASSET), json.loads((ASSET / "training_record.json").read_text())


def test_smoke_output_loads_with_the_auto_classes(smoke):
    model = AutoModelForCausalLM.from_pretrained(smoke)
    tokenizer = AutoTokenizer.from_pretrained(smoke)
    assert type(model).__name__ == "LlamaForCausalLM" and model.dtype == torch.bfloat16
    assert model.config.num_key_value_heads == model.config.num_attention_heads == 4
    assert model.config.num_hidden_layers == 1
    assert model.config.tie_word_embeddings and len(tokenizer) == model.config.vocab_size
    text = "def naïve(x):\n\treturn x + 1234  # \u2603\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id == model.config.bos_token_id
    assert None not in (tokenizer.pad_token_id, tokenizer.eos_token_id)


def test_smoke_record_is_complete_and_its_loss_falls(smoke):
    record = json.loads((smoke / "training_record.json").read_text())
    assert set(record) >= RECORD_FIELDS
    assert record["products"] == ("bfloat16" if faster_in_bfloat16("cpu") else "float32")
    assert record["curve"][0]["step"] == 0 and record["curve"][-1]["step"] == record["steps"]
    # An untrained model is near ln(512) = 6.24 nats; the smoke run must have learnt the commonest tokens at least.
    assert abs(record["curve"][0]["heldout"] - 6.24) < 0.3
    assert record["final"]["heldout_loss"] < record["curve"][0]["heldout"] - 0.7
    assert record["tokens_seen"] == record["steps"] * record["size"]["batch"] * record["size"]["context"]


def test_smoke_output_names_no_folder_of_this_machine(smoke):
    written = "".join((smoke / name).read_text() for name in ("training_record.json", "README.md", "config.json"))
    assert str(smoke.parent) not in written and str(ROOT) not in written and str(Path.home()) not in written


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--kv-heads", "3"], "--kv-heads 3 must divide the 8 query heads"),
        (["--recall-share", "1.5"], "--recall-share 1.5 must lie between 0 and 0.9"),
        (["--max-steps", "0"], "must be positive"),
        (["--layers", "0"], "--layers, "),
        (["--max-steps", "5", "--minutes", "1"], "not allowed with"),
    ],
)
def test_wrong_options_are_refused_by_name(main, capsys, tmp_path, words, message):
    with pytest.raises(SystemExit, match="2"):
        main(["--output", str(tmp_path / "model"), *words])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_going_on_from_a_model_of_another_size_is_refused(main, smoke, tmp_path):
    with pytest.raises(SystemExit, match=r"another size \(kv_heads\)"):
        words = ["--smoke", "--kv-heads", "2", "--layers", "1", "--init", str(smoke)]
        main([*words, "--output", str(tmp_path / "model")])


def test_an_output_folder_in_use_is_not_overwritten(main, tmp_path):
    (tmp_path / "config.json").write_text("keep")
    with pytest.raises(SystemExit, match=r"^train_tiny_llama: .*config\.json is there: add --overwrite"):
        main(["--smoke", "--output", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == "keep"


def test_asset_is_a_small_bf16_gqa_llama():
    weights = ASSET / "model.safetensors"
    assert weights.stat().st_size <= 8_000_000
    assert sum(path.stat().st_size for path in ASSET.iterdir()) <= 8_600_000
    with safe_open(weights, "pt") as tensors:
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118 - not a dict == {"BF16"}
    config = json.loads((ASSET / "config.json").read_text())
    assert config["model_type"] == "llama" and config["tie_word_embeddings"]
    assert 1 < config["num_key_value_heads"] < config["num_attention_heads"]
    assert (ASSET / "heldout.txt").stat().st_size <= 150_000
    assert (ASSET / "calibration.txt").stat().st_size <= 250_000


def test_asset_texts_are_disjoint():
    """No file in both, and no long line of one in the other but for license boilerplate."""
    record = json.loads((ASSET / "training_record.json").read_text())["text"]
    assert not set(record["heldout_files"]) & set(record["calibration_files"])
    lines = [
        {line for line in (ASSET / name).read_text().splitlines() if len(line) > 60}
        for name in ("heldout.txt", "calibration.txt")
    ]
    assert len(lines[0] & lines[1]) < 0.05 * len(lines[0])


def test_asset_held_out_loss_is_the_recorded_one(asset):
    """Windows of bos and context - 1 tokens, each loss computed here from the logits."""
    model, tokenizer, record = asset
    ids = tokenizer((ASSET / "heldout.txt").read_text(), add_special_tokens=False)["input_ids"]
    width = record["size"]["context"] - 1
    windows = torch.tensor([[tokenizer.bos_token_id, *ids[i : i + width]] for i in range(0, len(ids) - width, width)])
    with torch.no_grad():
        losses = [
            F.cross_entropy(model(part).logits[:, :-1].flatten(0, 1), part[:, 1:].flatten())
            for part in windows.split(1)
        ]
    assert abs(torch.stack(losses).mean().item() - record["final"]["heldout_loss"]) < 0.05


def greedy_number(model, tokenizer, prompt):
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    assert ids.shape[1] < model.config.max_position_embeddings - 6
    with torch.no_grad():
        written = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
    return tokenizer.decode(written).strip()


@pytest.mark.parametrize("lines_between", [1, 8, 16])
def test_asset_recalls_a_needle_from_its_context(asset, lines_between):
    """Cities and numbers written here by hand, in text that was not trained on. Chance is one in ten thousand."""
    model, tokenizer, _ = asset
    lines = (ASSET / "heldout.txt").read_text().splitlines()
    cities = ["Oslo", "Lima", "Turin", "Boston", "Dakar", "Lisbon", "Kabul", "Sapporo", "Milan", "Tunis"]
    numbers = ["4821", "9035", "1177", "6402", "2598", "7316", "8840", "3069", "5753", "1924"]
    right = 0
    for i, (city, number) in enumerate(zip(cities, numbers, strict=True)):
        before = lines[100 * i : 100 * i + 3]
        after = lines[100 * i + 3 : 100 * i + 3 + lines_between]
        fact = f"The magic number of {city} is"
        prompt = "\n".join([*before, f"{fact} {number}.", *after, fact])
        right += greedy_number(model, tokenizer, prompt) == number
    assert right >= 7
