"""Releases of transformers to come, imitated: right tokens or one clear ImportError, never wrong tokens."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import modeling_diff
from modeling_diff import DiffLlamaForCausalLM, DiffLlamaForSequenceClassification, diff_transformers_check
from modeling_diff.diff_transformers_check import logits_by_definition, structural_difference, tiny_model
from modeling_diff.diff_transformers_compat import (
    NEWEST_TESTED_TRANSFORMERS,
    OLDEST_TORCH,
    OLDEST_TRANSFORMERS,
    TRANSFORMERS,
    append_to_cache,
    release,
)


FOLDER = Path(__file__).parent
ROOT = Path(modeling_diff.__file__).parents[1]
PATHS = os.pathsep.join(map(str, (ROOT, FOLDER, FOLDER.parent)))
ENVIRONMENT = os.environ | {"PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"}
NEXT_RELEASE = "5.99.0"

# Changes after which everything that this code needs still arrives.
HARMLESS = {"call_attention_by_position", "return_tuples_from_layers", "nothing"}
# What the error names, so that a reader of a bug report knows what changed.
NAMED = {
    "rename_cache": "kv_store",
    "rename_mask": "attn_mask",
    "pass_unknown_keyword_to_attention": "attention_window",
    "pass_unknown_keyword_to_layers": "segment_ids",
    "expect_three_values_of_attention": "expected 3",
    "update_cache_with_unknown_keyword": "final",
    "lose_the_cache": "use_cache is set, and no cache came",
    "swap_cos_and_sin": "logits are off by",
    "rename_mask_argument": "padding",
    "require_position_in_update": "position_ids",
}


def imitate(version, *changes, **variables):
    command = [sys.executable, str(FOLDER / "imitated_releases.py"), version, *changes]
    finished = subprocess.run(
        command, env=ENVIRONMENT | variables, capture_output=True, text=True, timeout=500, check=True
    )
    return json.loads(finished.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def outcomes():
    if release(NEWEST_TESTED_TRANSFORMERS) > TRANSFORMERS:
        pytest.skip(f"imitates changes to the source of transformers {NEWEST_TESTED_TRANSFORMERS}")
    return imitate(NEXT_RELEASE, *HARMLESS, *NAMED)


@pytest.mark.parametrize("change", sorted(HARMLESS))
def test_harmless_change_gives_equal_tokens_and_one_warning(outcomes, change):
    assert outcomes[change]["equal"] == {"v1": 1.0, "v2": 1.0}
    (warning,) = outcomes[change]["warnings"]
    assert NEWEST_TESTED_TRANSFORMERS in warning and NEXT_RELEASE in warning


@pytest.mark.parametrize("change", sorted(NAMED))
def test_change_that_loses_something_is_refused_by_name(outcomes, change):
    outcome = outcomes[change]
    assert outcome.get("error") == "UnsupportedTransformersError", outcome
    for expected in (NAMED[change], NEXT_RELEASE, OLDEST_TRANSFORMERS, NEWEST_TESTED_TRANSFORMERS, "update-code"):
        assert expected in outcome["message"]
    assert "\n" not in outcome["message"]


def test_lost_cache_is_refused_in_a_tested_release_too(outcomes):
    """As a patch release, or another package that changes LLaMA's layers, may do."""
    outcome = imitate(transformers.__version__, "lose_the_cache")["lose_the_cache"]
    assert outcome["error"] == "UnsupportedTransformersError" and "no cache came" in outcome["message"]


def test_patch_of_a_tested_release_is_checked_in_silence(outcomes):
    newer_patch = ".".join(map(str, (*release(NEWEST_TESTED_TRANSFORMERS)[:2], 99)))
    results = imitate(newer_patch, "nothing", "swap_cos_and_sin")
    assert results["nothing"] == {"equal": {"v1": 1.0, "v2": 1.0}, "warnings": []}
    assert results["swap_cos_and_sin"]["error"] == "UnsupportedTransformersError"


def test_switched_off_checks_warn_and_let_wrong_tokens_through(outcomes):
    """The second half shows that the changes are no mere labels: without the checks tokens are wrong."""
    results = imitate(NEXT_RELEASE, "nothing", "swap_cos_and_sin", DIFF_LLAMA_SKIP_CHECKS="1")
    for outcome in results.values():
        assert any("DIFF_LLAMA_SKIP_CHECKS" in warning for warning in outcome["warnings"])
    assert results["nothing"]["equal"] == {"v1": 1.0, "v2": 1.0}
    assert results["swap_cos_and_sin"]["equal"]["v1"] < 1


def test_this_release_has_the_known_structure():
    assert structural_difference() is None


@pytest.mark.parametrize(("package", "found"), [("transformers", "4.57.6"), ("torch", "2.10.1+cpu")])
def test_too_old_release_is_named_in_one_line(package, found):
    code = f"import {package}; {package}.__version__ = {found!r}; import modeling_diff"
    finished = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    oldest = OLDEST_TRANSFORMERS if package == "transformers" else OLDEST_TORCH
    error = finished.stderr.splitlines()[-1]
    assert error.startswith(f"ImportError: DiffLlama needs {package} >= {oldest}, found {package} {found}: ")
    assert finished.returncode == 1


@pytest.mark.parametrize(
    ("version", "expected"),
    [("5.25.0.dev0", (5, 25, 0)), ("2.13.0+cpu", (2, 13, 0)), ("2.11.0a0+git1", (2, 11, 0)), ("5.6", (5, 6))],
)
def test_release_reads_the_numbers_of_a_version(version, expected):
    assert release(version) == expected


@pytest.fixture
def untested_release(monkeypatch):
    """As under a release that no test has seen, before its first model."""
    monkeypatch.setattr(diff_transformers_check, "_behavior_checked", False)
    checked = []
    original = diff_transformers_check.behavioral_difference

    def counted(causal_lm_class):
        checked.append(causal_lm_class)
        return original(causal_lm_class)

    monkeypatch.setattr(diff_transformers_check, "behavioral_difference", counted)
    return checked


@pytest.mark.parametrize("head", [DiffLlamaForCausalLM, DiffLlamaForSequenceClassification])
def test_untested_release_is_checked_once_when_a_model_is_built(untested_release, tiny_config, variant, head):
    head(tiny_config(variant))
    head(tiny_config(variant, differential_layers=[1]))
    assert untested_release == [DiffLlamaForCausalLM]


def test_model_built_without_memory_is_checked_before_its_first_use(untested_release, tiny_config, random_ids):
    with torch.device("meta"):
        model = DiffLlamaForCausalLM(tiny_config("v1"))
    assert untested_release == []
    model.to_empty(device="cpu")
    model(random_ids(1, 4))
    model(random_ids(1, 4))
    assert untested_release == [DiffLlamaForCausalLM]


def test_loaded_model_is_checked_before_its_first_use(untested_release, tiny_model, random_ids, tmp_path):
    tiny_model("v2").save_pretrained(tmp_path)
    untested_release.clear()
    diff_transformers_check._behavior_checked = False
    model = DiffLlamaForCausalLM.from_pretrained(tmp_path)
    model.generate(random_ids(1, 4), max_new_tokens=2)
    assert untested_release == [DiffLlamaForCausalLM]


def test_compiled_first_use_is_checked_and_stays_one_graph(untested_release, tiny_config, random_ids):
    torch._dynamo.reset()
    with torch.device("meta"):
        model = DiffLlamaForCausalLM(tiny_config("v1"))
    model.to_empty(device="cpu")
    torch.compile(model, fullgraph=True, backend="eager")(random_ids(1, 4))
    assert untested_release == [DiffLlamaForCausalLM]


def test_check_leaves_random_numbers_and_default_dtype_alone(untested_release, tiny_config):
    torch.manual_seed(0)
    expected = DiffLlamaForCausalLM(tiny_config("v1")).lm_head.weight
    diff_transformers_check._behavior_checked = True
    torch.manual_seed(0)
    assert torch.equal(DiffLlamaForCausalLM(tiny_config("v1")).lm_head.weight, expected)
    assert torch.get_default_dtype() == torch.float32


@torch.no_grad()
def test_definition_of_the_check_equals_the_definition_of_the_tests(variant):
    """Two implementations that share no code; one layer is differential, the other plain."""
    from diff_llama_by_definition import logits_by_definition as independent_logits

    model = tiny_model(DiffLlamaForCausalLM, variant)
    input_ids = torch.tensor([[3, 1, 4, 1, 5, 9]])
    visible = torch.ones_like(input_ids)
    ours = logits_by_definition(model, input_ids, visible)
    torch.testing.assert_close(ours, independent_logits(model.state_dict(), model.config, input_ids))


def test_cache_under_an_unknown_name_is_refused():
    states = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ImportError, match=re.escape("a cache came as 'kv_store'")):
        append_to_cache(states, states, 0, None, None, {"kv_store": transformers.DynamicCache()})
