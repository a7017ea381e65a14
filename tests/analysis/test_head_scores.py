"""Scores find the heads that were built for them, in LLaMA and in its exact V2 mirror; ablation shows what they do."""

import json
import re

import pytest
import torch
from planted_heads import (
    COPY_HEAD,
    FIRST,
    FIRST_HEAD,
    PREVIOUS_HEAD,
    UNIFORM_HEAD,
    VOCABULARY,
    planted_llama,
)
from rich.console import Console
from tiny_models import random_ids, tiny_model
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from conversion import convert_checkpoint
from conversion.mapping.heads import HeadPairing
from modeling_diff import DiffLlamaForCausalLM
from modeling_diff.analysis import report_measurements
from modeling_diff.analysis.ablation import ablated_heads, ablation_effects, loss_nats, mean_head_outputs
from modeling_diff.analysis.head_pairs import paired_scores
from modeling_diff.analysis.head_scores import (
    SCORES,
    HeadScore,
    RetrievalPrompt,
    greedy,
    score_heads,
    score_induction,
    score_patterns,
    score_retrieval,
)
from modeling_diff.analysis.needles import library_text
from modeling_diff.analysis.score_tables import score_grid, score_table, write_scores
from modeling_diff.analysis.tokens import repeated_tokens


WORDS = range(1, VOCABULARY)
NEEDLE = (8, 12)


@pytest.fixture(scope="module")
def llama():
    return planted_llama()


@pytest.fixture(scope="module")
def llama_folder(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    llama.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mirror(llama_folder, tmp_path_factory):
    """Exact V2: A1 and A2 are LLaMA's map and lambda is a half, as lambda_proj reads nothing."""
    folder = tmp_path_factory.mktemp("mirror") / "v2"
    convert_checkpoint(llama_folder, folder, "v2", measure=False)
    return DiffLlamaForCausalLM.from_pretrained(folder).eval()


def texts(count=3, length=20, seed=0):
    return repeated_tokens(WORDS, length, 1, count, FIRST, seed)


def prompts():
    """Different tokens, and at the end the one before the needle again: an induction head goes on with the needle."""
    rows = texts(seed=1).tolist()
    return [RetrievalPrompt([*row, row[NEEDLE[0] - 1]], NEEDLE) for row in rows]


@pytest.fixture(scope="module")
def scores(llama):
    return score_heads(llama, texts(), prompts(), vocabulary=WORDS, first=FIRST)


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("previous_token", PREVIOUS_HEAD),
        ("first_token", FIRST_HEAD),
        ("induction", COPY_HEAD),
        ("retrieval", COPY_HEAD),
    ],
)
def test_each_score_finds_the_head_built_for_it_and_no_other(scores, name, head):
    found = {(score.layer, score.head): getattr(score, name) for score in scores}
    assert found.pop(head) > 0.99
    assert max(found.values()) < 0.2


def test_entropy_tells_sharp_heads_from_uniform_ones(scores):
    entropy = {(score.layer, score.head): score.entropy_nats for score in scores}
    # A head without queries spreads evenly over t + 1 tokens: ln(t + 1), for t from 2 to 20.
    even = torch.arange(3, 22, dtype=torch.float64).log().mean().item()
    assert entropy[UNIFORM_HEAD] == pytest.approx(even, abs=1e-5)
    assert entropy[PREVIOUS_HEAD] < 0.01 and entropy[FIRST_HEAD] < 0.01


def test_patterns_of_chosen_queries_are_means_over_those_behind_the_second_token():
    model = planted_llama()
    model.set_attn_implementation("eager")
    found = score_patterns(model, texts(), queries=[1, 5, 11, 18])
    for layer, attention in enumerate(model(texts(), output_attentions=True).attentions):
        rows = attention[:, :, [5, 11, 18]].double()  # (B, H, Q, S)
        previous = rows[:, :, [0, 1, 2], [4, 10, 17]].mean((0, 2))
        entropy = -(rows * rows.clamp_min(1e-300).log()).sum(-1).mean((0, 2))
        for head in range(4):
            of_head = found[layer, head, "attention"]
            expected = {
                "previous_token": previous[head].item(),
                "first_token": rows[:, head, :, 0].mean().item(),
                "entropy_nats": entropy[head].item(),
            }
            assert of_head == pytest.approx(expected, abs=1e-5)  # float32


def letters():
    """As LLaMA 1 and 2, but a token a letter: a space is one that decodes to nothing by itself."""
    alphabet = ["<unk>", "\u2581", *(chr(code) for code in (10, *range(33, 127)))]
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, [], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def test_the_reports_needles_begin_with_the_space_that_is_a_token(llama, monkeypatch):
    given = []
    tokenizer = letters()
    assert tokenizer.decode(tokenizer("a b").input_ids[2]) == ""
    monkeypatch.setattr(
        report_measurements, "score_heads", lambda model, rows, prompts, **rest: given.extend(prompts) or []
    )
    effort = report_measurements.Effort((128,), head_prompts=3)
    report_measurements._heads(llama, tokenizer, library_text(20_000), input_ids=texts(), effort=effort)
    assert len(given) == 3
    for prompt in given:
        text = "".join(tokenizer.convert_ids_to_tokens(prompt.input_ids)).replace("\u2581", " ")
        city = re.search(r"of (\w+) is$", text).group(1)
        needle = re.search(rf"of {city} is( \d{{4}})\.", text)
        assert prompt.needle == needle.span(1)


def test_the_mirrors_maps_score_as_llamas_and_its_difference_half(mirror, scores):
    mirrored = score_heads(mirror, texts(), prompts(), vocabulary=WORDS, first=FIRST)
    assert {score.map for score in mirrored} == {"positive", "negative", "difference"}
    original = {(score.layer, score.head): score for score in scores}
    for score in mirrored:
        of_llama = original[score.layer, score.head]
        half = 0.5 if score.map == "difference" else 1.0  # A - A / 2
        for name in ("previous_token", "first_token", "induction"):
            assert getattr(score, name) == pytest.approx(half * getattr(of_llama, name), abs=1e-5)
        # Neither where a row's weight goes, in shares, nor where most of it goes, is changed by a factor.
        assert score.entropy_nats == pytest.approx(of_llama.entropy_nats, abs=1e-4)
        assert score.retrieval == of_llama.retrieval


def test_induction_counts_every_earlier_repetition(llama):
    twice = score_induction(llama, vocabulary=WORDS, length=10, repeats=2, first=FIRST)
    often = score_induction(llama, vocabulary=WORDS, length=10, repeats=5, first=FIRST)
    key = (*COPY_HEAD, "attention")
    assert twice[key]["induction"] > 0.99 and often[key]["induction"] > 0.99
    # A uniform head: behind token t of T before, one target in the first repetition, then two, ...
    expected = torch.tensor([(position // 10) / (position + 2) for position in range(10, 50)]).mean().item()
    assert often[*UNIFORM_HEAD, "attention"]["induction"] == pytest.approx(expected, abs=1e-6)


def test_retrieval_needs_the_model_to_say_the_needle(llama):
    prompt = prompts()[0]
    with ablated_heads(llama, {COPY_HEAD[0]: [COPY_HEAD[1]]}):
        silent = score_retrieval(llama, [prompt])
    assert silent[*COPY_HEAD, "attention"]["retrieval"] == 0  # it still looks at the needle, and nothing is said
    said = greedy(llama, torch.tensor([prompt.input_ids]), 4)[0, -4:].tolist()
    assert said == prompt.input_ids[slice(*NEEDLE)]


def test_ablating_the_planted_circuit_breaks_copying_and_nothing_else_does(llama):
    rows = repeated_tokens(WORDS, 6, 16, 2, FIRST, 3)  # mostly repetition: only that can be copied

    def recall(model):
        right = [
            greedy(model, torch.tensor([p.input_ids]), 4)[0, -4:].tolist() == p.input_ids[slice(*NEEDLE)]
            for p in prompts()
        ]
        return sum(right) / len(right)

    effects = {effect.heads[0]: effect for effect in ablation_effects(llama, rows, recall=recall)}
    assert len(effects) == 8
    for head, effect in effects.items():
        if head in (PREVIOUS_HEAD, COPY_HEAD):
            assert effect.loss_change_nats > 1 and effect.recall_change == -1
        else:
            assert abs(effect.loss_change_nats) < 1e-5 and effect.recall_change == 0


@pytest.mark.parametrize(
    ("variant", "changes"), [("v1", {}), ("v2", {}), ("v1", {"differential_heads": [[0], [1, 2]]})], ids=str
)
def test_ablation_equals_zeroed_or_replaced_columns(variant, changes):
    model = tiny_model(variant, **changes)
    ids = random_ids(2, 16)
    whole = loss_nats(model, ids)
    with ablated_heads(model, {1: [2]}):
        zeroed = loss_nats(model, ids)
    assert loss_nats(model, ids) == whole != zeroed
    means = mean_head_outputs(model, ids)
    with ablated_heads(model, {1: [2]}, "mean", means):
        replaced = loss_nats(model, ids)
    # The same, done to the weights: without a head's columns of o_proj, and with what its mean would have added.
    o_proj = model.model.layers[1].self_attn.o_proj
    columns = slice(2 * model.config.head_dim, 3 * model.config.head_dim)
    with torch.no_grad():
        added = o_proj.weight[:, columns] @ means[1][2]
        o_proj.weight[:, columns] = 0
        assert loss_nats(model, ids) == pytest.approx(zeroed, abs=1e-5)
        o_proj.bias = torch.nn.Parameter(added)
        assert loss_nats(model, ids) == pytest.approx(replaced, abs=1e-5)


def test_pairs_show_which_roles_a_conversion_paired(llama_folder, scores, tmp_path):
    order = (1, 2, 3, 0)
    convert_checkpoint(
        llama_folder,
        tmp_path / "chosen",
        "v1",
        uncalibrated=True,
        pairings={0: HeadPairing(order, order)},
        measure=False,
    )
    pairs = {(pair.layer, pair.head): pair for pair in paired_scores(scores, tmp_path / "chosen")}
    assert pairs[0, 0].positive.first_token > 0.99 and pairs[0, 0].negative.previous_token > 0.99
    assert (pairs[1, 1].positive.head, pairs[1, 1].negative.head) == (2, 3)  # neighbors, where nothing was chosen


def test_default_pairs_of_grouped_heads_are_the_converters(tmp_path):
    from modeling_diff.analysis.head_pairs import query_order

    record = {"calibration": None, "options": {"pairings": None}}
    order = query_order(record, {"num_attention_heads": 6, "num_key_value_heads": 2}, 0)
    assert tuple(order) == HeadPairing.adjacent(12, 4).query_heads


def test_scores_become_a_grid_a_table_and_json(scores, tmp_path):
    grid = score_grid(scores, "induction")
    assert grid.shape == (2, 4) and grid[COPY_HEAD] > 0.99
    console = Console(record=True, width=140, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(score_table(scores, sort_by="retrieval", rows=1))
    assert console.export_text().count("attention") == 1
    write_scores(scores, tmp_path / "scores.json")
    rows = json.loads((tmp_path / "scores.json").read_text())
    assert [HeadScore(**row) for row in rows] == scores and set(SCORES) <= set(rows[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda llama, folder: score_patterns(llama, torch.ones(1, 2).long()), "2 tokens"),
        (lambda llama, folder: score_patterns(llama, texts(), queries=[1]), "queries \\[1\\] of 21 tokens"),
        (lambda llama, folder: score_patterns(llama, texts(), queries=[5, 21]), "there are 21 tokens"),
        (lambda llama, folder: score_induction(llama, repeats=1), "repeats=1"),
        (lambda llama, folder: score_induction(llama, length=40), "length=40"),
        (lambda llama, folder: score_retrieval(llama, []), "prompts is empty"),
        (lambda llama, folder: score_retrieval(llama, [RetrievalPrompt([1, 2], (1, 3))]), "needle=\\(1, 3\\)"),
        (lambda llama, folder: score_grid([], "induction"), "map_name=None"),
        (lambda llama, folder: score_grid([HeadScore(0, 0, "attention")], "copying"), "name='copying'"),
        (lambda llama, folder: paired_scores([], folder), "conversion.json: not there"),
        (lambda llama, folder: ablated_heads(llama, {2: [0]}).__enter__(), "layer 2: there are 2 layers"),
        (lambda llama, folder: ablated_heads(llama, {1: [4]}).__enter__(), "heads \\[4\\] of layer 1"),
        (lambda llama, folder: ablated_heads(llama, {}, "mean").__enter__(), "means missing"),
        (lambda llama, folder: ablated_heads(llama, {}, "half").__enter__(), "mode='half'"),
    ],
)
def test_bad_input_is_named(llama, llama_folder, call, message):
    with pytest.raises(ValueError, match=message):
        call(llama, llama_folder)
