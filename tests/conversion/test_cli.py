"""The command line: exit codes, one-line errors, JSON, quiet output, and what is left behind when it is stopped."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import run
from healing_toys import CONTEXT, write_training_rows
from random_llamas import random_diffllama, saved

from conversion.calibration.estimate import CalibrationEstimate, Work


ROOT = Path(__file__).parents[2]
V1 = ("--variant", "v1", "--uncalibrated")
# As from a terminal: a suite that runs under nohup, or in the background, hands on signals that are ignored.
SIGNALS = (
    "import signal\n"
    "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "[signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)]\n"
)


@pytest.mark.parametrize("command", ["convert", "heal", "verify", "export", "inspect", "push"])
def test_help_names_every_command_and_argument(command):
    assert command in run("--help").stdout
    assert "--json" in run(command, "--help").stdout


def test_convert_verify_inspect_and_export_agree(tmp_path, llama):
    converted = run("convert", llama, tmp_path / "v1", *V1, "--lambda-init", "paper", "--layers", "0-1", "--seed", 3)
    assert converted.exit_code == 0, converted.stderr
    assert "healed before use" in converted.stdout and "no tokenizer" in converted.stdout
    verified = run("verify", tmp_path / "v1", "--against", llama)
    assert verified.exit_code == 0, verified.stdout
    assert "liveness" in verified.stdout and "pairs shuffled" in verified.stdout
    inspected = run("inspect", tmp_path / "v1", "--json")
    description = json.loads(inspected.stdout)
    assert description["lambda"] == {"0": 0.2, "1": pytest.approx(0.355509, abs=1e-6)}
    assert (description["heads"], description["map_dim"], description["conversion"]["options"]["seed"]) == (2, 8, 3)
    shown = run("inspect", tmp_path / "v1").stdout
    assert "diff_llama" in shown and "conversion.source" in shown
    assert "…" not in shown and "{" not in shown, "nothing is cut off, and JSON is for --json"
    exported = run("export", tmp_path / "v1", tmp_path / "theirs", "--json")
    assert exported.exit_code == 0, exported.stderr
    assert json.loads(run("inspect", tmp_path / "theirs", "--json").stdout)["model_type"] == "diffllama"


def test_names_with_brackets_are_shown_whole(tmp_path, llama):
    """Not taken for the markup of the terminal's library."""
    output = tmp_path / "out [v1]"
    assert f"wrote {output} (" in run("convert", llama, output, *V1).stdout
    assert "out [v1] (parity)" in run("verify", output).stdout
    renamed = (tmp_path / "llama").rename(tmp_path / "source [red]")
    run("convert", renamed, tmp_path / "v1", *V1)
    assert "source [red]" in run("inspect", tmp_path / "v1").stdout


def test_v2_options_are_recorded_and_damage_fails_verification(tmp_path, llama):
    result = run("convert", llama, tmp_path / "v2", "--variant", "v2", "--lambda", 0.2, "--layers", 1, "--json")
    assert json.loads(result.stdout)["record"]["options"]["layers"] == [1]
    assert json.loads(run("inspect", tmp_path / "v2", "--json").stdout)["lambda"] == {
        "1": pytest.approx(0.2, abs=1e-6)
    }
    broken = tmp_path / "v2" / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1] + b"x")
    assert run("verify", tmp_path / "v2").exit_code == 1


def test_lists_are_read_and_a_dry_run_writes_nothing(tmp_path, llama):
    result = run("convert", llama, tmp_path / "v1", *V1, "--lambda-init", "0.02,0.3", "--dry-run", "--json")
    assert json.loads(result.stdout)["record"]["options"]["lambda_init"] == [0.02, 0.3]
    assert not (tmp_path / "v1").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--variant", "v3"],
        ["--max-shard-size", "many"],
        ["--max-shard-size", "0GB"],
        ["--layers", "2-1"],
        ["--lambda-init", "small"],
        ["--seed", "x"],
        ["--no-such-option"],
    ],
)
def test_usage_errors_exit_2(tmp_path, llama, arguments):
    assert run("convert", llama, tmp_path / "out", *V1, *arguments).exit_code == 2
    assert not (tmp_path / "out").exists()


def test_bad_input_exits_1_and_target_faults_exit_3_in_one_line(tmp_path, llama):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    for arguments, code in ((("nowhere", "out"), 1), ((llama, tmp_path / "full"), 3), ((llama, llama), 3)):
        result = run("convert", *arguments, "--variant", "v2")
        assert result.exit_code == code, result.stderr
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
        assert "Traceback" not in result.stderr
    assert (tmp_path / "full" / "file").read_text() == "mine"


def test_heal_trains_reports_and_goes_on(tmp_path, llama):
    run("convert", llama, tmp_path / "v1", *V1)
    data = write_training_rows(tmp_path / "rows.jsonl")
    held_out = write_training_rows(tmp_path / "held_out.jsonl", num_rows=4, seed=8)
    command = ["heal", tmp_path / "v1", tmp_path / "healed", "--teacher", llama, "--data", data]
    command += ["--held-out", held_out, "--max-length", CONTEXT, "--per-device-train-batch-size", 4]
    command += ["--max-steps", 3, "--lambda-floor", 0.04]
    shown = run(*command)
    assert shown.exit_code == 0, shown.stderr
    assert "recovered" in shown.stdout and "lambda per layer" in shown.stdout
    record = json.loads((tmp_path / "healed" / "conversion.json").read_text())["healing"][0]
    assert (record["tokens"], record["options"]["lambda_floor"]) == (3 * 4 * CONTEXT, 0.04)
    assert min(record["table"][-1]["lambda"]) >= 0.04 - 1e-7
    again = run(*command)
    assert again.exit_code == 3 and again.stderr.startswith("error: ") and again.stderr.count("\n") == 1
    replaced = run(*command, "--overwrite", "--json")
    assert json.loads(replaced.stdout)["record"]["healing"][0]["table"] == record["table"]


def test_heal_refuses_in_one_line(tmp_path, llama):
    run("convert", llama, tmp_path / "v1", *V1)
    data = write_training_rows(tmp_path / "rows.jsonl")
    result = run("heal", tmp_path / "v1", tmp_path / "healed", "--data", data, "--max-length", CONTEXT)
    assert result.exit_code == 1 and "learns from a teacher" in result.stderr and result.stderr.count("\n") == 1
    assert run("heal", tmp_path / "v1", tmp_path / "healed", "--data", data, "--lambda", "high").exit_code == 2
    assert not (tmp_path / "healed").exists()


def test_verbose_shows_the_traceback(tmp_path):
    assert "Traceback" in run("convert", tmp_path / "nowhere", tmp_path / "out", "--verbose").stderr


def test_unexpected_errors_are_one_line_too(tmp_path, llama, monkeypatch):
    monkeypatch.setattr("conversion.convert.convert_checkpoint", lambda *a, **k: {}["surprise"])
    result = run("convert", llama, tmp_path / "out")
    assert result.exit_code == 1 and "unexpected KeyError" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("command", ["convert", "export", "heal"])
@pytest.mark.parametrize("kept", [None, "partial", "calibration", "healing"])
def test_interrupt_exits_130_and_names_what_stays(tmp_path, monkeypatch, command, kept):
    def interrupted(*arguments, **options):
        if kept:
            (tmp_path / f".out.{kept}").mkdir()
            (tmp_path / f".out.{kept}" / "work").write_bytes(bytes(1_234_567))
        raise KeyboardInterrupt

    monkeypatch.setattr(f"conversion.{command}.{command}_checkpoint", interrupted)
    arguments = ["from", str(tmp_path / "out"), *(["--data", "some text"] if command == "heal" else [])]
    result = run(command, *arguments)
    assert result.exit_code == 130
    left = "nothing half done was left"
    if kept:
        what = {"partial": "finished shards", "calibration": "finished layers", "healing": "checkpoints"}[kept]
        again = shlex.join([command, "--resume", *arguments])
        left = f"kept: {tmp_path}/.out.{kept} ({what}, 1.2 MB)"
        left += f"; to continue: diff-llama {again}; --no-resume discards it"
    assert result.stderr == f"interrupted; {left}\n"


@pytest.mark.parametrize(
    ("seconds", "terminal", "options", "asked"),
    [
        (3601, True, [], True),
        (3599, True, [], False),
        (3601, False, [], False),
        (3601, True, ["--yes"], False),
        (3601, True, ["--json"], False),
    ],
)
def test_long_calibration_is_asked_about_on_a_terminal_alone(
    tmp_path, llama, monkeypatch, seconds, terminal, options, asked
):
    rows = write_training_rows(tmp_path / "rows.jsonl", num_rows=32)
    estimate = CalibrationEstimate(work=Work(), memory_bytes=1, disk_bytes=1, seconds=seconds)
    monkeypatch.setattr("conversion.calibration.step.estimate_calibration", lambda *arguments, **options: estimate)
    monkeypatch.setattr(
        "conversion.console.display.sys", SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: terminal))
    )
    questions = []
    monkeypatch.setattr(
        "conversion.console.display.typer.confirm", lambda *question, **options: questions.append(question)
    )
    command = ["convert", llama, tmp_path / "v1", "--variant", "v1", "--calibration", rows, "--stages", "copy"]
    result = run(*command, "--calibration-tokens", 512, *options)
    assert "about 1 hour on this machine's" in result.stderr, "printed in any case, before the work"
    assert bool(questions) == asked
    assert result.exit_code == asked and (tmp_path / "v1").exists() != asked
    assert not asked or "not started, and nothing was written" in result.stderr


def test_inspect_reads_llama_and_diffllama(tmp_path, llama):
    assert json.loads(run("inspect", llama, "--json").stdout)["parameters"] == 21664
    theirs = saved(random_diffllama(), tmp_path / "theirs")
    assert json.loads(run("inspect", theirs, "--json").stdout)["variant"] is None


@pytest.mark.parametrize("stop", ["os.kill(os.getpid(), signal.SIGINT)", "sys.exit(130)"])
def test_a_stopped_run_ends_though_a_thread_would_not(stop):
    """As one whose start the signal has interrupted, before it was told whom to wait for."""
    script = (
        f"{SIGNALS}import os, sys, threading; from conversion import cli\n"
        "def app():\n"
        "    threading.Thread(target=threading.Event().wait).start()\n"
        f"    print('shown'); {stop}\n"
        "cli.app = app; cli.main()"
    )
    process = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert (process.returncode, process.stdout) == (130, "shown\n")


def test_nothing_is_said_where_nothing_is_wrong():
    """By what training imports: PEFT, and with it bitsandbytes."""
    pytest.importorskip("peft")
    script = (
        "from conversion import cli\ndef imports():\n    import conversion.heal, peft\ncli.app = imports; cli.main()"
    )
    process = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300, check=True
    )
    assert process.stdout + process.stderr == ""


def test_commands_do_not_wait_for_what_only_training_needs():
    script = (
        "import sys, conversion.cli\n"
        "print([name for name in ('transformers.trainer', 'peft', 'bitsandbytes') if name in sys.modules])"
    )
    process = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300, check=True
    )
    assert process.stdout == "[]\n"


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_cleans_up_and_says_so_whatever_signals_follow(tmp_path, llama, name):
    """Stopped for certain while writing, by itself at the first progress report; then again within the clean-up."""
    script = (
        f"{SIGNALS}import os, shutil, sys; from conversion import cli, convert\n"
        "original = convert.convert_checkpoint\n"
        f"stop = lambda *a: os.kill(os.getpid(), signal.{name})\n"
        "remove = shutil.rmtree; shutil.rmtree = \\\n"
        "    lambda *a, **k: [stop(), remove(*a, **k), stop()] if sys.exception() else remove(*a, **k)\n"
        "convert.convert_checkpoint = lambda *a, **k: original(*a, **{**k, 'progress': stop}); cli.main()"
    )
    process = subprocess.run(
        [sys.executable, "-c", script, "convert", llama, str(tmp_path / "out"), "--variant", "v2"],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 128 + signal.Signals[name], process.stderr
    said = "interrupted" if name == "SIGINT" else f"stopped by {name}"
    assert process.stderr == f"{said}; nothing half done was left\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama"]
