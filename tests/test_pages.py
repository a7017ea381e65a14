"""README and the pages of docs/: links lead somewhere, commands and snippets run as they stand, the notebook too."""

import contextlib
import importlib
import importlib.util
import io
import os
import re
import runpy
import shlex
import shutil
import sys
import tomllib
from itertools import groupby
from pathlib import Path

import pytest

from conversion import convert_checkpoint


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
# A reason not to run it, the language, and the text of a fenced block.
BLOCK = re.compile(r"^(?:<!-- not run: ([^\n]+) -->\n)?```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LLAMA = ROOT / "examples" / "assets" / "tiny-llama"
# What is appended so that a command takes seconds: as few tokens as it takes.
SHORTER = {
    r"diff-llama convert .*--effort ": "--calibration-tokens 2048 --no-measure",
    r"diff-llama convert .*--calibration ": "--calibration-tokens 2048 --stages pairing --no-measure",
    r"diff-llama convert (?!.*--calibration ).*--variant": "--no-measure",
    r"python examples/scripts/(finetune_lora|continue_pretraining).py --model": "--max-steps 2 --max-length 128",
    r"diff-llama heal ": "--max-steps 1 --max-length 64 --per-device-train-batch-size 2",
    r"python examples/studies/pretrain_from_scratch.py": "--seeds 0",
    r"python examples/studies/(view_attention|score_heads|compare_models).py": "--smoke",
}
# Checkpoints that pages speak of and some page makes; others find them there.
MADE_BEFORE = {"out/v1": ("v1", {"uncalibrated": True}), "out/v2": ("v2", {})}

# Of accelerate, pip and vLLM.
OPTIONS_OF_OTHERS = [
    *("--config_file", "--num_processes", "--quiet", "--no-deps", "--editable"),
    *("--trust-remote-code", "--model-impl", "--tensor-parallel-size", "--served-model-name", "--enable-lora"),
    *("--max-lora-rank", "--lora-modules", "--model", "--dtype"),
]


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def text_of(page):
    return page.read_text(encoding="utf-8")


def without_blocks(text):
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page):
    """The anchors of a page's headings, as code hosts make them."""
    found = []
    for heading in re.findall(r"^#+ (.+)$", without_blocks(text_of(page)), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        found.append(re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_to_files_and_headings_that_exist(page):
    for target in LINK.findall(without_blocks(text_of(page))):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.is_relative_to(ROOT) and there.exists(), target
        assert not anchor or anchor in anchors(there), target


def test_every_page_is_reached_from_the_readme():
    waiting = [ROOT / "README.md"]
    reached = set()
    while waiting:
        page = waiting.pop()
        reached.add(page)
        targets = [target.partition("#")[0] for target in LINK.findall(without_blocks(text_of(page)))]
        linked = {(page.parent / target).resolve() for target in targets if target.endswith(".md")}
        waiting += linked - reached
    assert set(PAGES) <= reached


def test_readme_fits_on_a_few_screens():
    assert len(text_of(ROOT / "README.md").splitlines()) <= 180


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_block_that_is_not_run_says_why(page):
    """A comment that stands anywhere but right before a fence would turn nothing off."""
    text = text_of(page)
    comments = re.findall(r"^ *<!-- *not run", text, re.MULTILINE)
    assert len(comments) == sum(bool(reason) for reason, _, _ in BLOCK.findall(text))


def blocks_to_run(page):
    """(language, text) of every block that is run, the README's two commands for a shell left to their own tests."""
    blocks = [(language, text) for reason, language, text in BLOCK.findall(text_of(page)) if not reason]
    return [(language, text) for language, text in blocks if not text.startswith("python3 -m venv")]


def commands_of(text):
    joined = re.sub(r"\\\n\s*", " ", text)
    return [line for line in joined.splitlines() if line and not line.startswith("#")]


def run_command(command):
    """Runs `diff-llama ...` or `python examples/...` in this process, which has loaded torch already."""
    command, _, into = command.partition(" > ")
    added = next((more for pattern, more in SHORTER.items() if re.match(pattern, command)), "")
    program, *arguments = shlex.split(f"{command} {added}")
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        if program == "diff-llama":
            patch.setattr(sys, "argv", ["diff-llama", *arguments])
            code = exit_code(console_script())
        else:
            assert program == "python" and arguments[0].startswith("examples/"), command
            patch.setattr(sys, "argv", arguments)
            patch.syspath_prepend(str(Path(arguments[0]).resolve().parent))
            code = exit_code(lambda: runpy.run_path(arguments[0], run_name="__main__"))
    assert code in (None, 0), f"{command}: {code}\n{printed.getvalue()[-2000:]}"
    if into:
        Path(into).write_text(printed.getvalue())


def console_script():
    """What the installed `diff-llama` calls."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, name = project["scripts"]["diff-llama"].split(":")
    return getattr(importlib.import_module(module), name)


def exit_code(call):
    try:
        call()
    except SystemExit as stopped:
        return stopped.code
    return None


def folders_made(page):
    """The checkpoints that the commands of a page write."""
    commands = [line for language, text in blocks_to_run(page) if language == "bash" for line in commands_of(text)]
    return {
        found[1] for line in commands if (found := re.match(r"diff-llama (?:convert|export|heal) \S+ (\S+)", line))
    }


def test_no_two_pages_write_the_same_checkpoint():
    """Someone who runs one page after another would be told that it exists."""
    made = [folder for page in PAGES for folder in folders_made(page)]
    assert sorted(made) == sorted(set(made)) and set(MADE_BEFORE) <= set(made)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_to_run(page)], ids=name_of)
def test_a_page_links_to_the_page_that_makes_what_it_uses(page):
    text = "".join(text for _, text in blocks_to_run(page))
    linked = {(page.parent / target.partition("#")[0]).resolve() for target in LINK.findall(text_of(page))}
    for folder in MADE_BEFORE:
        makers = {maker for maker in PAGES if folder in folders_made(maker)}
        assert not re.search(rf"{folder}(?![\w-])", text) or makers & (linked | {page}), folder


@pytest.fixture(scope="session")
def made_before(tmp_path_factory):
    """tiny-llama as V1 and V2, converted once for all pages."""
    folder = tmp_path_factory.mktemp("made-before")
    for name, (variant, options) in MADE_BEFORE.items():
        convert_checkpoint(LLAMA, folder / name, variant, measure=False, **options)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks_to_run(page)], ids=name_of)
# peft 0.21 asks for it.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_commands_and_snippets_of_a_page_run_in_order(page, made_before, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    Path("examples").symlink_to(ROOT / "examples")
    text = text_of(page)
    for name in MADE_BEFORE:
        if not re.search(rf"convert \S+ {name}( |$)", text, re.MULTILINE):
            shutil.copytree(made_before / name, name)
    names = {}
    for language, block in blocks_to_run(page):
        if language == "python":
            exec(compile(block, f"{name_of(page)}, a block", "exec"), names)
        else:
            for command in commands_of(block):
                run_command(command)


# peft 0.21 asks for it.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_snippet_of_lora_trains_lambda_and_adapters(made_before, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.chdir(made_before)
    (block,) = (text for language, text in blocks_to_run(ROOT / "docs/tasks/finetune-lora.md") if language == "python")
    names = {}
    exec(block.replace('"out/trainer"', repr(str(tmp_path))).replace("report_to=[]", "use_cpu=True"), names)
    trained = [name for name, value in names["model"].named_parameters() if value.requires_grad]
    assert any("lambda_proj" in name for name in trained) and any("lora_" in name for name in trained)


@pytest.fixture(scope="module")
def docs_hook():
    specification = importlib.util.spec_from_file_location("docs_hook", ROOT / ".ci" / "docs.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_file_tree_and_table_of_models_are_those_of_today(docs_hook):
    for page in docs_hook.WRITTEN:
        assert text_of(ROOT / page) == docs_hook.renewed(page), f"{page}: run python .ci/docs.py"


def test_reference_of_the_command_line_has_every_command_and_option(docs_hook):
    reference = docs_hook.command_reference()
    for name, command in docs_hook.program().commands.items():
        section = re.search(rf"^## diff-llama {name}\n(.*?)(?=^## |\Z)", reference, re.MULTILINE | re.DOTALL)[1]
        for param in command.params:
            is_option = param.param_type_name == "option"
            written = [*param.opts, *param.secondary_opts] if is_option else [param.metavar or param.name.upper()]
            assert all(f"<code>{text}" in section or f"/ {text}" in section for text in written), (name, param.name)
    assert reference == docs_hook.command_reference()


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=name_of)
def test_options_that_pages_name_exist(page, docs_hook):
    """Also where a command is only spoken of, or cannot be run."""
    commands = docs_hook.program().commands.values()
    options = {
        option for command in commands for param in command.params for option in param.opts + param.secondary_opts
    }
    scripts = [*(ROOT / "examples").rglob("*.py"), *(path for path in (ROOT / ".ci").iterdir() if path.is_file())]
    options |= {option for path in scripts for option in re.findall(r"--[\w-]+", text_of(path))}
    options |= {"--help", *OPTIONS_OF_OTHERS}
    named = re.findall(r"(?<![\w<-])--[a-z][\w-]*", text_of(page).partition("<!-- tree -->")[0])
    assert not [option for option in named if option not in options]


def test_links_of_the_site_stay_in_the_site(docs_hook):
    page = "[a](../../README.md#quickstart) ![b](../../examples/x.png) [c](../../LICENSE) [d](heal.md) [e](https://f)"
    assert docs_hook.site_links(page, "docs/tasks/convert.md", "tasks/convert.md") == (
        "[a](../readme.md#quickstart) ![b](../examples/x.png) c [d](heal.md) [e](https://f)"
    )


NOTEBOOK = ROOT / "examples" / "notebooks" / "convert_and_compare.ipynb"


def test_notebook_is_committed_with_outputs_and_without_paths():
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert NOTEBOOK.stat().st_size < 300_000
    assert not re.search(r"[\"' ]/(home|root|tmp|work|usr|opt|var)/", NOTEBOOK.read_text(encoding="utf-8"))
    for target in LINK.findall("".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")):
        path, _, anchor = target.partition("#")
        assert (NOTEBOOK.parent / path).exists() and (not anchor or anchor in anchors(NOTEBOOK.parent / path)), target


def kinds_of_outputs(notebook):
    """Per cell, one name where several follow each other: how text is cut into streams depends on the moment."""
    outputs = ([output.output_type for output in cell.get("outputs", [])] for cell in notebook.cells)
    return [[kind for kind, _ in groupby(kinds)] for kinds in outputs]


@pytest.mark.slow
def test_notebook_runs_to_the_outputs_that_it_has(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    committed = kinds_of_outputs(notebook)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "", "IPYTHONDIR": str(tmp_path)}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        nbclient.NotebookClient(notebook, timeout=500).execute(cwd=NOTEBOOK.parent)
    assert kinds_of_outputs(notebook) == committed
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    losses = {name: float(loss) for name, loss in re.findall(r"^(\S.*?) +loss ([\d.]+)", printed, re.MULTILINE)}
    assert losses["V2"] == losses["LLaMA"] < losses["V1, calibrated"] < losses["V1, copy"]
