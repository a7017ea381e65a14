"""What a log shows of a long run where there is no terminal."""

import pytest
from transformers import TrainerState

from conversion.console import progress
from conversion.healing.callbacks import Progress


@pytest.fixture
def clock(monkeypatch):
    """Moves the time by hand, in seconds."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_log_has_a_line_per_minute_with_the_time_left(clock, capsys):
    with progress.step_progress() as update:
        for step in range(11):
            update(step, 40)
            clock[0] += 15.0
    # A step takes 15 seconds: after 4 and 8 of 40, 36 and 32 are left.
    assert capsys.readouterr().err.splitlines() == [
        "healing, step 4 of 40: 10%, about 0:09:00 left",
        "healing, step 8 of 40: 20%, about 0:08:00 left",
    ]


def test_log_of_a_resumed_run_counts_what_this_run_has_done(clock, capsys):
    with progress.step_progress() as update:
        update(50, 100)
        clock[0] += 60.0
        update(60, 100)
    assert capsys.readouterr().err == "healing, step 60 of 100: 60%, about 0:04:00 left\n"


def test_log_names_layer_and_stage(clock, capsys):
    with progress.layer_progress() as update:
        update(0, 4, "copy", 0.0)
        clock[0] += 90.0
        update(2, 4, "copy", 0.0)
    assert capsys.readouterr().err == "calibrating layer 3 of 4, copy: 50%, about 0:01:30 left\n"


def test_log_of_a_choice_counts_its_layers_and_the_measurement_apart_from_the_calibration(clock, capsys):
    """80 seconds per layer and 80 for KL while heads are chosen, then 100 seconds per calibrated layer."""
    with progress.layer_progress() as update:
        update(0, 3, "choice", 0.0)
        for layer in range(3):
            clock[0] += 80.0
            update(layer, 3, "choice", 1.0)
        clock[0] += 40.0
        update(3, 3, "choice", 0.5)
        clock[0] += 40.0
        update(3, 3, "choice", 1.0)
        update(0, 3, "copy", 0.0)
        clock[0] += 100.0
        update(1, 3, "copy", 0.0)
    assert capsys.readouterr().err.splitlines() == [
        "choosing heads, layer 1 of 3: 25%, about 0:04:00 left",
        "choosing heads, layer 2 of 3: 50%, about 0:02:40 left",
        "choosing heads, layer 3 of 3: 75%, about 0:01:20 left",
        "choosing heads, KL of each: 100%, about 0:00:00 left",
        "calibrating layer 2 of 3, copy: 33%, about 0:03:20 left",
    ]


def test_short_runs_log_nothing(clock, capsys):
    with progress.byte_progress("converting") as update:
        update(0, 0)
        update(10, 100)
        clock[0] += 59.0
        update(100, 100)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("is_first", "told"), [(True, [(3, 9)]), (False, [])])
def test_one_of_several_processes_tells_of_its_steps(is_first, told):
    found = []
    state = TrainerState(global_step=3, max_steps=9, is_world_process_zero=is_first)
    Progress(lambda *steps: found.append(steps)).on_step_end(None, state, None)
    assert found == told
