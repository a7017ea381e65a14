"""A few commands stopped by signals at random moments; `stopped_runs.py` runs many."""

import signal

import pytest
import stopped_runs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return stopped_runs.make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize("name", stopped_runs.COMMANDS)
def test_a_stopped_command_run_again_ends_with_equal_weights_and_does_nothing_twice(inputs, tmp_path, name):
    counts = {signal.SIGKILL: 2, signal.SIGINT: 1, signal.SIGHUP: 1}
    found = stopped_runs.stop_many(inputs, tmp_path, name, counts, earliest=0.4)
    assert sum(found.values()) == sum(counts.values())
