"""The report of a LLaMA and its conversions is one file with all numbers in it, and says so when it cannot be made."""

import importlib
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest


pytest.importorskip("matplotlib", reason="matplotlib is not installed")
EXAMPLES = Path(__file__).parents[1] / "examples"
SECTIONS = {"needles", "attention", "profile", "heads", "outliers", "quantized", "order"}


class Balance(HTMLParser):
    """Notes tags that are closed in another order than they were opened."""

    VOID = {"meta", "img"}

    def __init__(self):
        super().__init__()
        self.open = []
        self.wrong = []
        self.attributes = []

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "out"
    command = [sys.executable, EXAMPLES / "studies" / "compare_models.py", "--smoke", "--device", "cpu"]
    command += ["--output", folder, "--work", folder.parent / "work"]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ, HF_HUB_OFFLINE="1"))
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / "report.html"


@pytest.fixture
def main():
    """The script's own main, for what it refuses before it does any work."""
    return importlib.import_module("compare_models").main


@pytest.mark.slow
def test_report_is_one_file_without_the_network(report):
    page = report.read_text(encoding="utf-8")
    parser = Balance()
    parser.feed(page)
    assert not parser.wrong and not parser.open
    sources = [value for name, value in parser.attributes if name in ("src", "href")]
    assert sources and all(value.startswith(("data:image/png;base64,", "#")) for value in sources)
    assert not re.search(r"https?://|@import|url\(", page)
    assert page.count("class=light") == page.count("class=dark") == 6
    assert all(word in page for word in ("tiny-llama", "v1-copy", "v2-exact", "published: DIFF", "What this shows"))


@pytest.mark.slow
def test_report_shows_the_exact_conversion_to_be_exact(report):
    data = json.loads(report.with_suffix(".json").read_text())
    llama, v1, v2 = data["models"]
    assert [model["kind"] for model in data["models"]] == ["LLaMA", "DIFF V1", "DIFF V2"]
    assert all(set(model) >= SECTIONS for model in data["models"])
    assert v2["needles"] == llama["needles"] and v2["order"] == llama["order"]
    assert [row["arrangement"] for row in llama["order"]] == ["random", "random", "alternate"]
    for ours, theirs in zip(v2["quantized"], llama["quantized"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-3)  # two ways of summing, then rounding to levels
    assert v2["outliers"]["hidden_states"] == pytest.approx(llama["outliers"]["hidden_states"], rel=1e-3)
    assert v1["quantized"][0]["loss"] > llama["quantized"][0]["loss"] + 0.5  # a plain copy has little of its function


@pytest.mark.slow
def test_figures_and_needle_cells_are_next_to_the_report(report):
    names = {path.name for path in (report.parent / "figures").iterdir()}
    assert "needle_heat_maps.png" in names and len(names) == 6
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (report.parent / "figures").iterdir())
    assert len(list((report.parents[1] / "work").glob("needles-*.jsonl"))) == 3


def test_table_shows_text_as_text():
    from modeling_diff.analysis.report_page import table

    assert "<td>&lt;b&gt;</td>" in table(("model", "x"), [("<b>", "1")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model is needed, a LLaMA and one or more differential models"),
        (["--model", "nowhere"], "nowhere: no config.json there"),
        (["--model", str(EXAMPLES / "assets" / "tiny-llama"), "--labels", "a", "b"], "--labels: 1 different names"),
    ],
)
def test_bad_arguments_are_refused(main, capsys, tmp_path, arguments, message):
    with pytest.raises(SystemExit):
        main([*arguments, "--output", str(tmp_path / "report")])
    assert message in capsys.readouterr().err


def test_a_folder_without_a_tokenizer_is_refused(main, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text((EXAMPLES / "assets/tiny-llama/config.json").read_text())
    with pytest.raises(SystemExit, match="no tokenizer can be loaded"):
        main(["--model", str(model), "--output", str(tmp_path / "report")])


def test_what_cannot_be_measured_is_said_in_one_line(main, tmp_path, monkeypatch):
    words = ["--model", str(EXAMPLES / "assets" / "tiny-llama"), "--output", str(tmp_path / "report")]
    with pytest.raises(SystemExit, match=r"^compare_models: .*absent\.txt.*$"):
        main([*words, "--text", str(tmp_path / "absent.txt")])
    with pytest.raises(SystemExit, match=r"^compare_models: length_tokens=9999 .*$"):
        main([*words, "--lengths", "9999"])
    (tmp_path / "file").touch()
    monkeypatch.setattr("compare_models.compare", None)  # said before anything is measured
    with pytest.raises(SystemExit, match=r"^compare_models: .*File exists.*file'$"):
        main([*words[:3], str(tmp_path / "file")])


def test_report_reads_numbers_saved_under_older_names():
    from modeling_diff.analysis.report import current_names

    saved = {
        "effort": {"quantized_prompts": 3},
        "models": [
            {
                "quantized": [{"bits": None}],
                "attention": [{"view": "first"}, {"view": "second"}, {"view": "signed"}],
                "profile": {"views": {"second": [0.5], "clamped": [0.25]}},
            }
        ],
    }
    assert current_names(saved) == {
        "effort": {"quantized_prompts": 3},
        "models": [
            {
                "quantized": [{"bits": None}],
                "attention": [{"view": "positive"}, {"view": "negative"}, {"view": "signed"}],
                "profile": {"views": {"negative": [0.5], "clamped": [0.25]}},
            }
        ],
    }
