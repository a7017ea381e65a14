"""`heal`: what is refused, before anything is trained and with nothing left behind."""

import json
import re
import resource
import shutil

import pytest
import torch
from healing_toys import heal, make_toys, weights, write_training_rows
from random_llamas import edit_json, random_diffllama, random_llama, saved
from safetensors.torch import save_file
from saved_checkpoints import names, refusal, snapshot
from transformers import TrainerCallback

from conversion import ConversionError, FilesError, convert_checkpoint
from conversion.checkpoint.reader import CheckpointReader
from conversion.checkpoint.writer import SMALL_FILES_BYTES
from conversion.healing.options import HealingOptions
from conversion.healing.work_folder import least_bytes


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    return make_toys(tmp_path_factory.mktemp("toys"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 129}, "reads at most 128"),
        ({"stage": "melt"}, "expected one of local, kl, lm"),
        ({"max_steps": 0}, "steps is 0"),
        ({"tokens": 100}, "both say how long"),
        ({"learning_rate": -1.0}, "learning_rate is -1"),
        ({"stage": "lm", "hidden_weight": 1.0}, "belong to the stage kl"),
        ({"cached_logits": 4, "hidden_weight": 1.0}, "leave it out"),
        ({"per_device_train_batch_size": 50, "max_steps": -1}, "fewer per step"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0"),
        ({"lora_r": 4, "stage": "local", "optimizer": "adamw"}, "lora_r with the stage local"),
        ({"norm_share": 1.5}, "a share from 0 to 1"),
        ({"seed": -1}, "seed is -1, expected a whole number from 0 to 4294967295"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"cached_logits": 97}, "cached_logits is 97, expected at most vocab_size, 96"),
    ],
)
def test_bad_options_are_refused_in_one_line(toys, tmp_path, options, message):
    with pytest.raises(ConversionError, match=message) as caught:
        heal(toys, tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def other_llama(folder, **changes):
    return saved(random_llama(**changes), folder / "other")


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"vocab_size": 100}, {}, "vocab_size is 100, and the checkpoint's is 96"),
        ({"num_hidden_layers": 3}, {"stage": "local"}, "num_hidden_layers is 3"),
        ({"num_hidden_layers": 3}, {"hidden_weight": 1.0}, "num_hidden_layers is 3"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(toys, tmp_path, changes, options, message):
    with pytest.raises(ConversionError, match=message):
        heal(toys, tmp_path / "out", **options, arguments={"teacher": other_llama(tmp_path, **changes)})


def without(folder, name):
    """The checkpoint in `folder` without one of its tensors."""
    tensors = weights(folder)
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def without_config(folder, field):
    edit_json(folder / "config.json", without=[field])
    return folder


TEACHERS = {
    "diffllama": (lambda folder: saved(random_diffllama(), folder), "model_type is 'diffllama', expected 'llama'"),
    "backbone": (lambda folder: saved(random_llama().model, folder), "tensor lm_head.weight is missing (1 in all)"),
    "torn": (
        lambda folder: without(saved(random_llama(), folder), "model.layers.1.mlp.up_proj.weight"),
        "tensor model.layers.1.mlp.up_proj.weight is missing",
    ),
    "biased": (
        lambda folder: without_config(saved(random_llama(attention_bias=True), folder), "attention_bias"),
        "tensor model.layers.0.self_attn.k_proj.bias is unknown (8 in all)",
    ),
    "wide": (
        lambda folder: without_config(saved(random_llama(head_dim=16), folder), "head_dim"),
        "tensor model.layers.0.self_attn.k_proj.weight has another shape",
    ),
}


@pytest.mark.parametrize("kind", TEACHERS)
def test_a_teacher_that_is_no_whole_llama_is_refused(toys, tmp_path, kind):
    make, message = TEACHERS[kind]
    with pytest.raises(ConversionError, match=re.escape(message)) as caught:
        heal(toys, tmp_path / "out", arguments={"teacher": make(tmp_path / "teacher")})
    assert "teacher" in str(caught.value) and "\n" not in str(caught.value)
    assert names(tmp_path) == ["teacher"]


def test_a_student_that_is_not_whole_is_refused(toys, tmp_path):
    convert_checkpoint(toys / "llama", tmp_path / "backbone", "v1", uncalibrated=True, backbone_only=True)
    without(
        convert_checkpoint(toys / "llama", tmp_path / "torn", "v1", uncalibrated=True).output,
        "model.layers.1.mlp.up_proj.weight",
    )
    for student, message in {
        "backbone": r"architectures is \['DiffLlamaModel'\], a backbone",
        "torn": r"torn: tensor model.layers.1.mlp.up_proj.weight is missing \(1 in all\)",
    }.items():
        with pytest.raises(ConversionError, match=message):
            heal(toys, tmp_path / "out", tmp_path / student)
    assert names(tmp_path) == ["backbone", "torn"]


def test_a_pickled_teacher_needs_leave(toys, tmp_path):
    teacher = saved(random_llama(), tmp_path / "teacher")
    torch.save(weights(teacher), teacher / "pytorch_model.bin")
    (teacher / "model.safetensors").unlink()
    with pytest.raises(ConversionError, match=r"only pickled weights here.*allow_pickle=True"):
        heal(toys, tmp_path / "out", max_steps=1, arguments={"teacher": teacher})
    report = heal(toys, tmp_path / "out", max_steps=1, arguments={"teacher": teacher, "allow_pickle": True})
    assert report.record["healing"][0]["teacher"] == "teacher"


def test_another_tokenizer_is_refused(toys, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    for folder, words in ((tmp_path / "student", "ab"), (tmp_path / "other", "ba")):
        vocabulary = {word: index for index, word in enumerate(words)}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
        source = toys / "v1" if folder.name == "student" else toys / "llama"
        folder.mkdir()
        for path in source.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    with pytest.raises(ConversionError, match="its tokenizer has other tokens"):
        heal(
            tmp_path,
            tmp_path / "out",
            "student",
            arguments={"teacher": tmp_path / "other", "data": toys / "data.jsonl"},
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"teacher": None}, "learns from a teacher"),
        ({"data": []}, "no file was given"),
        ({"data": "missing.jsonl"}, "does not exist"),
        ({"held_out": "missing.jsonl"}, "does not exist"),
    ],
)
def test_missing_input_is_refused(toys, tmp_path, arguments, message):
    with pytest.raises(ConversionError, match=message):
        heal(toys, tmp_path / "out", arguments=arguments)


def test_data_of_no_use_are_refused(toys, tmp_path):
    contents = {
        "empty": "",
        "text": "words",
        "short": json.dumps({"input_ids": [1, 2]}),
        "strange": json.dumps({"input_ids": [96]}),
        "half": '{"text": "\\ud800"}',
    }
    messages = {
        "empty": "0 tokens",
        "text": "is not JSON",
        "short": "2 tokens",
        "strange": "document 1: token 96",
        "half": r"half.jsonl: line 1: text has '\\ud800' at 0",
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.jsonl").write_text(content)
        with pytest.raises(ConversionError, match=messages[name]):
            heal(toys, tmp_path / "out", arguments={"data": tmp_path / f"{name}.jsonl"})
        assert not [left for left in names(tmp_path) if "out" in left]
    with pytest.raises(ConversionError, match="leave 3 sequences of 16 tokens to train on, and a step takes 4"):
        heal(toys, tmp_path / "out", arguments={"data": write_training_rows(tmp_path / "few.jsonl", 7)})


def test_a_used_target_and_a_foreign_source_are_refused(toys, tmp_path):
    with pytest.raises(FilesError, match="not empty"):
        heal(toys, toys / "v2")
    with pytest.raises(ConversionError, match="model_type is 'llama'"):
        heal(toys, tmp_path / "out", "llama")


@pytest.mark.parametrize(("place", "relation"), [("", "is the source"), ("inside", "is inside the source")])
def test_the_teacher_is_no_target(toys, tmp_path, place, relation):
    teacher = shutil.copytree(toys / "llama", tmp_path / "teacher")
    before = snapshot(tmp_path)
    arguments = {"teacher": teacher, "overwrite": True}
    assert relation in refusal(heal, toys, teacher / place, arguments=arguments)
    assert snapshot(tmp_path) == before


def test_too_little_disk_is_refused_first(toys, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 10**5))
    assert "0.034 GB are needed, 0.000 GB are free" in refusal(heal, toys, tmp_path / "out")
    assert names(tmp_path) == []


@pytest.mark.parametrize("options", [{"optimizer": "adamw"}, {"optimizer": "muon"}, {"stage": "local"}])
def test_the_disk_asked_for_is_what_checkpoints_take(toys, tmp_path, options):
    """Against the files of a Trainer checkpoint, which hold a state of the random numbers besides."""
    sizes = {}

    class Weigh(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            folder = tmp_path / ".out.healing" / "trainer" / f"checkpoint-{state.global_step}"
            sizes.update({path.name: path.stat().st_size for path in folder.iterdir()})

    heal(toys, tmp_path / "out", max_steps=1, save_steps=1, arguments={"callbacks": [Weigh()]}, **options)
    taken = sizes["model.safetensors"] + sizes["optimizer.pt"]
    taken += (tmp_path / "out" / "model.safetensors").stat().st_size
    asked = least_bytes(CheckpointReader(toys / "v1"), HealingOptions(**options), 1) - SMALL_FILES_BYTES
    assert 0.8 * taken < asked < taken  # Muon leaves the toy's large embeddings to AdamW


@pytest.mark.parametrize("limit", [50_000, 120_000])
def test_a_disk_that_fills_while_training_is_one_line(toys, tmp_path, limit):
    """Too little first for the weights, which safetensors writes, then for the optimizer's state, which torch does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        message = refusal(heal, toys, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "step 2 could not be saved" in message and "free space there and run again with --resume" in message
    assert names(tmp_path) == []
