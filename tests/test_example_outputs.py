"""No example writes over its input, nor over earlier results unless asked, and `--smoke` alone is enough."""

import argparse
import re
from pathlib import Path

import continue_pretraining
import finetune_lora
import pytest
import score_heads

from modeling_diff.experiments.output_files import add_output, make_room, settle_output


EXAMPLES = Path(__file__).parents[1] / "examples"
WRITING = sorted(
    path for path in EXAMPLES.rglob("*.py") if re.search(r"add_output\(|\"--(output|report)\"", path.read_text())
)
# They go on in a folder that they began, or convert in one step at the end.
CONTINUING = {"pretrain_from_scratch.py", "quickstart.py"}


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "v2"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "README.md"):
        (folder / name).write_text(f"the bytes of {name}")
    (tmp_path / "text.txt").write_text("some text")
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def parsed(*words, smoke=False):
    parser = argparse.ArgumentParser()
    add_output(parser, "name", "what is written")
    arguments = parser.parse_args(words)
    arguments.smoke = smoke
    return arguments


def run(script, folder, output, *more):
    if script is finetune_lora:
        given = ["--data", str(folder.parent / "text.txt")]
    else:
        given = ["--train", str(folder.parent / "text.txt")]
    script.main(["--model", str(folder), *given, "--output", str(output), *more])


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
    with pytest.raises(SystemExit, match=rf"{result} is there: add --overwrite"):
        run(script, checkpoint, output)
    assert (output / result).read_text() == "an hour's work"


def test_scores_keep_earlier_results(tmp_path):
    (tmp_path / "scores.json").write_text("{}")
    with pytest.raises(SystemExit, match="add --overwrite"):
        score_heads.main(["--smoke", "--output", str(tmp_path)])
    assert (tmp_path / "scores.json").read_text() == "{}"


def test_overwrite_removes_the_named_results_alone(tmp_path):
    for name in ("result.json", "adapter/config.json", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    settle_output(parsed("--output", str(tmp_path), "--overwrite"), ("result.json", "adapter", "missing"))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_smoke_alone_has_an_output_of_its_own_and_may_run_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        arguments = parsed(smoke=True)
        settle_output(arguments, ("result.json",))
        assert arguments.output == Path("out/name-smoke")
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "result.json").write_text("")
    with pytest.raises(ValueError, match="is there"):
        settle_output(parsed("--output", "out/name-smoke", smoke=True), ("result.json",))


def test_inputs_that_are_no_folders_here_are_passed_over(tmp_path):
    settle_output(parsed("--output", str(tmp_path / "out")), (), ["someone/model", None])


def test_room_is_made_only_where_it_is_needed(tmp_path):
    make_room([tmp_path / "nothing"], overwrite=False)


@pytest.mark.parametrize("path", WRITING, ids=lambda path: path.name)
def test_every_script_that_writes_asks_before_it_overwrites(path):
    text = path.read_text()
    if path.name not in CONTINUING:
        assert re.search(r"add_output\(parser|add_overwrite\(parser|\"--overwrite\"", text)
    assert not re.search(r"\"--output\"[^)]*required=True", text), "--smoke alone has to be enough"
