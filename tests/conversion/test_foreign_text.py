"""Whatever stands in a checkpoint reaches no terminal and no card as more than text."""

import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from command_line import run
from markdown_it import MarkdownIt
from safetensors.torch import load_file, save_file

from conversion.errors import ConversionError, escape
from conversion.hub.markdown import code_span, markdown
from conversion.push import plan_upload


# A window title, a cleared screen, lines as ours, a right-to-left override, markup, HTML, half of a character.
EVIL = (
    "\x1b]0;t\x07\x1b[2J\r\n\nwrote everything\n# Approved\n---\n\u202e\u2028|`x`|``` "
    "x](javascript:alert(1)) ![i](https://e.example/i.png) <script>alert(1)</script> $$x$$ www.e.example \ud800\x9b2J"
)


@pytest.fixture(autouse=True)
def quiet_transformers():
    """As the console script does."""
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.enable_progress_bar()
    transformers.logging.set_verbosity_warning()


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def assert_harmless(result) -> None:
    """No character acts, and no line is the foreign text's own."""
    shown = result.stdout + result.stderr
    assert shown.strip(), "nothing was said"
    assert not sorted({char for char in shown if not char.isprintable() and char != "\n"})
    assert not [line for line in shown.splitlines() if line.startswith(("wrote everything", "# Approved", "---"))]
    assert not isinstance(result.exception, UnicodeError)
    if "Traceback" not in result.stderr:
        assert result.stderr.count("\n") <= 1, result.stderr


def assert_harmless_card(text: str) -> None:
    """Rendered by a Markdown parser: the headings, links and code blocks are ours."""
    assert not sorted({char for char in text if not char.isprintable() and char != "\n"})
    tokens = MarkdownIt("gfm-like", {"linkify": False}).enable("table").parse(text.split("\n---\n", 1)[1])
    flat = [token for block in tokens for token in [block, *(block.children or [])]]
    titles = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    ours = ("How it was made", "Measured", "Sizes", "λ, layer by layer", "How to load", "How to fine-tune", "Limits")
    assert [title for title in titles[1:] if title not in (*ours, "Citation", "Licence", "License")] == []
    links = [
        token.attrs.get("href") or token.attrs.get("src") for token in flat if token.type in ("link_open", "image")
    ]
    assert all(link.startswith(("https://arxiv.org/", "https://huggingface.co/")) for link in links), links
    assert not [token.content for token in flat if token.type.startswith("html") and "Written by" not in token.content]
    for block in (token.content for token in tokens if token.type == "fence" and token.info == "python"):
        compile(block, "snippet", "exec")


def test_escape_leaves_one_printable_line():
    assert escape(EVIL).isprintable() and "\\x1b]0;t\\x07" in escape(EVIL) and "\\u202e\\u2028" in escape(EVIL)
    assert escape("λ é 漢 out [v1] :fire: a\\b") == "λ é 漢 out [v1] :fire: a\\b"
    assert str(ConversionError(f"config.json: {EVIL}")) == f"config.json: {escape(EVIL)}"


@pytest.mark.parametrize("text", [EVIL, "`", "a``b", "", " ", "x\\", "*x*", "_x_", "~~x~~", "&lt;", "<b>"])
def test_text_in_a_card_is_rendered_as_it_is(text):
    """By a parser that is not ours: the words of the rendered line are the escaped text."""
    parser = MarkdownIt("gfm-like", {"linkify": False})
    for written, expected in ((markdown(text), escape(text)), (code_span(text), escape(text).strip() or "` `")):
        (line,) = [token for token in parser.parse(f"x{written}x") if token.children]
        parts = [part.content for part in line.children if part.type in ("text", "text_special", "code_inline")]
        assert "".join(parts) in (f"x{expected}x", "x x")


CONFIGS = {
    "unread field": lambda config: config.update({"k" + EVIL: 1}),
    "model type": lambda config: config.update(model_type=EVIL),
    "activation": lambda config: config.update(hidden_act=EVIL),
    "size": lambda config: config.update(hidden_size=EVIL),
    "rope type": lambda config: config.update(rope_scaling={"rope_type": EVIL, "factor": 2.0}),
    "rope field": lambda config: config.update(rope_scaling={"rope_type": "linear", "factor": 2.0, EVIL: EVIL}),
    "architecture": lambda config: config.update(architectures=[EVIL + "SequenceClassification"]),
    "dtype": lambda config: config.update(dtype=EVIL),
    "quantization": lambda config: config.update(quantization_config={EVIL: EVIL}),
}


@pytest.mark.parametrize("change", CONFIGS.values(), ids=CONFIGS)
def test_config_fields_are_shown_escaped(tmp_path, llama, change):
    edit(llama / "config.json", change)
    converted = run("convert", llama, tmp_path / "out", "--variant", "v2")
    assert_harmless(converted)
    assert_harmless(run("inspect", llama))
    assert_harmless(run("inspect", llama, "--verbose"))
    if converted.exit_code == 0:
        assert_harmless(run("inspect", tmp_path / "out"))
        assert_harmless_card((tmp_path / "out" / "README.md").read_text())


@pytest.mark.parametrize("arguments", [["convert", EVIL], [EVIL], ["convert", "--" + EVIL], ["inspect", EVIL]])
def test_arguments_are_shown_escaped(tmp_path, llama, arguments):
    assert_harmless(run(*arguments))
    assert_harmless(run("convert", llama, tmp_path / "out", "--variant", EVIL))
    assert_harmless(run("convert", llama, tmp_path / "out", "--variant", "v2", "--max-shard-size", EVIL))


def test_tensor_and_file_names_are_shown_escaped(tmp_path, llama):
    weights = llama / "model.safetensors"
    tensors = load_file(weights)
    name = EVIL.replace("\ud800", "")  # no UTF-8, which safetensors asks for
    save_file(tensors | {name: torch.ones(1)}, weights, {"format": "pt"})
    assert_harmless(run("convert", llama, tmp_path / "out", "--variant", "v2"))
    save_file(tensors, weights, {"format": "pt"})
    for file in (name, f"../{name}", ""):
        index = {"weight_map": dict.fromkeys(tensors, file) | {name: "model.safetensors"}}
        (llama / "model.safetensors.index.json").write_text(json.dumps(index))
        assert_harmless(run("inspect", llama))


def test_paths_are_shown_escaped(tmp_path, llama):
    llama = llama.rename(tmp_path / "\x1b[2J\nwrote everything \u202e:fire:")
    output = tmp_path / f"{llama.name}2"
    assert_harmless(run("inspect", llama))
    assert_harmless(run("convert", llama, output, "--variant", "v2"))
    assert ":fire:" in run("inspect", output).stdout
    assert_harmless_card((output / "README.md").read_text())
    assert_harmless(run("verify", output, "--against", llama))
    assert_harmless(run("verify", output, "--against", f"{llama}nowhere"))
    assert_harmless(run("export", llama, tmp_path / "exported"))
    assert_harmless(run("push", output, "me/x", "--dry-run"))
    assert_harmless(run("push", output, EVIL, "--dry-run"))
    undecodable = os.fsdecode(b"/nowhere/\xff")  # which Python hands on as half of a character
    assert_harmless(run("inspect", undecodable))


def healed(record) -> None:
    numbers = {"loss": 3.5}
    stage = {
        "stage": EVIL,
        "tokens": 4096,
        "data": [EVIL],
        "start": numbers | {EVIL: 1.0},
        "end": numbers | {EVIL: 2.0},
    }
    record["healing"] = [stage]


RECORDS = {
    "source name": lambda record: record["source"].update(name=EVIL),
    "hub id": lambda record: record["source"].update(hub_id=EVIL),
    "revision": lambda record: record["source"].update(revision=EVIL),
    "promise": lambda record: record["promise"].update(text=EVIL),
    "kind": lambda record: record["promise"].update(kind=EVIL),
    "versions": lambda record: record["versions"].update({EVIL: EVIL}),
    "options": lambda record: record["options"].update({EVIL: EVIL, "norm": EVIL}),
    "pairing": lambda record: record.update(pairing=EVIL),
    "calibration": lambda record: record.update(
        calibration={"text": EVIL, "tokens": 2048, "effort": EVIL, "stages": [EVIL]}
    ),
    "healing": healed,
    "files": lambda record: record["sha256"].update({EVIL: "0"}),
}


@pytest.mark.parametrize("change", RECORDS.values(), ids=RECORDS)
def test_records_are_shown_escaped(tmp_path, llama, change):
    output = tmp_path / "out"
    assert run("convert", llama, output, "--variant", "v2").exit_code == 0
    edit(output / "conversion.json", change)
    assert_harmless(run("inspect", output))
    assert_harmless(run("verify", output))
    pushed = run("push", output, "me/x", "--dry-run")
    assert_harmless(pushed)
    if pushed.exit_code == 0:
        assert_harmless_card(plan_upload(output, "me/x").contents["README.md"].decode())


def test_reports_and_licenses_are_shown_escaped(tmp_path, llama):
    (llama / "README.md").write_text(f"---\nlicense: other\nlicense_name: {json.dumps(EVIL)}\n---\n")
    (llama / "tokenizer_config.json").write_text(json.dumps({"auto_map": {EVIL: EVIL}, "tokenizer_class": EVIL}))
    output = tmp_path / "out"
    assert_harmless(run("convert", llama, output, "--variant", "v2"))
    assert_harmless_card((output / "README.md").read_text())
    checks = [{"name": EVIL, "outcome": "passed", "detail": EVIL, "values": {}}]
    report = {"promise": "bit-exact", "checks": checks, "passed": True}
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert_harmless(run("push", output, "me/x", "--dry-run", "--verification", tmp_path / "report.json"))
    assert_harmless_card(plan_upload(output, "me/x", None, report).contents["README.md"].decode())
    report |= {"promise": EVIL}
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert_harmless(run("push", output, "me/x", "--dry-run", "--verification", tmp_path / "report.json"))
