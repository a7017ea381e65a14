"""The counts of `.ci/density.py` that the style sets to zero stay there, in the folders that were brought to it."""

import importlib.util
from pathlib import Path

import pytest

import modeling_diff.training


ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("density", ROOT / ".ci" / "density.py")
density = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(density)


def measured(source: str, folder: Path, name: str = "some.py") -> density.Measurements:
    (folder / name).write_text(source, encoding="utf-8")
    return density.measure(folder, root=folder)


@pytest.mark.parametrize("package", ["modeling_diff", "conversion"])
@pytest.mark.parametrize("what", ["format_skips", "nested_conditionals", "tuple_assignments", "a_layer", "british"])
def test_packages_keep_to_the_words_and_to_one_statement_per_line(package, what):
    # Names of license files as others spell them, and a task's text in the words it was measured with.
    foreign = ("conversion/checkpoint/companions.py", "conversion/evaluation/behavior.py")
    places = density.measure(ROOT / package).places[what]
    assert [place for place in places if what != "british" or not place.startswith(foreign)] == []


def test_every_export_of_training_names_its_arguments():
    places = density.measure(ROOT / "modeling_diff" / "training").places["sections"]
    assert not {place.split()[1].rstrip(":") for place in places} & set(modeling_diff.training.__all__)


def test_measurements_find_what_they_are_for(tmp_path):
    skip = "# fmt: " + "skip"
    source = (
        '"""One a layer; the colour is normalised."""\n'
        f"a, b = len('x'), 2  {skip}\n"
        "a, b = b, a\n"
        "c = 1 if a else 2 if b else 3\n"
        "print(1, 2, 3, 4)\n"
        "def f(x: int) -> int:\n"
        '    """Returns x."""\n'
        "    if x:\n"
        "        raise ValueError(x)\n"
        "    return x\n"
    )
    found = measured(source, tmp_path)
    expected = {
        "format_skips": 1,
        "tuple_assignments": 1,  # the exchange of two names says one thing
        "nested_conditionals": 1,
        "positional_calls": 1,
        "a_layer": 1,
        "british": 2,
        "sections": 1,
    }
    assert {what: found.counts[what] for what in expected} == expected
    assert found.places["sections"] == ["some.py:6: f: Args, Returns, Raises"]


def test_kernels_may_lay_out_their_arguments(tmp_path):
    skip = "x = (1,\n     2)  # fmt: " + "skip\n"
    assert measured(skip, tmp_path, "diff_attention_triton_backward_kernels.py").counts["format_skips"] == 0


def test_list_prints_places(capsys, monkeypatch):
    monkeypatch.setattr(density, "FOLDERS", ("modeling_diff",))
    assert density.main(["--list", "positional_calls"]) == 0
    assert "modeling_diff/" in capsys.readouterr().out
