"""The two examples run as their docstrings say, in their smallest form, and say in one line what is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


EXAMPLES = Path(__file__).parents[2] / "examples"
TINY_LLAMA = EXAMPLES / "assets" / "tiny-llama"


def run(tmp_path, name, *arguments):
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)


@pytest.mark.slow
def test_view_attention_writes_a_page_and_figures(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    converted = tmp_path / "v2"
    convert = [sys.executable, "-m", "conversion", "convert", str(TINY_LLAMA), str(converted), "--variant", "v2"]
    subprocess.run(convert, cwd=EXAMPLES.parent, check=True, capture_output=True, timeout=300)
    result = run(tmp_path, "view_attention.py", str(TINY_LLAMA), str(converted), "--smoke", "--mark", "4821")
    assert result.returncode == 0, result.stderr[-3000:]
    names = {path.name for path in (tmp_path / "out/attention").iterdir()}
    figures = {"heads_tiny-llama", "heads_v2", "maps_v2", "mean"}
    assert names == {"attention.html"} | {f"{name}.{suffix}" for name in figures for suffix in ("png", "svg")}


@pytest.mark.slow
def test_score_heads_writes_scores_and_ablations(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    result = run(tmp_path, "score_heads.py", "--smoke", "--ablate", "1")
    assert result.returncode == 0, result.stderr[-3000:]
    scores = json.loads((tmp_path / "out/heads/scores.json").read_text())
    assert len(scores) == 5 * 8 and max(score["induction"] for score in scores) > 0.5
    assert len(json.loads((tmp_path / "out/heads/ablation.json").read_text())) == 4
    assert (tmp_path / "out/heads/scores.png").stat().st_size > 5000


@pytest.mark.slow
def test_view_attention_says_in_one_line_what_is_wrong(tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).symlink_to(TINY_LLAMA / name)
    for arguments, message in (
        ((str(bare),), "no tokenizer can be loaded"),
        (("--text", " "), "text is empty"),
        (("--layers", "5"), "layers=[5]: there are 5 layers"),
        (("--text", "word " * 600), "max_position_embeddings=512"),
    ):
        result = run(tmp_path, "view_attention.py", *arguments)
        assert result.returncode == 2 and message in result.stderr.splitlines()[-1], result.stderr[-3000:]
