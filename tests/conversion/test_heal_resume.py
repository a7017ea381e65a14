"""SIGKILL within a healing, and --resume: the same bytes as without it; another run's work is not taken up."""

import json
import multiprocessing
import os
import signal

import pytest
from healing_toys import heal, make_toys, weights
from saved_checkpoints import names
from transformers import TrainerCallback

from conversion import FilesError
from conversion.target import kept_work


PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "pytest", "conversion.heal"])
# All that has a state: two optimisers, a path of lambda and epsilon, an order of rows that is not the first epoch's.
RUNS = {
    "muon": ("v1-neutral", {"optimizer": "muon", "lambda_mode": "paper"}),
    "adamw": ("v2", {"optimizer": "adamw", "micro_rows": 2}),
}
LENGTH = {"steps": 13, "checkpoints": 4, "evaluations": 3}  # saved every four steps; nine steps are an epoch


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


def test_another_runs_work_is_refused_with_resume_and_replaced_without(toys, tmp_path):
    interrupted(toys, tmp_path / "out")
    with pytest.raises(FilesError, match="another run, with different options"):
        heal(toys, tmp_path / "out", steps=7, arguments={"resume": True})
    heal(toys, tmp_path / "out", steps=7)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_half_written_trainer_checkpoint_is_passed_over(toys, tmp_path):
    interrupted(toys, tmp_path / "out")
    half = tmp_path / ".out.healing" / "trainer" / "checkpoint-5"
    half.mkdir(parents=True)
    (half / "trainer_state.json").write_text(json.dumps({"global_step": 5})[:-4])
    heal(toys, tmp_path / "out", arguments={"resume": True})
    heal(toys, tmp_path / "whole")
    first, second = weights(tmp_path / "out"), weights(tmp_path / "whole")
    assert all((first[name] == second[name]).all() for name in second)
