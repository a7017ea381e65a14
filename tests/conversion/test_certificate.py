"""A certificate's scores by hand, its thresholds, what is read back, and what a second run finds different."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch

from conversion import Certificate, ConversionError, FilesError
from conversion.evaluation.behavior import first_divergences
from conversion.evaluation.certificate import compare_certificates, measures
from conversion.evaluation.metrics import TextMetrics
from conversion.evaluation.performance import Performance, names_fact, repeated_line_rate, win_and_tie_rate
from conversion.evaluation.suite import needle_lengths
from conversion.record import measure_text, read_certificate


FILED = Path(__file__).parents[2] / "examples" / "results" / "certificates"


def performance(**changes):
    done = {
        "continuations": [[1] * 96, [2] * 96],
        "texts": ["a\nb\nc\n"],
        "lookups": [True] * 10,
        "needles": {128: 1.0, 448: 1.0},
        "answers": ["an owl", "bees"],
        "facts": [True, True],
    }
    return Performance(**{**done, **changes})


EQUAL = TextMetrics(3.0, source_loss_nats=3.0, kl_nats=0.0, greedy_agreement=1.0)


def measured(metrics=EQUAL, win_and_tie=1.0, *, exact=False, source=None, judged=None, **model):
    return {
        measure.name: measure
        for measure in measures(
            metrics,
            win_and_tie,
            source=source or performance(),
            model=performance(**model),
            exact=exact,
            judged=judged,
        )
    }


def content(**changes):
    """A certificate as `verify --certificate` writes it."""
    found = [measure.to_dict() for measure in measured().values()]
    filed = {
        "format": "diff-llama certificate",
        "suite": 1,
        "passed": True,
        "failed": [],
        "model": {"name": "v1", "variant": "v1", "promise": "parity", "weights": {"model.safetensors": "ab"}},
        "source": {"name": "llama", "hub_id": None, "revision": None, "weights": {"model.safetensors": "cd"}},
        "seed": 0,
        "data": {"held_out.txt": "ef"},
        "measures": found,
        "literature": [{"what": "another", "relative": 0.9, "source": "a paper"}],
        "judge": None,
        "environment": {"torch": "2.13.0", "device": "cpu", "threads": 1},
    }
    return copy.deepcopy(filed | changes)


def test_scores_of_text_are_geometric_means():
    """exp(3 - 3.1) of the probability of each token, exp(-0.2) of the source's own."""
    found = measured(TextMetrics(3.1, source_loss_nats=3.0, kl_nats=0.2, greedy_agreement=0.85))
    assert found["held-out loss"].relative == pytest.approx(0.904837, abs=1e-6)
    assert found["KL"].relative == pytest.approx(0.818731, abs=1e-6)
    outcomes = [found[name].outcome for name in ("held-out loss", "KL", "greedy agreement", "win and tie")]
    assert outcomes == ["failed", "failed", "failed", "passed"]


@pytest.mark.parametrize(
    ("answer", "fact", "named"),
    [
        ("The attic of the bakery.", "the attic of a bakery", True),
        ("It was built by EDDA RUNGE in 1784", "Edda Runge", True),
        ("Runge, Edda", "Edda Runge", False),
        ("2120", "212", False),
        ("at 6:40", "6:40", True),
        ("", "bees", False),
    ],
)
def test_fact_is_named_word_by_word(answer, fact, named):
    assert names_fact(answer, fact) is named


def test_repeated_lines_are_counted_without_empty_and_cut_ones():
    """Of four whole lines, one is the line before it again; `x` at the end was cut."""
    assert repeated_line_rate(["a\n\na\nb\nc\nc"]) == 0.25
    assert repeated_line_rate(["loop\n" * 5]) == 0.8
    assert repeated_line_rate(["no line is whole"]) == 0


def test_passages_tie_up_to_the_tolerance():
    """Four passages of two tokens: better, equal, worse by 0.04 and by 0.06 nats a token."""
    source = torch.full((8,), 1.0)
    losses = torch.tensor([0.5, 1.0, 1.0, 1.0, 1.08, 1.0, 1.12, 1.0])
    assert win_and_tie_rate([losses], [source], 2, 0.05) == 0.75


def test_divergence_is_the_number_of_equal_tokens():
    assert first_divergences([[1, 2, 3], [1, 2, 3], [1, 2, 3]], [[1, 2, 3], [9, 2, 3], [1, 2, 9]]) == [3, 0, 2]
    found = measured(continuations=[[1] * 96, [2] * 8 + [3] * 88])["first divergence"]
    assert (found.model, found.details["min"], found.outcome) == (52, 8, "measured")


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        ({"lookups": [True] * 8 + [False] * 2}, "lookup"),
        ({"needles": {128: 1.0, 448: 0.5}}, "needles"),
        ({"facts": [True, False]}, "facts"),
        ({"texts": ["a\na\na\n"]}, "repeated lines"),
        ({"win_and_tie": 0.8}, "win and tie"),
        ({"judged": (0.9, 0.5)}, "facts, judged"),
    ],
)
def test_what_falls_below_its_threshold_is_named(change, failed):
    assert [name for name, measure in measured(**change).items() if measure.outcome == "failed"] == [failed]


def test_task_that_the_source_fails_is_not_judged():
    weak = performance(facts=[False, False], lookups=[True] * 4 + [False] * 6)
    found = measured(source=weak, facts=[False, False], lookups=[False] * 10)
    assert (found["facts"].outcome, found["facts"].relative) == ("measured", 1.0)
    assert (found["lookup"].outcome, found["lookup"].relative) == ("measured", 0.0)
    assert measured(source=weak)["facts"].relative is None


def test_exact_conversion_has_to_keep_everything():
    assert {measure.outcome for measure in measured(exact=True).values()} == {"passed"}
    tiny = TextMetrics(3.0, source_loss_nats=3.0, kl_nats=1e-9, greedy_agreement=1.0)
    assert measured(tiny, exact=True)["KL"].outcome == "failed"
    assert measured(exact=True, continuations=[[1] * 96, [2] * 95 + [3]])["first divergence"].outcome == "failed"


def test_needles_are_as_long_as_the_context_allows():
    assert needle_lengths(512) == [128, 256, 448]
    assert needle_lengths(2048) == [128, 256, 512, 1024, 1984]
    assert needle_lengths(131072) == [128, 256, 512, 1024, 2048]


def test_certificate_is_read_back_as_written(tmp_path):
    path = tmp_path / "certificate.json"
    Certificate(content()).write(path)
    assert read_certificate(path) == content()
    assert [file.name for file in tmp_path.iterdir()] == ["certificate.json"]
    with pytest.raises(FilesError, match="exists; choose another file, or overwrite it"):
        Certificate(content()).write(path)
    Certificate(content(seed=1)).write(path, overwrite=True)
    assert read_certificate(path)["seed"] == 1


def test_files_of_others_are_never_replaced(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("{}")
    for overwrite, message in ((True, "is no certificate; choose another file"), (False, "exists; choose another")):
        with pytest.raises(FilesError, match=message):
            Certificate(content()).write(path, overwrite=overwrite)
    assert path.read_text() == "{}"
    with pytest.raises(FilesError, match="is no folder; create it"):
        Certificate(content()).write(tmp_path / "nowhere" / "certificate.json")
    with pytest.raises(FilesError, match=r"is a folder, expected a file .* such as .*certificate.json"):
        Certificate(content()).write(tmp_path)


def without(name):
    return {key: value for key, value in content().items() if key != name}


@pytest.mark.parametrize(
    ("filed", "message"),
    [
        ({}, r"not a certificate \(format is None\)"),
        ([], "is a JSON list, expected an object"),
        (content(suite=2), "of suite 2, and this diff-llama runs suite 1"),
        (without("measures"), "measures is missing"),
        (content(data={"held_out.txt": 5}), "data.held_out.txt is 5"),
        (content(failed=["KL"]), r"passed is True and failed is \"?\['KL'\]"),
        (content(passed=False), "passed is False"),
        (content(model={"promise": "magic"}), "model.name is missing"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, filed, message):
    path = tmp_path / "certificate.json"
    path.write_text(json.dumps(filed))
    with pytest.raises(ConversionError, match=message) as caught:
        read_certificate(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_missing_certificate_says_how_to_make_one(tmp_path):
    with pytest.raises(ConversionError, match=r"missing; make it with .*--certificate FILE"):
        read_certificate(tmp_path / "certificate.json")


def different(filed, found):
    return {check.name: check.detail for check in compare_certificates(filed, found) if check.outcome == "failed"}


def edited(measure, **fields):
    filed = content()
    next(found for found in filed["measures"] if found["name"] == measure).update(fields)
    return filed


def test_same_certificate_differs_nowhere():
    assert different(content(), content()) == {}
    renamed = content(model=content()["model"] | {"name": "moved"})
    assert different(renamed, content()) == {}


@pytest.mark.parametrize(
    ("filed", "name", "said"),
    [
        (edited("KL", model=0.001), "KL", "model is 0.001 in the certificate, and 0 here"),
        (edited("KL", threshold=0.5), "KL", "threshold is 0.5 in the certificate, and 0.9 here"),
        (edited("lookup", source=0.9), "lookup", "source is 0.9 in the certificate, and 1 here"),
        (edited("win and tie", details={}), "win and tie", "passage_tokens is None in the certificate, and 64 here"),
        (content(seed=1), "statements", "seed is 1, found 0"),
        (
            content(model=content()["model"] | {"promise": "bit-exact"}),
            "statements",
            "model.promise is 'bit-exact', found 'parity'",
        ),
        (content(literature=[]), "statements", "literature is []"),
        (content(measures=content()["measures"][1:]), "held-out loss", "missing in the certificate"),
        (content(measures=[*content()["measures"], content()["measures"][0] | {"name": "x"}]), "x", "not a measure"),
    ],
)
def test_edited_certificate_is_found_by_name(filed, name, said):
    found = different(filed, content())
    assert found.keys() == {name} and said in found[name]


def test_other_machine_may_round_otherwise_and_no_more():
    """A near-tie and a few digits in another environment; in the same one neither."""
    elsewhere = content(environment=content()["environment"] | {"torch": "2.12.0"})
    elsewhere["measures"] = edited("held-out loss", model=3.0004, relative=math.exp(-0.0004))["measures"]
    assert different(elsewhere, content()) == {}
    environment = next(iter(compare_certificates(elsewhere, content())))
    assert environment.detail == "certified with torch 2.12.0, here 2.13.0"
    elsewhere["environment"] = content()["environment"]
    assert different(elsewhere, content()).keys() == {"held-out loss"}
    elsewhere = content(environment={}, measures=edited("lookup", model=0.9)["measures"])
    assert different(elsewhere, content()).keys() == {"lookup"}


def certified(**model):
    """A certificate of another machine, and one of this."""
    source = performance(lookups=[True] * 14 + [False] * 34)
    elsewhere, here = (
        [measure.to_dict() for measure in measured(source=source, **{"lookups": source.lookups, **changes}).values()]
        for changes in ({}, model)
    )
    return content(measures=elsewhere, environment={}), content(measures=here)


@pytest.mark.parametrize(
    ("model", "name", "said"),
    [
        ({"continuations": [[1] * 96, [3] * 96]}, "first divergence", "relative 50.0% (not judged), min 0"),
        # A source of 14 in 48: one answer is 0.02 of the score, and 0.07 of the relative one.
        ({"lookups": [True] * 13 + [False] * 35}, "lookup", "relative 92.9%"),
        ({"win_and_tie": 0.96}, "win and tie", "relative 96.0%"),
    ],
)
def test_what_follows_from_scores_is_not_held_against_them_elsewhere(model, name, said):
    filed, found = certified(**model)
    checks = {check.name: check for check in compare_certificates(filed, found)}
    assert [check.name for check in checks.values() if check.outcome == "failed"] == []
    assert said in checks[name].detail and checks[name].detail.startswith("as certified up to rounding: ")
    assert name in different(filed | {"environment": found["environment"]}, found)


def test_one_answer_where_the_source_has_none_is_rounding_elsewhere():
    """Relative 1 of nothing, and no relative score at all of one answer."""
    weak = performance(facts=[False] * 36)
    elsewhere, here = (
        [measure.to_dict() for measure in measured(source=weak, facts=facts).values()]
        for facts in ([False] * 36, [True] + [False] * 35)
    )
    assert different(content(measures=elsewhere, environment={}), content(measures=here)) == {}


def test_verdict_that_flips_within_rounding_is_said_and_no_failure():
    filed, found = ([measure.to_dict() for measure in measured(win_and_tie=share).values()] for share in (0.91, 0.88))
    checks = compare_certificates(content(measures=filed, environment={}), content(measures=found))
    check = next(check for check in checks if check.name == "win and tie")
    assert check.outcome == "passed" and check.detail.endswith("; passed when certified, failed here")


def test_promised_bits_are_no_matter_of_rounding():
    exact = content()["model"] | {"promise": "bit-exact"}
    filed, found = (
        [measure.to_dict() for measure in measured(exact=True, win_and_tie=share).values()] for share in (1.0, 0.98)
    )
    filed = content(measures=filed, environment={}, model=exact)
    assert different(filed, content(measures=found, model=exact)) == {
        "win and tie": "outcome is passed in the certificate, and failed here"
    }


@pytest.mark.parametrize(
    ("filed", "name", "said"),
    [
        (edited("KL", relative=0.95), "KL", "relative is 0.95 in the certificate, and 1 by its own source and model"),
        (edited("KL", threshold=0.5), "KL", "threshold is 0.5 in the certificate, and 0.9 by its own source"),
        (edited("facts", threshold=None, outcome="measured"), "facts", "threshold is None in the certificate"),
        (edited("facts", details={"answers": 3}), "facts", "answers is 3 in the certificate, and 2 here"),
        (edited("first divergence", source=9), "first divergence", "source is 9 in the certificate, and 96 here"),
        (edited("win and tie", details={}), "win and tie", "passage_tokens is None in the certificate, and 64 here"),
    ],
)
def test_rules_and_arithmetic_of_a_certificate_hold_everywhere(filed, name, said):
    found = different(filed | {"environment": {}}, content())
    assert found.keys() == {name} and said in found[name]


@pytest.mark.parametrize("path", sorted(FILED.glob("*.json")), ids=lambda path: path.stem)
def test_filed_certificates_check_out_against_themselves(path):
    filed = read_certificate(path)
    assert different(filed | {"environment": {}}, filed) == {} == different(filed, filed)


def test_judged_answers_need_their_judge_again():
    judged = content(measures=[m.to_dict() for m in measured(judged=(1.0, 1.0)).values()], judge="strict")
    outcomes = {check.name: check.outcome for check in compare_certificates(judged, content())}
    assert outcomes["facts, judged"] == "skipped" and "failed" not in outcomes.values()


def test_measure_is_one_line_with_its_rule():
    line = measure_text(measured(win_and_tie=0.5)["win and tie"].to_dict())
    said = "source 100.0%, model 50.0%; relative 50.0% (at least 90%), passage tokens 64, tolerance nats 0.05"
    assert line == said
