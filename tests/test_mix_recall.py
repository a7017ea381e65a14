"""`mix_recall.py`: facts that are said again, the share of them, and the text itself, of which nothing is lost."""

import random
import re

import mix_recall
import pytest


TEXT = "\n\n".join(f"Paragraph {i} " + "is made of words. " * (5 + i % 9) for i in range(400)) + "\n"
FACT = re.compile(r"\b\d{4}\b")


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_a_share_of_the_text_is_recall_and_the_rest_is_the_text(share):
    mixed = mix_recall.mix(TEXT, share, seed=0)
    # Whole passages, the longest a tenth of this text.
    assert (len(mixed) - len(TEXT)) / len(mixed) == pytest.approx(share, abs=0.06)
    lines = iter(mixed.splitlines())
    assert all(line in lines for line in filter(None, TEXT.splitlines())), "all lines are there, in their order"


def test_every_fact_is_said_twice_in_another_order():
    for seed in range(20):
        text = mix_recall.recall(random.Random(seed), TEXT.split("\n\n"))
        told, _, asked = text.rstrip("\n").rpartition("\n\n")
        facts = [line for line in told.splitlines() if FACT.search(line)]
        assert sorted(facts) == sorted(asked.splitlines()) and len(facts) in (4, 6, 8)


def test_a_seed_gives_one_text():
    assert (
        mix_recall.mix(TEXT, 0.25, seed=3) == mix_recall.mix(TEXT, 0.25, seed=3) != mix_recall.mix(TEXT, 0.25, seed=4)
    )
    assert mix_recall.mix(TEXT, 0.0, seed=3).replace("\n", "") == TEXT.replace("\n", "")


def test_the_file_is_written_and_earlier_ones_are_kept(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    output = tmp_path / "out" / "mixed.txt"
    mix_recall.main([str(tmp_path / "text.txt"), "--output", str(output)])
    assert output.read_text() == mix_recall.mix(TEXT, 0.25, seed=0)
    for arguments in ([], ["--overwrite", "--seed", "1"]):
        target = output if not arguments else tmp_path / "text.txt"
        with pytest.raises(SystemExit, match="is there: add --overwrite to replace it"):
            mix_recall.main([str(tmp_path / "text.txt"), "--output", str(target), *arguments])
    assert (tmp_path / "text.txt").read_text() == TEXT


def test_texts_without_paragraphs_are_refused(tmp_path):
    (tmp_path / "lines.txt").write_text("one line\n" * 1000)
    with pytest.raises(SystemExit, match="0 paragraphs of 81 to 899 characters, expected more than 8; give a longer"):
        mix_recall.main([str(tmp_path / "lines.txt"), "--output", str(tmp_path / "mixed.txt")])
