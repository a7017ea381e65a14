"""The comparison of conversions runs, and its table says what it promises to."""

import json

import compare_conversions
import pytest


@pytest.mark.slow
def test_smoke_run_writes_a_row_a_stage(tmp_path, capsys):
    compare_conversions.main(["--smoke", "--device", "cpu", "--output", str(tmp_path / "new")])
    table = json.loads((tmp_path / "new/conversions.json").read_text())
    names = [row["conversion"] for row in table["rows"]]
    assert names == ["LLaMA", "plain copy, lambda paper", "plain copy, lambda 0.05", *compare_conversions.LADDER]
    original, copy, *others = table["rows"]
    assert original["kl_nats"] == pytest.approx(0, abs=1e-6) and original["agreement"] == 1 and copy["closed"] == 0
    assert all(row["kl_nats"] < copy["kl_nats"] for row in others)
    assert all(value >= 0 for row in others for value in row["lambda"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
