"""The one command for a GPU, as far as a CPU shows it: parts keep to their time, ratios are read off, losses fall."""

import argparse
import json
import os
import time
from pathlib import Path

import pytest


gpu_report = pytest.importorskip("gpu_report", reason="peft is not installed", exc_type=ImportError)


@pytest.mark.parametrize(
    ("code", "outcome"), [("print('said')", "ok"), ("raise SystemExit(3)", "failed with exit code 3")]
)
def test_part_says_how_it_ended(code, outcome, tmp_path):
    assert gpu_report.run(["-c", code], tmp_path / "part.log", 60) == outcome


def test_part_that_takes_too_long_is_stopped_with_all_that_it_started(tmp_path):
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'])\n"
        "print(child.pid, flush=True)\ntime.sleep(300)\n"
    )
    start = time.monotonic()
    assert gpu_report.run(["-c", code], tmp_path / "part.log", 3) == "stopped after 3 s"
    assert time.monotonic() - start < 60
    child = int((tmp_path / "part.log").read_text().split()[0])
    for _ in range(100):  # an orphan is gone as soon as it is reaped
        if not Path(f"/proc/{child}").exists() or "(zombie)" in Path(f"/proc/{child}/status").read_text():
            return
        time.sleep(0.1)
    os.kill(child, 9)
    pytest.fail("the part's own process outlived it")


def test_ratios_are_read_against_their_limits(tmp_path):
    def row(phase, form, over_same, over_llama):
        return {"phase": phase, "form": form, "ratio_to_same_kernel": over_same, "ratio_to_llama": over_llama}

    rows = [
        row("forward", "triton", 1.4, 2.5),
        row("forward", "triton", 1.3, 1.5),
        row("backward", "triton", 1.2, 1.0),
        row("backward", "four calls", 9.0, 9.0),
    ]
    (tmp_path / "attention_gpu_bfloat16.json").write_text(json.dumps({"rows": rows}))
    seconds = {"decode": {"llama": 1.0, "v1": 1.02, "stock diffllama": 0.9}}
    (tmp_path / "model_time_bfloat16_4096.json").write_text(json.dumps({"seconds": seconds}))
    assert gpu_report.against_limits(tmp_path) == [
        "attention, forward, over LLaMA through the same kernel: 1.300 to 1.400, limit 1.500: kept",
        "attention, backward, over LLaMA through the same kernel: 1.200 to 1.200, limit 1.100: MISSED",
        "attention, forward, over LLaMA's fastest backend: 1.500 to 2.500, limit 2.000: MISSED",
        "model, decode, over LLaMA: 1.020 to 1.020, limit 1.031: kept",
        "model, decode, over transformers' DiffLlama: 1.133 to 1.133, limit 1.000: MISSED",
    ]


def test_ratios_of_an_earlier_run_are_not_told_again(tmp_path, monkeypatch, capsys):
    earlier = tmp_path / "parts" / "model_time_bfloat16_4096.json"
    earlier.parent.mkdir()
    earlier.write_text(json.dumps({"seconds": {"decode": {"llama": 1.0, "v1": 1.02, "stock diffllama": 0.9}}}))
    assert len(gpu_report.against_limits(earlier.parent)) == 2
    monkeypatch.setattr(gpu_report, "run", lambda command, log, seconds: "ok")
    with pytest.raises(SystemExit):
        gpu_report.main(["--smoke", "--device", "cpu", "--output", str(tmp_path), "--parts", "model", "--overwrite"])
    assert json.loads((tmp_path / "report.json").read_text())["limits"] == []
    assert not earlier.exists() and "model, decode" not in capsys.readouterr().out


def test_no_part_may_take_more_than_its_share(tmp_path, monkeypatch, capsys):
    given = []
    monkeypatch.setattr(gpu_report, "SHARES", {"tests": 5, "memory": 1, "lora": 1})
    monkeypatch.setattr(gpu_report, "run", lambda command, log, seconds: given.append(seconds) or "ok")
    arguments = ["--smoke", "--device", "cpu", "--output", str(tmp_path), "--minutes", "1"]
    with pytest.raises(SystemExit) as ended:
        gpu_report.main(arguments)
    assert ended.value.code == 0
    # What a part leaves over of its share of the minute, here all of it, goes to the later ones.
    assert given == pytest.approx([60 * 5 / 7, 60 / 2, 60], rel=0.05)
    record = json.loads((tmp_path / "report.json").read_text())
    assert record["parts"] == {"tests": "ok", "memory": "ok", "lora": "ok"}
    assert "memory: ok" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_every_model_learns():
    models = [("llama", None), ("v1", None), ("v2", None)]
    results = gpu_report.fine_tuning(argparse.Namespace(smoke=True, device="cpu", models=models))
    assert len(results) == 6 and all(run["loss_fell"] for run in results.values())
    # LoRA leaves the base alone: adapters and the few new tensors are all that trains.
    assert results["lora v1 default"]["trainable_parameters"] < results["full v1 default"]["trainable_parameters"] / 2
