"""`heal`: what each stage trains and reaches, what is written, what is refused."""

import json

import pytest
import torch
from healing_toys import CONTEXT, heal, make_toys, weights, write_training_rows
from random_llamas import SMALL, token_ids
from saved_checkpoints import names, snapshot
from transformers import AutoModelForCausalLM, TrainerCallback

from conversion import ConversionError, FilesError, verify_checkpoint
from conversion.data.text import pack_rows
from conversion.healing import training_run as healing_run
from conversion.healing.options import HealingOptions
from conversion.healing.rows import rows_to_read, split_rows
from conversion.healing.student import load_student
from conversion.healing.teacher import load_teacher
from conversion.healing.teacher_cache import fill_cache
from modeling_diff.training.lambda_values import differential_attentions, layer_lambda


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    return make_toys(tmp_path_factory.mktemp("toys"))


@pytest.fixture(scope="module")
def healed(toys):
    heal(toys, toys / "healed", max_steps=20, learning_rate=2e-2)
    return toys / "healed"


def changed(toys, output, student="v1"):
    before = weights(toys / student)
    after = weights(output)
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_kl_brings_the_student_nearer_and_writes_a_plain_checkpoint(toys, healed):
    record = json.loads((healed / "conversion.json").read_text())
    (entry,) = record["healing"]
    start = entry["table"][0]
    end = entry["table"][-1]
    assert (start["tokens"], end["tokens"], entry["tokens"]) == (0, 20 * 4 * CONTEXT, 20 * 4 * CONTEXT)
    assert end["kl"] < 0.8 * start["kl"]
    expected = (start["loss"] - end["loss"]) / (start["loss"] - end["teacher_loss"])
    assert end["recovered"] == pytest.approx(expected)
    assert (entry["stage"], entry["teacher"], entry["data"]) == ("kl", "llama", ["data.jsonl"])
    assert min(end["lambda"]) >= 0.02
    assert verify_checkpoint(healed, toys / "llama").passed
    assert {"config.json", "model.safetensors", "modeling_diff_llama.py"} <= record["sha256"].keys()
    assert "Healed, kl: 1,280 tokens" in (healed / "README.md").read_text()
    assert sorted(path.name for path in toys.iterdir() if path.name.startswith(".")) == []


def test_run_that_ends_further_from_the_teacher_says_so(toys, healed, tmp_path):
    report = heal(toys, tmp_path / "fast", "healed", max_steps=4, learning_rate=0.5)
    (note,) = report.notes
    start = report.table[0]["kl"]
    end = report.table[-1]["kl"]
    assert end > start and note.startswith(f"KL on the held-out text rose from {start:.4f} to {end:.4f} nats/token")
    assert "learning_rate=0.05" in note
    assert heal(toys, tmp_path / "slow", "healed", max_steps=4, learning_rate=1e-4).notes == []


def test_what_was_measured_is_what_was_written(toys, healed):
    """The last row of the table against transformers' own loss of the loaded folder, on the first four rows."""
    end = json.loads((healed / "conversion.json").read_text())["healing"][0]["table"][-1]
    rows = [json.loads(line)["input_ids"] for line in (toys / "data.jsonl").read_text().splitlines()[:4]]
    ids = torch.tensor(rows)
    for folder, name in ((healed, "loss"), (toys / "llama", "teacher_loss")):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            assert model(ids, labels=ids).loss.item() == pytest.approx(end[name], abs=1e-5)  # float32 sums


def test_a_second_stage_follows_on_the_output(toys, healed, tmp_path):
    report = heal(toys, tmp_path / "twice", "healed", stage="lm", arguments={"teacher": None})
    assert [entry["stage"] for entry in report.record["healing"]] == ["kl", "lm"]
    start = report.table[0]
    end = report.table[-1]
    assert start["kl"] is None and end["kl"] is None and end["recovered"] is None
    loss = json.loads((healed / "conversion.json").read_text())["healing"][0]["table"][-1]["loss"]
    assert start["loss"] == pytest.approx(loss, abs=1e-6)


def test_local_trains_attention_alone_and_brings_layers_nearer(toys, tmp_path):
    logged = []

    class Losses(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            logged.extend([logs["loss"]] if "loss" in logs else [])

    heal(
        toys, tmp_path / "local", stage="local", max_steps=20, learning_rate=2e-2, arguments={"callbacks": [Losses()]}
    )
    assert all("self_attn" in name for name in changed(toys, tmp_path / "local"))
    assert {name.split("self_attn.")[1] for name in changed(toys, tmp_path / "local")} >= {
        "q_proj.weight",
        "k_proj.weight",
        "v_proj.weight",
        "o_proj.weight",
        "sub_norm.weight",
        "diff_lambda.lambda_q1",
    }
    assert logged[-1] < 0.8 * logged[0]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("student", ["v1-neutral", "v2"])
def test_every_student_and_optimizer_gets_nearer_or_stays(toys, tmp_path, student, optimizer):
    rate = 1e-3 if student == "v2" else 5e-3  # V2 starts at its end
    report = heal(
        toys, tmp_path / "out", student, optimizer=optimizer, learning_rate=rate, gradient_checkpointing=True
    )
    assert len(changed(toys, tmp_path / "out", student)) == len(weights(tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["sub_norm_eps"] == (1e-5 if student == "v1-neutral" else None)
    before = report.table[0]["kl"]
    after = report.table[-1]["kl"]
    assert after < before if student == "v1-neutral" else (before == pytest.approx(0, abs=1e-6) and after < 0.05)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_lambda_goes_to_the_papers_schedule_and_the_config_says_so(toys, tmp_path):
    report = heal(toys, tmp_path / "out", lambda_mode="paper")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["lambda_init"] == pytest.approx([0.2, 0.355509], abs=1e-6)
    assert report.table[0]["lambda"] == pytest.approx([0.05, 0.05], abs=1e-6)
    model = load_student(tmp_path / "out")
    values = [layer_lambda(a.diff_lambda) for a in differential_attentions(model).values()]
    assert values == pytest.approx(report.table[-1]["lambda"])
    assert values == pytest.approx([0.2, 0.355509], abs=0.05)  # and what was learnt


def test_free_lambda_may_fall_below_a_floor_and_a_held_one_may_not(toys, tmp_path):
    lows = {}
    for mode in ("free", "floor"):
        report = heal(
            toys, tmp_path / mode, lambda_mode=mode, lambda_floor=0.049, lambda_learning_rate=0.02, max_steps=8
        )
        lows[mode] = min(value for row in report.table for value in row["lambda"])
    assert lows["free"] < 0.049 <= lows["floor"]


def test_hidden_states_and_text_may_be_mixed_in(toys, tmp_path):
    plain = heal(toys, tmp_path / "plain")
    mixed = heal(toys, tmp_path / "mixed", hidden_weight=1.0, cross_entropy_weight=0.5)
    assert mixed.table[-1]["kl"] < mixed.table[0]["kl"]
    assert mixed.table[-1]["kl"] != plain.table[-1]["kl"]


def test_cached_logits_stand_in_for_the_teacher(toys, tmp_path, monkeypatch):
    kept = SMALL["vocab_size"] - 1  # one token is left over: nothing is lost
    live = heal(toys, tmp_path / "live")
    cache = {"cache_folder": tmp_path / "cache"}
    first = heal(toys, tmp_path / "first", cached_logits=kept, arguments=cache)
    assert first.table[-1]["kl"] == pytest.approx(live.table[-1]["kl"], abs=1e-4)
    assert first.table[-1]["teacher_loss"] == pytest.approx(live.table[-1]["teacher_loss"], abs=1e-5)
    monkeypatch.setattr(healing_run, "load_teacher", None)
    heal(toys, tmp_path / "second", cached_logits=kept, arguments=cache)
    assert weights(tmp_path / "first").keys() == weights(tmp_path / "second").keys()
    for name, tensor in weights(tmp_path / "first").items():
        assert torch.equal(tensor, weights(tmp_path / "second")[name]), name


HELD_OUT = token_ids(length=8, batch=3, seed=9).int()


class Asked:
    """A teacher that does something at every question, and then answers."""

    def __init__(self, folder, at_question):
        self.teacher = load_teacher(folder, HealingOptions())
        self.at_question = at_question
        self.model = self.teacher.model

    def targets(self, ids, numbers):
        self.at_question()
        return self.teacher.targets(ids, numbers)

    def last_states(self, ids):
        return self.teacher.last_states(ids)


def test_two_runs_do_not_write_one_cache(toys, tmp_path):
    rows = token_ids(length=8, batch=6).int()
    at_work = 0

    def another_run():
        nonlocal at_work
        with pytest.raises(FilesError, match="another run is writing"):
            fill_cache(tmp_path / "one", Asked(toys / "llama", lambda: None), rows, HELD_OUT, num_kept=4, batch_rows=2)
        at_work += 1

    fill_cache(tmp_path / "alone", Asked(toys / "llama", lambda: None), rows, HELD_OUT, num_kept=4, batch_rows=2)
    fill_cache(tmp_path / "one", Asked(toys / "llama", another_run), rows, HELD_OUT, num_kept=4, batch_rows=2)
    assert at_work == 3
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "alone")
    fill_cache(
        tmp_path / "one",
        Asked(toys / "llama", lambda: pytest.fail("the cache was there")),
        rows,
        HELD_OUT,
        num_kept=4,
        batch_rows=2,
    )
    assert names(tmp_path) == ["alone", "one"]


def test_a_cache_that_is_interrupted_is_continued_to_the_same_bytes(toys, tmp_path):
    rows = token_ids(length=8, batch=7).int()
    asked = []

    def interrupt_third():
        asked.append(len(asked))
        if len(asked) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        fill_cache(tmp_path / "one", Asked(toys / "llama", interrupt_third), rows, HELD_OUT, num_kept=4, batch_rows=2)
    assert names(tmp_path) == ["one.partial"]
    (note,) = caught.value.__notes__
    assert note.startswith(f"kept: {tmp_path}/one.partial (a teacher's logits, 0.0 MB)")
    with (tmp_path / "one.partial" / "ids").open("ab") as torn:
        torn.write(b"half a row")
    fill_cache(
        tmp_path / "one",
        Asked(toys / "llama", lambda: asked.append(len(asked))),
        rows,
        HELD_OUT,
        num_kept=4,
        batch_rows=2,
    )
    assert len(asked) == 3 + 2, "four of seven rows were there: two batches are left"
    fill_cache(tmp_path / "alone", Asked(toys / "llama", lambda: None), rows, HELD_OUT, num_kept=4, batch_rows=2)
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "alone")


def test_a_cache_that_is_interrupted_at_once_leaves_nothing(toys, tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill_cache(
            tmp_path / "one",
            Asked(toys / "llama", interrupt),
            token_ids(length=8, batch=6).int(),
            HELD_OUT,
            num_kept=4,
            batch_rows=2,
        )
    assert names(tmp_path) == []


# peft asks transformers by the old name
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")
def test_adapters_are_merged_into_a_plain_checkpoint(toys, tmp_path):
    pytest.importorskip("peft")
    heal(toys, tmp_path / "lora", lora_r=2, learning_rate=1e-2)
    touched = changed(toys, tmp_path / "lora")
    assert "model.layers.0.self_attn.diff_lambda.lambda_q1" in touched
    assert "model.layers.0.self_attn.sub_norm.weight" in touched
    assert not {name for name in touched if "layernorm" in name or "embed" in name}
    delta = weights(tmp_path / "lora")["model.layers.0.mlp.up_proj.weight"].double()
    delta -= weights(toys / "v1")["model.layers.0.mlp.up_proj.weight"].double()
    singular = torch.linalg.svdvals(delta)
    assert singular[1] > 1e-3 * singular[0] and singular[2] < 1e-3 * singular[0]  # rank 2, up to float32 rounding


def test_a_callers_model_and_callbacks_are_used(toys, tmp_path):
    model = load_student(toys / "v1")
    steps = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            steps.append((state.global_step, model))

    heal(toys, tmp_path / "out", arguments={"model": model, "callbacks": [Count()]})
    assert [step for step, _ in steps] == [1, 2, 3, 4, 5, 6] and steps[0][1] is model
    for name, tensor in weights(tmp_path / "out").items():
        assert torch.equal(tensor, model.state_dict()[name]), name


class Spoil(TrainerCallback):
    def __init__(self, steps_done):
        self.steps_done = steps_done

    def on_step_begin(self, args, state, control, model, **kwargs):
        if state.global_step == self.steps_done:
            model.model.norm.weight.data[0] = float("nan")


def test_nan_stops_with_one_message_and_the_last_checkpoint_stays(toys, tmp_path):
    with pytest.raises(ConversionError, match=r"^step 5: the loss or its gradient is NaN") as caught:
        heal(toys, tmp_path / "out", save_steps=2, arguments={"callbacks": [Spoil(4)]})
    assert "\n" not in str(caught.value) and "stays in" in str(caught.value)
    assert not (tmp_path / "out").exists()
    kept = tmp_path / ".out.healing" / "trainer" / "checkpoint-4"
    assert all(tensor.isfinite().all() for tensor in weights(kept).values())


def test_nan_before_the_first_checkpoint_leaves_nothing(toys, tmp_path):
    with pytest.raises(ConversionError, match=r"look for NaN in the checkpoint$"):
        heal(toys, tmp_path / "out", arguments={"callbacks": [Spoil(0)]})
    assert names(tmp_path) == []


def test_documents_are_joined_and_cut_into_whole_rows(tmp_path):
    class Letters:
        bos_token_id = 1
        eos_token_id = 2

        def encode(self, text, add_special_tokens, verbose):
            assert not verbose, "a warning about the length would be about documents, which are cut into rows"
            return [ord(letter) for letter in text]

    lines = [{"text": "abc"}, {"input_ids": [7, 8]}, {"text": "defg"}]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "plain.txt").write_text("h\ni\n")
    paths = [tmp_path / "lines.jsonl", tmp_path / "plain.txt"]
    rows = pack_rows(paths, Letters(), 4, vocab_size=128, max_rows=None, file=tmp_path / "rows")
    a = ord("a")
    d = ord("d")
    h = ord("h")
    stream = [1, a, a + 1, a + 2, 2, 7, 8, 1, d, d + 1, d + 2, d + 3, 2, 1, h, 10, h + 1, 10, 2]
    assert rows.tolist() == [stream[start : start + 4] for start in (0, 4, 8, 12)]  # three tokens fill no row
    assert (
        pack_rows(paths, Letters(), 4, vocab_size=128, max_rows=2, file=tmp_path / "two").tolist() == rows[:2].tolist()
    )


@pytest.mark.parametrize("train_rows", range(1, 200))
def test_rows_held_out_scale_with_the_run_and_leave_it_all_it_asked_for(train_rows):
    """Of any text that is long enough: a quarter as many as are trained on, one at least and 32 at most."""
    wanted = rows_to_read(train_rows, None)
    rows = torch.arange(wanted)[:, None]
    train, held_out = split_rows(rows, None)
    assert len(train) == train_rows
    assert len(held_out) == max(1, min(32, train_rows // 4))
    assert torch.cat((held_out, train)).equal(rows)


@pytest.mark.parametrize(
    ("options", "num_rows", "held_out_rows"),
    [
        ({"max_steps": 1}, 40, 1),
        ({"max_steps": 3}, 40, 3),
        ({"max_steps": 5, "per_device_train_batch_size": 8}, 60, 10),
        ({"max_steps": -1}, 12, 2),  # once through the data: ten rows are left, two whole batches
        ({"max_steps": 4}, 6, 1),
        ({"max_steps": 2, "held_out_rows": 7}, 40, 7),
        ({"max_steps": 2, "held_out_rows": 32}, 40, 32),
    ],
)
def test_short_runs_heal_and_say_how_many_rows_they_measured_on(toys, tmp_path, options, num_rows, held_out_rows):
    data = write_training_rows(tmp_path / "data.jsonl", num_rows)
    report = heal(toys, tmp_path / "out", **({"held_out_rows": None} | options), arguments={"data": data})
    expected = {"text": "first rows of the data", "rows": held_out_rows}
    assert report.record["healing"][0]["held_out"] == expected


def test_options_are_recorded_with_the_rate_that_was_used():
    recorded = json.loads(json.dumps(HealingOptions(max_steps=3).recorded()))
    assert recorded["learning_rate"] == HealingOptions().rate and recorded["stage"] == "kl"
