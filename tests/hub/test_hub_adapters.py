"""PEFT on checkpoints loaded by their own code: targets found without being named, the card's snippet in 4 bits."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import modeling_diff
from conversion.hub.card_text import FINE_TUNE, NEW_MODULES


pytest.importorskip("peft", reason="peft is not installed")

HERE = Path(__file__).parent
PROJECTIONS = {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}


@pytest.fixture(params=["v1", "v2"])
def variant(request):
    return request.param


@pytest.fixture
def adapt(tiny_config, variant, tmp_path):
    """`adapt(*arguments)` of `adapter_process.py`, on a checkpoint as wide as bitsandbytes needs it on a CPU."""
    checkpoint = tmp_path / "checkpoint"
    config = tiny_config(variant, hidden_size=64, intermediate_size=64, head_dim=16)
    modeling_diff.DiffLlamaForCausalLM(config).save_pretrained(checkpoint)

    def run(*arguments):
        home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        process = subprocess.run(
            [sys.executable, HERE / "adapter_process.py", checkpoint, *arguments],
            cwd=tmp_path,
            env=inherited | home,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert process.returncode == 0, process.stderr[-6000:]
        return json.loads(process.stdout.splitlines()[-1])

    return run


def adapted_projections(report):
    return {found[1] for name in report["trained"] if (found := re.search(r"(\w+)\.lora_[AB]\.default", name))}


@pytest.mark.parametrize("order", ["peft_first", "model_first"])
def test_lora_without_targets_finds_every_projection(adapt, order):
    report = adapt(order)
    assert adapted_projections(report) == PROJECTIONS
    assert all(report["trained"].values())


def test_snippet_of_the_card_trains_on_a_base_in_four_bits(adapt, variant, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    (code,) = re.findall(r"```python\n(.*?)```", FINE_TUNE.format(new_modules=NEW_MODULES[variant]), re.DOTALL)
    (tmp_path / "snippet.py").write_text(code)
    report = adapt("model_first", str(tmp_path / "snippet.py"))
    assert {name.rpartition(".")[2] for name in report["quantized"]} == PROJECTIONS
    assert adapted_projections(report) == PROJECTIONS
    whole = {name for name in report["trained"] if "modules_to_save" in name}
    assert len(whole) == {"v1": 2 * 5, "v2": 2}[variant]
    assert all(report["trained"].values())
