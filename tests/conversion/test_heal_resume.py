"""SIGKILL within a healing, and --resume: the same bytes as without it; another run's work is not taken up."""

import json
import multiprocessing
import os
import re
import shutil
import signal

import pytest
from healing_toys import heal, make_toys, weights, write_training_rows
from random_llamas import edit_json
from saved_checkpoints import names
from transformers import TrainerCallback

from conversion import FilesError
from conversion.checkpoint.kept_work import kept_work


PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "pytest", "conversion.heal"])
# All that has a state: two optimizers, a path of lambda and epsilon, an order of rows that is not the first epoch's.
RUNS = {
    "muon": ("v1-neutral", {"optimizer": "muon", "lambda_mode": "paper"}),
    "adamw": ("v2", {"optimizer": "adamw", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
}
LENGTH = {"max_steps": 13, "save_steps": 4, "eval_steps": 5}  # saved every four steps; nine steps are an epoch


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    return make_toys(tmp_path_factory.mktemp("toys"))


class Kill(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 10:
            os.kill(os.getpid(), signal.SIGKILL)


class Stop(TrainerCallback):
    def __init__(self, steps_done):
        self.steps_done = steps_done

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.steps_done:
            raise KeyboardInterrupt


class Steps(TrainerCallback):
    def __init__(self):
        self.done = []

    def on_step_end(self, args, state, control, **kwargs):
        self.done.append(state.global_step)


def victim(toys, output, run):
    student, options = RUNS[run]
    heal(toys, output, student, arguments={"callbacks": [Kill()]}, **LENGTH, **options)


@pytest.mark.parametrize("run", RUNS)
def test_killed_and_resumed_is_the_uninterrupted_run_bit_for_bit(toys, tmp_path, run):
    process = PROCESSES.Process(target=victim, args=(toys, tmp_path / "out", run))
    process.start()
    process.join(240)
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    student, options = RUNS[run]
    steps = Steps()
    resumed = heal(
        toys, tmp_path / "out", student, arguments={"resume": True, "callbacks": [steps]}, **LENGTH, **options
    )
    assert steps.done == [9, 10, 11, 12, 13]
    whole = heal(toys, tmp_path / "whole", student, **LENGTH, **options)
    assert resumed.table == whole.table
    for name in ("model.safetensors", "config.json", "README.md"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def interrupted(toys, output, steps_done=3, **options):
    """By default behind a Trainer checkpoint, of the second step."""
    with pytest.raises(KeyboardInterrupt):
        heal(toys, output, arguments={"callbacks": [Stop(steps_done)]}, **options)


def test_what_a_run_can_go_on_from_stays_and_no_more(toys, tmp_path):
    interrupted(toys, tmp_path / "out", steps_done=1)
    assert names(tmp_path) == [] == kept_work(tmp_path / "out")
    interrupted(toys, tmp_path / "out")
    assert names(tmp_path) == [".out.healing"]
    assert kept_work(tmp_path / "out") == [tmp_path / ".out.healing"]


@pytest.mark.parametrize("name", ["n" * 250, "ü" * 127])
def test_any_legal_name_will_do(toys, tmp_path, name):
    interrupted(toys, tmp_path / name)
    (kept,) = kept_work(tmp_path / name)
    assert names(tmp_path) == [kept.name]
    heal(toys, tmp_path / name, arguments={"resume": True})
    assert names(tmp_path) == [name]


def test_another_runs_work_is_refused_and_replaced_on_request(toys, tmp_path):
    interrupted(toys, tmp_path / "out")
    for resume in (None, True):
        with pytest.raises(FilesError, match=r"\(checkpoints, .* another run, with different options; .*--no-resume"):
            heal(toys, tmp_path / "out", max_steps=7, arguments={"resume": resume})
    heal(toys, tmp_path / "out", max_steps=7, arguments={"resume": False})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def other_bytes(path):
    """Of the same size and time; the last digit of a file of JSON lines becomes another."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    place = max(data.rfind(digit) for digit in b"0123456789")
    data[place] = ord("1") if data[place] != ord("1") else ord("2")
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    ("file", "part"),
    [
        ("data.jsonl", "data"),
        ("held_out.jsonl", "held-out text"),
        ("v1/model.safetensors", "checkpoint"),
        ("v1/config.json", "checkpoint"),
        ("llama/model.safetensors", "teacher"),
    ],
)
def test_work_is_another_runs_by_content_whatever_size_and_time_say(toys, tmp_path, file, part):
    """Refused before anything is read of a file that is damaged by the change."""
    for name in ("llama", "v1"):
        shutil.copytree(toys / name, tmp_path / name)
    shutil.copy(toys / "data.jsonl", tmp_path)
    arguments = {"held_out": write_training_rows(tmp_path / "held_out.jsonl", num_rows=4, seed=8)}
    with pytest.raises(KeyboardInterrupt):
        heal(tmp_path, tmp_path / "out", arguments=arguments | {"callbacks": [Stop(3)]})
    if file.endswith("config.json"):
        edit_json(tmp_path / file, rms_norm_eps=1e-3)
    else:
        other_bytes(tmp_path / file)
    with pytest.raises(FilesError, match=f"another run, with different {part};"):
        heal(tmp_path, tmp_path / "out", arguments=arguments)


@pytest.mark.parametrize("name", ["identity.json", "rows.json"])
def test_a_cut_state_is_named_with_the_way_out(toys, tmp_path, name):
    interrupted(toys, tmp_path / "out")
    path = tmp_path / ".out.healing" / name
    path.write_text(path.read_text()[:-3])
    with pytest.raises(FilesError, match=rf"{re.escape(str(path))}: damaged, .*discard its work \(--no-resume\)"):
        heal(toys, tmp_path / "out")
    heal(toys, tmp_path / "out", arguments={"resume": False})
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "scheduler.pt"])
def test_a_trainer_checkpoint_that_is_cut_is_passed_over(toys, tmp_path, file):
    interrupted(toys, tmp_path / "out", steps_done=5, save_steps=2)
    path = tmp_path / ".out.healing" / "trainer" / "checkpoint-4" / file
    path.write_bytes(path.read_bytes()[:-100])
    steps = Steps()
    heal(toys, tmp_path / "out", save_steps=2, arguments={"callbacks": [steps]})
    assert steps.done == [3, 4, 5, 6]


def test_stopped_while_the_output_is_written_goes_on_without_a_step(toys, tmp_path, monkeypatch):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as caught:
        patch.setattr("conversion.checkpoint.writer.swap_in", stop)
        heal(toys, tmp_path / "out")
    assert names(tmp_path) == [".out.healing"]
    (note,) = caught.value.__notes__
    assert note.startswith(f"kept: {tmp_path}/.out.healing (checkpoints, ")
    steps = Steps()
    heal(toys, tmp_path / "out", arguments={"callbacks": [steps]})
    assert steps.done == []
    heal(toys, tmp_path / "whole")
    first, second = weights(tmp_path / "out"), weights(tmp_path / "whole")
    assert all((first[name] == second[name]).all() for name in second)


def test_a_half_written_trainer_checkpoint_is_passed_over(toys, tmp_path):
    interrupted(toys, tmp_path / "out")
    half = tmp_path / ".out.healing" / "trainer" / "checkpoint-5"
    half.mkdir(parents=True)
    (half / "trainer_state.json").write_text(json.dumps({"global_step": 5})[:-4])
    heal(toys, tmp_path / "out", arguments={"resume": True})
    heal(toys, tmp_path / "whole")
    first, second = weights(tmp_path / "out"), weights(tmp_path / "whole")
    assert all((first[name] == second[name]).all() for name in second)
