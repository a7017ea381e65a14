"""finetune_lora.py from data to merged model, resume, and one clear error for each thing that goes wrong."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from trainable_models import tiny_model
from transformers import AutoTokenizer


pytest.importorskip("peft", reason="peft is not installed")
EXAMPLES = Path(__file__).parents[2] / "examples"
ASSETS = EXAMPLES / "assets" / "tiny-llama"

import finetune_lora  # noqa: E402

from modeling_diff.training.finetuning_data import read_records, tokenize  # noqa: E402


# peft 0.21 asks transformers 5.23 by a name that is deprecated there.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
MESSAGES = [{"role": "user", "content": "sort b a"}, {"role": "assistant", "content": "a b"}]
RECORDS = [
    *({"prompt": f"upper {word} ->", "completion": f" {word.upper()}"} for word in ("ab", "cd", "ef", "gh")),
    {"messages": MESSAGES},
    {"text": "def f(x):\n    return x + 1\n" * 4},
]


@pytest.fixture(params=["v1", "v2"])
def variant(request):
    return request.param


@pytest.fixture
def checkpoint(tmp_path, variant):
    """A random model that reads the small LLaMA's tokens, with data next to it."""
    folder = tmp_path / "model"
    tiny_model(
        variant, vocab_size=2048, initializer_range=0.05, lambda_init=[0.2, 0.3] if variant == "v1" else None
    ).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ASSETS).save_pretrained(folder)
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return folder


def run(checkpoint, output="out", trainer="transformers", data="data.jsonl", **options):
    folder = checkpoint.parent
    settings = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "lora_r": 4, "learning_rate": 0.01}
    settings["per_device_train_batch_size"] = 2
    settings |= {"chat_template": folder / "chat.jinja", "prompt": "upper ab ->"} | options
    command = ["--model", checkpoint, "--data", folder / data, "--output", folder / output, "--trainer", trainer]
    for name, value in settings.items():
        if value is not None and value is not False:
            command += [f"--{name.replace('_', '-')}"] + ([] if value is True else [value])
    finetune_lora.main([str(part) for part in command])
    return folder / output


def losses(output):
    return [log["loss"] for log in json.loads((output / "result.json").read_text())["log"] if "loss" in log]


OPTIONS = {
    "plain": {},
    "packing": {"packing": True},
    "bf16, checkpointing": {"bf16": True, "gradient_checkpointing": True},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_adapter_and_merged_model_come_back(checkpoint, variant, options):
    output = run(checkpoint, max_steps=6, eval_data=checkpoint.parent / "data.jsonl", **OPTIONS[options])
    assert losses(output)[-1] < losses(output)[0]
    result = json.loads((output / "result.json").read_text())
    # The example itself refuses what is above its tolerance; from disk nothing may be lost but bfloat16's rounding.
    assert result["relative_difference"]["merged from disk"] == 0
    assert result["relative_difference"]["adapter from disk"] <= (0.05 if OPTIONS[options].get("bf16") else 0)
    assert any("lambda/layer_1/cancelled" in log for log in result["log"])
    saved = load_file(output / "adapter" / "adapter_model.safetensors")
    new = {"v1": ("diff_lambda", "sub_norm"), "v2": ("lambda_proj",)}[variant]
    assert all(any(name in key for key in saved) for name in new)
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("variant", ["v2"], indirect=True)
def test_trl_learns_from_the_same_tokens(checkpoint, packing):
    pytest.importorskip("trl", reason="trl is not installed")
    ours, theirs = (run(checkpoint, name, name, packing=packing) for name in ("transformers", "trl"))
    if packing:  # TRL packs before it forms batches, so its batches are others
        assert losses(theirs)[-1] < losses(theirs)[0]
    else:
        # One loss, summed in another order.
        assert losses(theirs) == pytest.approx(losses(ours), rel=1e-5)


@pytest.mark.parametrize("trainer", ["transformers", "trl"])
@pytest.mark.parametrize("variant", ["v1"], indirect=True)
def test_resume_equals_an_uninterrupted_run(checkpoint, trainer):
    pytest.importorskip("trl" if trainer == "trl" else "peft", reason="trl is not installed")
    whole = run(checkpoint, "whole", trainer)
    halves = run(checkpoint, "halves", trainer)
    for path in (*halves.glob("adapter/*.safetensors"), *halves.glob("checkpoints/checkpoint-4/*")):
        path.unlink()
    (halves / "checkpoints/checkpoint-4").rmdir()
    run(checkpoint, "halves", trainer, resume=True)
    states = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (whole, halves)]
    assert states[0].keys() == states[1].keys() and len(states[0]) > 20
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.fixture
def refuses(checkpoint, capsys):
    def check(message, **options):
        with pytest.raises(SystemExit) as stopped:
            run(checkpoint, **options)
        said = str(stopped.value)
        assert message in said and said.startswith("finetune_lora: ") and "\n" not in said

    return check


@pytest.mark.parametrize("variant", ["v2"], indirect=True)
def test_bad_data_gets_one_clear_error(checkpoint, refuses):
    folder = checkpoint.parent
    for text, message in (
        ("", "no example in it"),
        ('{"text": \n', "line 1 is not JSON (Expecting value at 10)"),
        ('{"question": "?"}\n', "record 1 has ['question']"),
        ('[{"text": "a"}]', "line 1 holds list, expected one object"),
        ('{"text": "a"}\n5\n', "line 2 holds int, expected one object"),
        ('{"prompt": "a", "completion": 5}\n', "line 1: completion is int, expected a string"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "half of a character"),
        (json.dumps({"prompt": "a " * 200, "completion": "b"}), "and --max-length is 64"),
    ):
        (folder / "bad.jsonl").write_text(text)
        refuses(message, data="bad.jsonl")
    refuses("no such file", data="nowhere.jsonl")
    refuses("no chat template", chat_template=None)
    refuses("File exists", output="bad.jsonl")
    refuses("would mix with", output="data.jsonl")


@pytest.mark.parametrize(
    ("record", "form"),
    [
        ({"messages": MESSAGES, "prompt": None, "text": 5}, "messages"),
        ({"messages": None, "prompt": "a", "completion": None, "text": "b"}, "text"),
    ],
    ids=["messages", "text"],
)
def test_what_a_record_has_beside_the_form_that_is_read_does_not_matter(record, form, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(ASSETS, chat_template=TEMPLATE)
    tokens = []
    for given in (record, {form: record[form]}):
        (tmp_path / "data.jsonl").write_text(json.dumps(given))
        tokens.append(tokenize(read_records([tmp_path / "data.jsonl"]), tokenizer, 64))
    assert tokens[0] == tokens[1]


def test_lines_end_where_json_lines_do(tmp_path):
    texts = ["one\u2028line", "next\x85line", "form\u000cfeed"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "data.jsonl").write_bytes("\r\n".join(lines).encode())
    assert [record["text"] for record in read_records([tmp_path / "data.jsonl"])] == texts


def test_text_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes("déjà vu".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt: not UTF-8"):
        read_records([tmp_path / "latin.txt"])


def test_chat_of_the_assets_is_read_with_their_template():
    """Each conversation in the order said, between bos and an eos after every answer, within tiny-llama's context."""
    tokenizer = AutoTokenizer.from_pretrained(ASSETS)
    tokenizer.chat_template = (ASSETS.parent / "chat_template.jinja").read_text(encoding="utf-8")
    records = read_records([ASSETS.parent / "chat.jsonl"])
    examples = tokenize(records, tokenizer, 128)
    assert len(records) == len(examples) == 64
    for record, example in zip(records, examples, strict=True):
        said = "".join(
            f"{message['role']}: {message['content']}\n" + ("</s>" if message["role"] == "assistant" else "")
            for message in record["messages"]
        )
        assert tokenizer.decode(example["input_ids"]) == f"<s>{said}"
        assert example["labels"] == example["input_ids"]
        assert example["input_ids"].count(tokenizer.eos_token_id) == said.count("</s>")
    asked = tokenizer.apply_chat_template(MESSAGES[:1], tokenize=False, add_generation_prompt=True)
    assert asked == "<s>user: sort b a\nassistant:"


def test_completions_need_an_eos_token():
    tokenizer = AutoTokenizer.from_pretrained(ASSETS)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="record 1 has a completion, and the tokenizer no eos_token"):
        tokenize([{"prompt": "a", "completion": "b"}], tokenizer, 64)


@pytest.mark.parametrize("variant", ["v2"], indirect=True)
def test_bad_settings_get_one_clear_error(checkpoint, refuses):
    refuses("max_position_embeddings=64", max_length=65)
    refuses("no checkpoint in", resume=True)
    refuses("absent.jinja", chat_template=checkpoint.parent / "absent.jinja")
    with pytest.raises(SystemExit, match=r"^finetune_lora: .*nowhere: no tokenizer can be loaded from there.*$"):
        run(checkpoint.parent / "nowhere")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(checkpoint)
    refuses("no pad token")


@pytest.mark.parametrize("variant", ["v1"], indirect=True)
def test_loss_of_nan_and_another_variant_get_one_clear_error(checkpoint, refuses):
    run(checkpoint, max_steps=2)
    weights = load_file(checkpoint / "model.safetensors")
    tiny_model("v2", vocab_size=2048).save_pretrained(checkpoint)
    refuses("an adapter of variant 'v1', and the model is 'v2'", resume=True)
    tiny_model("v1", vocab_size=2048).save_pretrained(checkpoint)
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    refuses("loss is nan at step 1", output="nan")


@pytest.mark.slow
def test_smoke_converts_trains_and_generates(tmp_path, capsys):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    finetune_lora.main(["--smoke", "--output", str(tmp_path / "out"), "--load-in-4bit"])
    assert "merged model" in capsys.readouterr().out
    assert (tmp_path / "out" / "merged" / "modeling_diff_llama.py").is_file()
