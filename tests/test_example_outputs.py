"""Examples write over no input, replace earlier results when asked and once new ones are complete, and speak alike."""

import argparse
import importlib
import re
import shutil
from pathlib import Path

import continue_pretraining
import finetune_lora
import pytest
import score_heads

from modeling_diff.experiments.output_files import add_output, output_folder


EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path for path in EXAMPLES.glob("*/*.py") if "__main__" in path.read_text())
# Names that TrainingArguments, TRL and PEFT have other words for, and earlier words of these scripts.
OTHER_WORDS = {
    "--steps",
    "--epochs",
    "--batch",
    "--rank",
    "--rate",
    "--context",
    "--train",
    "--eval",
    "--report",
    "--keep",
    "--gradient-accumulation",
    "--dropout",
    "--source",
    "--llama",
    "--checkpoint",
    "--checkpoints",
}


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "v2"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "README.md"):
        (folder / name).write_text(f"the bytes of {name}")
    (tmp_path / "text.txt").write_text("some text")
    return folder


@pytest.fixture
def earlier(tmp_path):
    """The output folder of an earlier run, and a file that is none of its results."""
    folder = tmp_path / "out"
    for name in ("result.json", "adapter/config.json", "notes.txt"):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(f"old {name}")
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def parsed(*words, name="name", **more):
    parser = argparse.ArgumentParser()
    add_output(parser, "what is written", name)
    arguments = parser.parse_args(words)
    vars(arguments).update(more)
    return arguments


def run(script, folder, output, *more):
    script.main(["--model", str(folder), "--data", str(folder.parent / "text.txt"), "--output", str(output), *more])


@pytest.mark.parametrize("script", [finetune_lora, continue_pretraining], ids=lambda module: module.__name__)
@pytest.mark.parametrize("where", ["itself", "below", "above", "link"])
@pytest.mark.parametrize("more", [[], ["--overwrite"]], ids=["plain", "overwrite"])
def test_training_never_writes_into_its_model(script, checkpoint, where, more):
    before = contents(checkpoint)
    link = checkpoint.parent / "link"
    link.symlink_to(checkpoint)
    output = {"itself": checkpoint, "below": checkpoint / "tuned", "above": checkpoint.parent, "link": link}[where]
    with pytest.raises(SystemExit, match="would mix with"):
        run(script, checkpoint, output, *more)
    assert contents(checkpoint) == before


@pytest.mark.parametrize(
    ("script", "result"), [(finetune_lora, "result.json"), (continue_pretraining, "continued.json")]
)
def test_training_keeps_earlier_results(script, result, checkpoint, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / result).write_text("an hour's work")
    with pytest.raises(
        SystemExit, match=rf"{result} is there: add --overwrite to replace it, --resume to continue it"
    ):
        run(script, checkpoint, output)
    assert (output / result).read_text() == "an hour's work"


@pytest.mark.parametrize(
    ("script", "result"), [(finetune_lora, "result.json"), (continue_pretraining, "continued.json")]
)
def test_a_run_that_fails_keeps_the_results_it_was_to_replace(script, result, checkpoint, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / result).write_text("an hour's work")
    with pytest.raises(SystemExit, match="no tokenizer can be loaded"):
        run(script, checkpoint, output, "--overwrite")
    assert contents(tmp_path / "out") == {result: "an hour's work"}
    assert not (tmp_path / "out.part").exists()


def test_scores_keep_earlier_results(tmp_path):
    (tmp_path / "scores.json").write_text("{}")
    with pytest.raises(SystemExit, match="add --overwrite"):
        score_heads.main(["--smoke", "--output", str(tmp_path)])
    assert (tmp_path / "scores.json").read_text() == "{}"


def test_overwrite_replaces_the_named_results_alone_and_at_the_end(earlier):
    before = contents(earlier)
    arguments = parsed("--output", str(earlier), "--overwrite")
    with output_folder(arguments, ("result.json", "adapter", "missing")) as folder:
        (folder / "result.json").write_text("new")
        (folder / "merged").mkdir()
        (folder / "merged/config.json").write_text("new")
        assert contents(earlier) == before
    assert contents(earlier) == {"result.json": "new", "merged/config.json": "new", "notes.txt": "old notes.txt"}
    assert [path.name for path in earlier.parent.iterdir()] == ["out"]


def test_a_failed_replacement_leaves_both_and_the_next_starts_again(earlier):
    before = contents(earlier)
    words = ("--output", str(earlier), "--overwrite")
    with pytest.raises(RuntimeError, match="stopped"), output_folder(parsed(*words), ["result.json"]) as folder:
        (folder / "half.json").write_text("half")
        raise RuntimeError("stopped")
    assert contents(earlier) == before
    assert contents(earlier.with_name("out.part")) == {"half.json": "half"}
    with output_folder(parsed(*words), ["result.json"], resume=True) as folder:
        assert contents(folder) == {"half.json": "half"}
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / "half.json").write_text("stale")
    with output_folder(parsed(*words), ["half.json"]) as folder:
        assert contents(folder) == {}


def test_resume_continues_in_the_folder_itself(earlier):
    arguments = parsed("--output", str(earlier))
    with output_folder(arguments, ["result.json"], resume=True) as folder:
        assert folder == arguments.output == earlier
    assert contents(earlier)["result.json"] == "old result.json"


def test_only_the_main_process_changes_folders(earlier):
    before = contents(earlier)
    arguments = parsed("--output", str(earlier), "--overwrite")
    with output_folder(arguments, ["result.json"], main_process=False) as folder:
        assert folder.name == "out.part" and not folder.exists()
    assert contents(earlier) == before


def test_a_link_keeps_pointing_to_the_folder_whose_results_are_replaced(earlier):
    link = earlier.with_name("link")
    link.symlink_to(earlier)
    with output_folder(parsed("--output", str(link), "--overwrite"), ["result.json", "adapter"]) as folder:
        (folder / "result.json").write_text("new")
    assert link.is_symlink()
    assert contents(earlier) == {"result.json": "new", "notes.txt": "old notes.txt"}


@pytest.mark.parametrize(("name", "smoke"), [("name", True), (None, False), (None, True)])
def test_without_output_smoke_and_optional_results_leave_nothing(name, smoke, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = parsed(name=name, smoke=smoke)
    with output_folder(arguments, ["result.json"]) as folder:
        assert arguments.output == folder and tmp_path not in folder.parents
        (folder / "result.json").write_text("")
    assert not folder.exists() and list(tmp_path.iterdir()) == []


def test_default_output_is_named_after_the_script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = parsed()
    with output_folder(arguments, ["result.json"]) as folder:
        (folder / "result.json").write_text("new")
    assert arguments.output == Path("out/name") and contents(tmp_path) == {"out/name/result.json": "new"}


def test_inputs_that_are_no_folders_here_are_passed_over(tmp_path):
    with output_folder(parsed("--output", str(tmp_path / "out")), (), ["someone/model", None]) as folder:
        assert folder == tmp_path / "out"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_help_speaks_one_dialect(path, capsys):
    """Every option has a sentence and one of the common names, and the docstring has the exact command."""
    try:
        script = importlib.import_module(path.stem)
    except SystemExit as missing:
        pytest.skip(str(missing))
    with pytest.raises(SystemExit, match="0"):
        script.main(["--help"])
    printed = capsys.readouterr().out
    assert f"python examples/{path.parent.name}/{path.name}" in printed
    _, options = printed.split("\noptions:\n")
    entries = re.split(r"\n  (?=-)", f"\n{options.rstrip()}")[1:]
    names = {re.search(r"--[a-z0-9-]+", entry)[0] for entry in entries}
    assert not names & OTHER_WORDS
    assert ("--output" in names) == ("--overwrite" in names)
    for entry in entries:
        assert re.search(r"(\n {10,}|\S  +)[A-Za-z0-9].{9,}", entry), f"no help: {entry}"
