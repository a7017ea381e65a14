"""Without peft or matplotlib an example ends in one line with the command that installs what is missing."""

import subprocess
import sys
from pathlib import Path

import pytest


EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPT = """
import runpy, sys
sys.modules[sys.argv[1]] = None  # as if it were not installed
for name in sys.argv[2:]:
    try:
        sys.argv = [name]
        sys.path.insert(0, {folder!r} + "/" + name.split("/")[0])
        runpy.run_path({folder!r} + "/" + name + ".py", run_name="__main__")
    except SystemExit as error:
        print(error.code)
"""


@pytest.mark.parametrize(
    ("package", "examples"),
    [
        ("peft", ["scripts/finetune_lora", "studies/compare_lora"]),
        ("vllm", ["benchmarks/serving"]),
        ("matplotlib", ["studies/view_attention", "studies/score_heads", "studies/compare_models"]),
    ],
)
def test_missing_package_is_named_in_one_line(package, examples):
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(folder=str(EXAMPLES)), package, *examples],
        cwd=EXAMPLES.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    lines = process.stdout.splitlines()
    assert len(lines) == len(examples)
    for line, name in zip(lines, examples, strict=True):
        assert line.startswith(f"{name.partition('/')[2]}: ") and line.endswith(f"pip install {package}")
