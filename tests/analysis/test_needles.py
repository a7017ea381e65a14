"""Needle prompts have the length, places and facts that they promise, and answers are scored to the last digit."""

import re
from dataclasses import replace

import pytest
from tiny_tokenizers import byte_tokenizer

from modeling_diff.analysis.needles import (
    INSTRUCTION,
    Needle,
    NeedleTask,
    Template,
    library_text,
    make_prompts,
    read_number,
    score,
)


FACT = re.compile(r"The magic number of (.+?) is (\d+)\.")


@pytest.fixture(scope="module")
def letters():
    return byte_tokenizer()


@pytest.mark.parametrize("task", [NeedleTask(64, 0.0), NeedleTask(257, 0.5, 4, 2), NeedleTask(480, None, 6, 6)])
def test_prompt_has_exactly_the_length_in_tokens(tokenizer, filler, task):
    for prompt in make_prompts(task, tokenizer, filler, 8):
        assert len(tokenizer(prompt.text)["input_ids"]) == task.length_tokens


def test_prompt_has_exactly_the_length_in_another_tokenizers_tokens(letters, filler):
    lengths = [len(prompt.text.encode()) for prompt in make_prompts(NeedleTask(999, 0.3, 3), letters, filler, 4)]
    assert lengths == [999] * 4  # a token a byte


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_asked_needles_stand_at_their_depth(tokenizer, filler, depth):
    for prompt in make_prompts(NeedleTask(400, depth, 3, 2), tokenizer, filler, 5):
        start, end = prompt.body
        facts = sum(needle.span[1] - needle.span[0] for needle in prompt.needles)
        longest_line = max(map(len, prompt.text[start:end].splitlines()))
        for needle in prompt.asked:
            between = [other for other in prompt.needles if other.span[0] < needle.span[0]]
            before = needle.span[0] - start - sum(other.span[1] - other.span[0] for other in between)
            assert abs(before - depth * (end - start - facts)) <= longest_line


def test_facts_are_in_the_text_as_the_prompt_says(tokenizer, filler):
    for prompt in make_prompts(NeedleTask(470, 0.5, 6, 2), tokenizer, filler, 5):
        told = dict(FACT.findall(prompt.text))
        assert told == {needle.city: needle.number for needle in prompt.needles}
        assert len(told) == len(set(told.values())) == 6
        assert all(prompt.text[slice(*needle.number_span)] == needle.number for needle in prompt.needles)
        assert all(FACT.search(prompt.text[slice(*needle.span)]).group(1) == needle.city for needle in prompt.needles)
        assert prompt.text.endswith(f"The magic number of {prompt.asked[0].city} is")
        assert [needle.asked for needle in prompt.needles].count(True) == 2


def test_seed_and_cell_decide_the_prompts(tokenizer, filler):
    task = NeedleTask(128, 0.5)
    first, again = (make_prompts(task, tokenizer, filler, 3, seed=1) for _ in range(2))
    assert first == again
    assert make_prompts(task, tokenizer, filler, 3, seed=2) != first
    assert make_prompts(replace(task, depth=0.25), tokenizer, filler, 3, seed=1)[0].asked != first[0].asked


def test_next_question_stands_behind_the_answers_given(tokenizer, filler):
    (prompt,) = make_prompts(NeedleTask(300, 0.5, 3, 3), tokenizer, filler, 1)
    second, third = (needle.city for needle in prompt.asked[1:])
    assert prompt.transcript([]) == prompt.text
    text = prompt.transcript(["17", None])
    assert text == f"{prompt.text} 17.\nThe magic number of {second} is.\nThe magic number of {third} is"


def test_templates_may_ask_in_words(tokenizer, filler):
    (prompt,) = make_prompts(NeedleTask(300, 0.5, 3, 2, template=INSTRUCTION), tokenizer, filler, 1)
    assert prompt.text.startswith("Some magic numbers are hidden")
    assert f"magic numbers of {prompt.asked[0].city}, {prompt.asked[1].city}, as" in prompt.text
    assert len(tokenizer(prompt.text)["input_ids"]) == 300


@pytest.mark.parametrize(
    ("reply", "number"),
    [(" 4821.", "4821"), (" 48213.", "48213"), (" is\n12 or 13", "12"), ("none", None), ("", None)],
)
def test_the_first_number_of_a_reply_counts(reply, number):
    assert read_number(reply) == number


def test_each_city_is_scored_to_the_last_digit():
    needles = [Needle("Oslo", "4821", True, (0, 1), (0, 1)), Needle("Lima", "1234", True, (0, 1), (0, 1))]
    assert score(["4821", "1234"], needles) == 2
    assert score(["4821", "1235"], needles) == 1
    assert score(["1234", "4821"], needles) == 0  # another city's number
    assert score(["482", None], needles) == 0


def test_library_text_is_python():
    text = library_text(20_000)
    assert len(text) == 20_000 and "import" in text and text.isascii()


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"asked": 2}, "asked=2"),
        ({"needles": 3, "cities": ("Oslo", "Lima")}, "cities"),
        ({"cities": ("Oslo", "Oslo")}, "cities"),
        ({"depth": 1.5}, "depth=1.5"),
        ({"needles": 10, "digits": 1}, "digits=1"),
    ],
)
def test_impossible_tasks_are_refused(settings, field):
    with pytest.raises(ValueError, match=field):
        NeedleTask(100, **settings)


def test_a_template_without_the_city_is_refused():
    with pytest.raises(ValueError, match=r"ask \{city\}"):
        Template(ask="\nThe number is")


def test_what_prompts_cannot_be_made_of_is_said(tokenizer, filler):
    with pytest.raises(ValueError, match="tokenizer: missing"):
        make_prompts(NeedleTask(100), None, filler, 1)
    with pytest.raises(ValueError, match="filler: empty"):
        make_prompts(NeedleTask(100), tokenizer, " \n", 1)
    with pytest.raises(ValueError, match="length_tokens=50: 6 needles and the question alone take"):
        make_prompts(NeedleTask(50, needles=6), tokenizer, filler, 1)
    with pytest.raises(ValueError, match="filler: 40 characters"):
        make_prompts(NeedleTask(200), tokenizer, filler[:40], 1)
