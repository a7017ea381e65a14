"""HealingTrainer alone, as a user of the Trainer takes it; its config; names of earlier versions."""

import json

import pytest
import torch
from command_line import run
from healing_toys import CONTEXT, heal, make_toys
from random_llamas import token_ids
from transformers import AutoModelForCausalLM, LlamaForCausalLM, TrainingArguments

from conversion import ConversionError, FilesError, HealingConfig, HealingOptions, HealingTrainer, verify_checkpoint
from conversion.describe import describe_checkpoint


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    return make_toys(tmp_path_factory.mktemp("toys"))


def records(count, seed):
    """Sequences of other lengths than those that are trained on."""
    return [{"input_ids": row} for row in token_ids(length=CONTEXT + 3, batch=count, seed=seed).tolist()]


def trainer(toys, output, student="v1-neutral", **options):
    given = {"per_device_train_batch_size": 4, "max_length": CONTEXT, "max_steps": 12, "learning_rate": 1e-2}
    return HealingTrainer(
        model=AutoModelForCausalLM.from_pretrained(toys / student),
        teacher=LlamaForCausalLM.from_pretrained(toys / "llama"),
        args=HealingConfig(
            output_dir=str(output), **(given | {"report_to": "none", "use_cpu": True, "disable_tqdm": True} | options)
        ),
        train_dataset=records(40, seed=3),
        eval_dataset=records(6, seed=4),
    )


def kl_of(student, teacher):
    """KL(teacher || student) per token of the evaluation text in float64, from the definition."""
    stream = torch.tensor([row["input_ids"] for row in records(6, seed=4)]).flatten()
    ids = stream[: len(stream) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    with torch.no_grad():
        p, q = (model.eval()(ids).logits.double().softmax(-1) for model in (teacher, student))
    return (p * (p / q).log()).sum(-1).mean().item()


def test_trainer_alone_brings_the_student_nearer_and_saves_a_plain_model(toys, tmp_path):
    teacher = LlamaForCausalLM.from_pretrained(toys / "llama")
    before = kl_of(AutoModelForCausalLM.from_pretrained(toys / "v1-neutral"), teacher)
    healing = trainer(toys, tmp_path / "work", eval_strategy="steps", max_steps=40, learning_rate=2e-2)
    healing.train()
    measured = [log["eval_kl"] for log in healing.state.log_history if "eval_kl" in log]
    assert measured[0] == pytest.approx(before, rel=1e-4)  # float32
    healing.save_model(tmp_path / "healed")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "healed")
    assert kl_of(reloaded, teacher) == pytest.approx(measured[-1], rel=1e-4) and measured[-1] < 0.8 * before
    assert json.loads((tmp_path / "healed" / "config.json").read_text())["sub_norm_eps"] == 1e-5
    ids = token_ids(length=9)
    with torch.no_grad():
        assert torch.equal(reloaded(ids).logits, healing.model.eval()(ids).logits)


def test_accumulated_batches_are_one_batch(toys, tmp_path):
    states = []
    for size, batches in ((4, 1), (2, 2)):
        healing = trainer(
            toys, tmp_path, "v1", max_steps=3, per_device_train_batch_size=size, gradient_accumulation_steps=batches
        )
        healing.train()
        states.append(healing.model.state_dict())
    for name, tensor in states[0].items():
        # float32 sums in another order, through three steps of Muon of at most 1e-2
        torch.testing.assert_close(states[1][name], tensor, rtol=0, atol=1e-3, msg=name)


def test_config_is_training_arguments_with_defaults_of_a_healing(tmp_path):
    config = HealingConfig(output_dir=str(tmp_path), use_cpu=True)
    assert isinstance(config, TrainingArguments)
    assert (config.learning_rate, config.num_train_epochs, config.max_steps) == (1e-3, 1.0, -1)
    assert HealingConfig(output_dir=str(tmp_path), optimizer="adamw", use_cpu=True).learning_rate == 2e-4
    assert config.get_warmup_steps(100) == 5
    assert config.to_dict()["stage"] == "kl"
    assert not config.gradient_checkpointing
    assert HealingConfig(output_dir=str(tmp_path), gradient_checkpointing=True, use_cpu=True).gradient_checkpointing


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"teacher": None}, "stage kl learns from a teacher"),
        ({"train_dataset": [{"text": "words"}]}, "train_dataset: holds text, but .* no tokenizer"),
        ({"train_dataset": [{"input_ids": [96]}]}, "train_dataset: input_ids of document 1: token 96"),
        ({"train_dataset": [{"input_ids": [1, 2]}]}, "train_dataset: 2 tokens, expected at least one sequence of 16"),
        ({"train_dataset": [{"labels": [1]}]}, "train_dataset: record 1 holds neither"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(toys, tmp_path, given, message):
    arguments = {
        "model": AutoModelForCausalLM.from_pretrained(toys / "v1"),
        "teacher": LlamaForCausalLM.from_pretrained(toys / "llama"),
        "args": HealingConfig(output_dir=str(tmp_path), max_length=CONTEXT, use_cpu=True),
        "train_dataset": records(4, seed=3),
    }
    with pytest.raises(ConversionError, match=message) as caught:
        HealingTrainer(**(arguments | given))
    assert "\n" not in str(caught.value)


def test_a_llama_is_no_student(toys, tmp_path):
    llama = LlamaForCausalLM.from_pretrained(toys / "llama")
    with pytest.raises(ConversionError, match="model is a LlamaForCausalLM, expected a DiffLlamaForCausalLM"):
        HealingTrainer(llama, llama, HealingConfig(output_dir=str(tmp_path), use_cpu=True))


OLD = {
    "steps": "max_steps",
    "context": "max_length",
    "batch_rows": "per_device_train_batch_size",
    "micro_rows": "per_device_train_batch_size",
    "warmup_share": "warmup_steps",
    "evaluations": "eval_steps",
    "checkpoints": "save_steps",
    "lora": "lora_r",
}


@pytest.mark.parametrize("name", OLD)
def test_a_name_of_earlier_versions_is_refused_with_the_new_one(name):
    for config_class in (HealingOptions, HealingConfig):
        with pytest.raises(ConversionError, match=f"^{name} is called {OLD[name]}"):
            config_class(**{name: 4})
    option, new = (f"--{word.replace('_', '-')}" for word in (name, OLD[name]))
    result = run("heal", "student", "out", "--data", "text", option, 4)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {option} is called {new}") and result.stderr.count("\n") == 1


def test_records_of_earlier_versions_are_read(toys, tmp_path):
    heal(toys, tmp_path / "healed", max_steps=1)
    path = tmp_path / "healed" / "conversion.json"
    record = json.loads(path.read_text())
    record["healing"][0]["options"] = {"steps": 1, "context": CONTEXT, "batch_rows": 4, "micro_rows": None}
    path.write_text(json.dumps(record))
    assert verify_checkpoint(tmp_path / "healed").passed
    describe_checkpoint(tmp_path / "healed")
    report = heal(toys, tmp_path / "again", tmp_path / "healed", max_steps=1)
    assert [stage["options"].get("context") for stage in report.record["healing"]] == [CONTEXT, None]


def test_work_of_an_earlier_version_is_refused_by_name(toys, tmp_path):
    from test_heal_resume import interrupted

    interrupted(toys, tmp_path / "out")
    path = tmp_path / ".out.healing" / "identity.json"
    identity = json.loads(path.read_text())
    del identity["format of the kept work"]
    path.write_text(json.dumps(identity))
    with pytest.raises(FilesError, match=r"another run, with different format of the kept work; .*--no-resume"):
        heal(toys, tmp_path / "out")
