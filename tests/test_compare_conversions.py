"""The comparison of conversions runs, and its table says what it promises to."""

import importlib.util
import json
from pathlib import Path

import pytest


def load_example():
    path = Path(__file__).parents[1] / "examples" / "compare_conversions.py"
    spec = importlib.util.spec_from_file_location("compare_conversions", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_smoke_run_writes_a_row_a_stage(tmp_path, capsys):
    example = load_example()
    example.main(["--smoke", "--device", "cpu", "--output", str(tmp_path / "table.json")])
    table = json.loads((tmp_path / "table.json").read_text())
    names = [row["conversion"] for row in table["rows"]]
    assert names == ["LLaMA", "plain copy, lambda paper", "plain copy, lambda 0.05", *example.LADDER]
    original, copy, *others = table["rows"]
    assert original["kl_nats"] == pytest.approx(0, abs=1e-6) and original["agreement"] == 1 and copy["closed"] == 0
    assert all(row["kl_nats"] < copy["kl_nats"] for row in others)
    assert all(value >= 0 for row in others for value in row["lambda"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
