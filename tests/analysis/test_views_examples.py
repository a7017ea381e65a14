"""The two examples run as their docstrings say, in their smallest form, and say in one line what is wrong."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_tokenizers import TINY_LLAMA, byte_tokenizer


EXAMPLES = Path(__file__).parents[2] / "examples"


def run(tmp_path, name, *arguments):
    command = [sys.executable, str(EXAMPLES / "studies" / name), *arguments]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)


@pytest.mark.slow
def test_view_attention_writes_a_page_and_figures(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    converted = tmp_path / "v2"
    convert = [
        sys.executable,
        "-m",
        "conversion",
        "convert",
        str(TINY_LLAMA),
        str(converted),
        "--variant",
        "v2",
        "--no-measure",
    ]
    subprocess.run(convert, cwd=EXAMPLES.parent, check=True, capture_output=True, timeout=300)
    models = ("--model", str(TINY_LLAMA), str(converted))
    result = run(tmp_path, "view_attention.py", *models, "--smoke", "--mark", "4821", "--output", "out")
    assert result.returncode == 0, result.stderr[-3000:]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"attention.html", "figures"}
    names = {path.name for path in (tmp_path / "out/figures").iterdir()}
    figures = {"heads_tiny-llama", "heads_v2", "maps_v2", "mean"}
    assert names == {f"{name}.{suffix}" for name in figures for suffix in ("png", "svg")}


@pytest.mark.slow
def test_score_heads_writes_scores_and_ablations(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    result = run(tmp_path, "score_heads.py", "--smoke", "--ablate", "1", "--output", "out")
    assert result.returncode == 0, result.stderr[-3000:]
    scores = json.loads((tmp_path / "out/scores.json").read_text())
    assert len(scores) == 5 * 8 and max(score["induction"] for score in scores) > 0.5
    assert len(json.loads((tmp_path / "out/ablation.json").read_text())) == 4
    assert (tmp_path / "out/scores.png").stat().st_size > 5000


@pytest.fixture
def bare(tmp_path):
    """The small LLaMA without its tokenizer."""
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).symlink_to(TINY_LLAMA / name)
    return folder


@pytest.fixture
def letters(bare):
    """The small LLaMA with a tokenizer of a token a byte."""
    byte_tokenizer().save_pretrained(bare)
    return bare


@pytest.fixture
def refuses(tmp_path, monkeypatch):
    """An example's main stops with one line that holds the message."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monkeypatch.chdir(tmp_path)

    def check(name, message, *arguments):
        with pytest.raises(SystemExit) as stopped:
            importlib.import_module(name).main([str(argument) for argument in arguments])
        said = str(stopped.value)
        assert said.startswith(f"{name}: ") and message in said and "\n" not in said

    return check


@pytest.mark.slow
def test_two_models_may_have_two_tokenizers(letters, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    result = run(tmp_path, "view_attention.py", "--model", str(TINY_LLAMA), str(letters), "--smoke", "--output", "out")
    assert result.returncode == 0, result.stderr[-3000:]
    data = re.search(r'id="data">(.*?)</script>', (tmp_path / "out/attention.html").read_text(), re.DOTALL)
    first, second = (model["tokens"] for model in json.loads(data.group(1))["models"])
    assert len(second) == 60 > len(first) and (tmp_path / "out/figures/mean.svg").is_file()


def test_view_attention_says_in_one_line_what_is_wrong(bare, refuses):
    for arguments, message in (
        (("--model", "nowhere"), "nowhere: no tokenizer can be loaded"),
        (("--model", bare), "no tokenizer can be loaded"),
        (("--text", " "), "text is empty"),
        (("--text-file", "absent.txt"), "absent.txt"),
        (("--layers", "5"), "layers=[5]: there are 5 layers"),
        (("--text", "word " * 600), "max_position_embeddings=512"),
        (("--mark", "Madrid"), "--mark 'Madrid': does not occur"),
        (("--mark", "4821", "--max-tokens", "20"), "--mark '4821': stands before the tokens that are shown"),
    ):
        refuses("view_attention", message, *arguments)


def test_two_tokenizers_have_no_mark_in_common(letters, refuses):
    refuses("view_attention", "cut the text differently", "--model", TINY_LLAMA, letters, "--mark", "4821")


def test_score_heads_says_in_one_line_what_is_wrong_before_its_work(refuses, monkeypatch):
    module = importlib.import_module("score_heads")
    monkeypatch.setattr(module, "make_prompts", lambda *arguments: pytest.fail("this is work"))
    for arguments, message in (
        (("--model", "nowhere"), "nowhere: no tokenizer can be loaded"),
        (("--converted", "nowhere"), "conversion.json: not there"),
        (("--length", "100000"), "max_position_embeddings is 512"),
    ):
        refuses("score_heads", message, *arguments)
