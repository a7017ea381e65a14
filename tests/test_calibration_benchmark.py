"""The benchmark of the calibration: what it asks of an older checkout, and when it compares times."""

import json

import calibration
import calibration_run
import pytest
import torch
from calibration_run import StageClock, known_options
from test_examples import EXAMPLES, run_example


def checkout(loss: float, seconds: float) -> dict:
    stages = {"pairing": seconds, "streams and files": 1.0}
    metrics = {"loss_nats": loss, "source_loss_nats": 3.0, "kl_nats": 0.1, "greedy_agreement": 0.9}
    estimate = {"estimated_seconds": 2.0, "estimate_over_measured": 1.0}
    return {"stages": stages, "seconds": seconds + 1, "peak_bytes": 10**9, "left_out": []} | metrics | estimate


def record(loss: float) -> dict:
    difference = {"nats": loss - 3.1, "standard_error": 0.001}
    checkouts = {"this checkout": checkout(loss, 1.0), "against": checkout(3.1, 4.0)}
    return {"checkouts": checkouts, "loss_above_against": difference}


@pytest.mark.slow
def test_benchmark_calibration_against_itself_ends_at_the_same_loss(tmp_path):
    root = EXAMPLES.parent
    printed = run_example(
        tmp_path, "benchmarks/calibration.py", "--smoke", "--against", str(root), "--output", "out", "--rounds", "2"
    )
    found = json.loads((tmp_path / "out/calibration.json").read_text())
    assert found["loss_above_against"]["nats"] == 0
    for made in found["checkouts"].values():
        assert set(made["stages"]) == {"pairing", "refit", "streams and files"}
        assert all(seconds > 0 for seconds in made["stages"].values())
        assert sum(made["stages"].values()) == pytest.approx(made["seconds"])
        assert made["peak_bytes"] > 10**8 and made["estimated_seconds"] > 0
    assert "pairing (s)" in printed and "estimated:" in printed


def test_times_are_not_compared_where_the_loss_is_worse(capsys):
    with pytest.raises(SystemExit, match="times are not compared"):
        calibration.print_table(record(loss=3.1 + 0.004))
    assert "(s)" not in capsys.readouterr().out
    calibration.print_table(record(loss=3.1 + 0.002))
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "all (s)" in line)
    assert line.split()[-3:] == ["2.0", "5.0", "0.40"]


def test_the_error_of_a_loss_difference_is_that_of_pairs():
    """Windows differ by much more than the two models do."""
    theirs = torch.tensor([1.0, 5.0, 9.0])
    ours = theirs + torch.tensor([0.1, 0.2, 0.3])
    found = calibration.loss_difference({"loss_nats": ours}, {"loss_nats": theirs})
    assert found["nats"] == pytest.approx(0.2, abs=1e-6)  # float32
    assert found["standard_error"] == pytest.approx(0.1 / 3**0.5, abs=1e-6)


def test_stage_clock_adds_up_layers_and_leaves_out_what_lies_between(monkeypatch):
    times = iter([10.0, 11.0, 13.0, 20.0, 24.0])
    monkeypatch.setattr(calibration_run.time, "process_time", lambda: next(times))
    clock = StageClock()
    for layer, done in ((0, 0.0), (0, 0.5), (0, 1.0), (1, 0.0), (1, 1.0)):
        clock(layer, 2, "local", done)
    assert clock.seconds() == {"local": 3.0 + 4.0}


def test_an_older_checkout_is_not_asked_what_it_does_not_know(monkeypatch):
    def older(source, output, variant="v1", *, calibration=None, stages=None): ...

    given = {"calibration": "text.txt", "stages": ["refit"], "lambda_floor": 0.0}
    assert known_options(given) == given
    monkeypatch.setattr(calibration_run, "convert_checkpoint", older)
    assert known_options(given) == {"calibration": "text.txt", "stages": ["refit"]}


def test_a_folder_that_is_no_checkout_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration.sys, "executable", "/bin/false")
    with pytest.raises(ValueError, match=f"{tmp_path}: its conversion failed"):
        calibration.run(tmp_path, tmp_path, tmp_path / "out", {})
