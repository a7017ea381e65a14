"""A grid of needle prompts is answered in padded batches, scored exactly, and taken up where it stopped."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from tiny_tokenizers import TINY_LLAMA
from transformers import AutoModelForCausalLM

from modeling_diff.analysis.needle_runs import CellResult, NeedleGrid, answer_prompts, run_grid
from modeling_diff.analysis.needles import NeedleTask, make_prompts


GRID = NeedleGrid((150, 200), (0.0, 1.0), ((1, 1), (3, 2)), samples=3)


class Reader:
    """Stands for a model: reads the prompt's facts as text and answers with what `choose` makes of them."""

    device = torch.device("cpu")
    config = SimpleNamespace(max_position_embeddings=512, vocab_size=2048, name_or_path="reader")

    def __init__(self, tokenizer, choose):
        self.tokenizer = tokenizer
        self.choose = choose
        self.prompts = []

    def generate(self, input_ids, attention_mask, max_new_tokens, do_sample, num_beams, pad_token_id):
        assert not do_sample and num_beams == 1
        rows = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            assert (mask.diff() >= 0).all() and (ids[mask == 0] == pad_token_id).all()  # padded on the left alone
            text = self.tokenizer.decode(ids[mask == 1], skip_special_tokens=True)
            self.prompts.append(text)
            told = re.findall(r"The magic number of (.+?) is (\d+)\.", text)
            facts = dict(reversed(told))  # the first mention counts; later ones are answers
            asked = re.search(r"The magic number of (\w+) is$", text).group(1)
            reply = self.tokenizer(self.choose(facts, asked), add_special_tokens=False)["input_ids"][:max_new_tokens]
            rows.append(torch.tensor(reply + [pad_token_id] * (max_new_tokens - len(reply))))
        return torch.cat((input_ids, torch.stack(rows)), dim=1)


def right(facts, asked):
    return f" {facts[asked]}.\nThe magic"


def neighbor(facts, asked):
    return f" {next(number for city, number in facts.items() if city != asked)}."


def one_digit_more(facts, asked):
    return f" {facts[asked]}7."


@pytest.mark.parametrize(("choose", "accuracy"), [(right, 1.0), (one_digit_more, 0.0), (lambda *told: "?", 0.0)])
def test_accuracy_is_the_share_of_right_numbers(tokenizer, filler, choose, accuracy):
    results = run_grid(Reader(tokenizer, choose), tokenizer, filler, GRID, batch_size=2)
    assert [result.accuracy for result in results] == [accuracy] * 8
    assert [result.answers for result in results] == [3] * 4 + [6] * 4


def test_another_citys_number_is_wrong(tokenizer, filler):
    grid = NeedleGrid((200,), (0.5,), ((3, 2), (6, 6)), samples=2)
    results = run_grid(Reader(tokenizer, neighbor), tokenizer, filler, grid)
    assert [result.accuracy for result in results] == [0.0, 0.0]


def test_a_model_answers_behind_its_own_answers(tokenizer, filler):
    model = Reader(tokenizer, neighbor)
    (prompt,) = make_prompts(NeedleTask(250, 0.5, 3, 2), tokenizer, filler, 1)
    ((first, _),) = answer_prompts(model, tokenizer, [prompt])
    assert first != prompt.asked[0].number
    assert model.prompts[1] == f"{prompt.text} {first}.\nThe magic number of {prompt.asked[1].city} is"


def test_finished_cells_are_not_run_again(tokenizer, filler, tmp_path):
    path = tmp_path / "runs" / "cells.jsonl"
    model = Reader(tokenizer, right)
    results = run_grid(model, tokenizer, filler, GRID, path=path)
    answered = len(model.prompts)
    again = Reader(tokenizer, lambda *told: pytest.fail("asked again"))
    assert run_grid(again, tokenizer, filler, GRID, path=path) == results
    path.write_text(path.read_text()[:-5])  # a stop in the middle of the last line
    assert run_grid(model, tokenizer, filler, GRID, path=path) == results
    assert len(model.prompts) == answered + 6  # the last cell: 3 prompts, 2 asked
    assert [CellResult(**json.loads(line)) for line in path.read_text().splitlines()[1:]] == results


def test_a_cell_is_the_same_alone_and_in_a_grid(tokenizer, filler):
    together, alone = Reader(tokenizer, right), Reader(tokenizer, right)
    run_grid(together, tokenizer, filler, GRID)
    run_grid(alone, tokenizer, filler, NeedleGrid((200,), (1.0,), ((3, 2),), samples=3))
    assert set(alone.prompts) < set(together.prompts)


def test_a_file_of_other_settings_is_refused(tokenizer, filler, tmp_path):
    path = tmp_path / "cells.jsonl"
    model = Reader(tokenizer, right)
    run_grid(model, tokenizer, filler, NeedleGrid((100,), (0.0,), ((1, 1),), samples=1), path=path)
    with pytest.raises(ValueError, match="another samples, seed"):
        run_grid(model, tokenizer, filler, NeedleGrid((100,), (0.0,), ((1, 1),), samples=2, seed=1), path=path)
    with pytest.raises(ValueError, match="another model"):
        run_grid(model, tokenizer, filler, NeedleGrid((100,), samples=1), path=path, label="somebody else")
    path.write_text("no JSON\n")
    with pytest.raises(ValueError, match="not a file of needle results"):
        run_grid(model, tokenizer, filler, GRID, path=path)


def test_prompts_beyond_the_context_are_refused(tokenizer, filler):
    model = Reader(tokenizer, right)
    with pytest.raises(ValueError, match=r"length_tokens=600 .* max_position_embeddings is 512"):
        run_grid(model, tokenizer, filler, NeedleGrid((100, 600), samples=1))
    assert not model.prompts
    with pytest.raises(ValueError, match=r"with their answers: 51[3-9] tokens"):
        run_grid(model, tokenizer, filler, NeedleGrid((508,), (None,), ((1, 1),), samples=1))


def test_generation_names_the_numbers_that_teacher_forcing_finds(tokenizer, filler):
    model = AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32).eval()
    prompts = [
        prompt
        for length in (90, 120)  # so that a batch is padded
        for prompt in make_prompts(NeedleTask(length, None, 2, 1), tokenizer, filler, 4)
    ]
    answers = answer_prompts(model, tokenizer, prompts, batch_size=8)
    found = 0
    for prompt, (answer,) in zip(prompts, answers, strict=True):
        ids = tokenizer(f"{prompt.text} {prompt.asked[0].number}.", return_tensors="pt")["input_ids"]
        asked = len(tokenizer(prompt.text)["input_ids"])
        with torch.no_grad():
            forced = bool((model(ids).logits[0, asked - 1 : -2].argmax(-1) == ids[0, asked:-1]).all())
        assert forced == (answer == prompt.asked[0].number)
        found += forced
    assert found >= 6  # 97 % with one needle and 85 % with four in training_record.json
