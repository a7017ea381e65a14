"""Checkpoints with code of different revisions in one process, and beside the package: each computes by its own."""

import json

import pytest
import torch
from hub_models import head_output

import modeling_diff
from modeling_diff import modeling_diff_llama


CASE = ("v1", "AutoModelForCausalLM")
REPO = "someone/diff"
CURRENT = "1" * 40
OLDER = "2" * 40
# An older revision of the code, as if it had computed lambda differently.
OLDER_CODE = """

_forward = DiffLambda.forward
DiffLambda.forward = lambda self, hidden_states=None: _forward(self) + 0.25
"""


@pytest.fixture(scope="module")
def older(saved, tmp_path_factory):
    """
    A copy of the V1 checkpoint with the older revision's code.

    In a folder of another name: transformers 5.17 takes the first model code that it has loaded for the same
    configuration code in folders of equal names.
    """
    folder = tmp_path_factory.mktemp("older")
    for file in saved[CASE].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    code = folder / "modeling_diff_llama.py"
    code.write_text(code.read_text() + OLDER_CODE)
    return folder


@pytest.fixture(scope="module")
def outputs(saved, expected):
    """What either revision computes, from our package and from a changed copy of its forward pass."""
    with pytest.MonkeyPatch.context() as patch:
        forward = modeling_diff_llama.DiffLambda.forward
        patch.setattr(modeling_diff_llama.DiffLambda, "forward", lambda self, hidden_states: forward(self) + 0.25)
        older = head_output(modeling_diff.DiffLlamaForCausalLM.from_pretrained(saved[CASE]))
    current = expected[CASE]["output"]
    assert (current - older).abs().max() > 1e-3
    return {"current": current, "older": older}


@pytest.fixture(scope="module")
def home(saved, older, put_in_hub_cache, tmp_path_factory):
    """A Hub cache with one repository in both revisions; the older one is `main`."""
    home = tmp_path_factory.mktemp("home")
    put_in_hub_cache(home, REPO, CURRENT, saved[CASE])
    put_in_hub_cache(home, REPO, OLDER, older)
    return home


def assert_reports(reports: list[dict], outputs: dict[str, torch.Tensor], revisions: list[str]) -> None:
    for report, revision in zip(reports, revisions, strict=True):
        torch.testing.assert_close(report["output"], outputs[revision], rtol=0, atol=1e-6)


def test_revisions_in_one_process_use_their_own_code(saved, older, home, outputs, fresh_process, tmp_path):
    jobs = {
        "current": [{"checkpoint": REPO, "revision": CURRENT}, {"checkpoint": str(saved[CASE])}],
        "older": [{"checkpoint": REPO}, {"checkpoint": str(older), "resaved": str(tmp_path)}],
    }
    order = ["current", "older", "older", "current", "current", "older"]
    taken = [jobs[revision][index % 2] for index, revision in enumerate(order)]
    assert_reports(fresh_process(taken, HF_HOME=str(home)), outputs, order)
    assert OLDER_CODE in (tmp_path / "modeling_diff_llama.py").read_text()


def test_older_code_beside_the_package_leaves_both_as_they_are(saved, older, home, outputs, fresh_process):
    """transformers prefers what is installed, for a trusted checkpoint too; its own code is there by its class."""
    job = [
        {"checkpoint": str(saved[CASE])},
        {"checkpoint": str(older), "by": "code"},
        {"checkpoint": REPO, "by": "code", "revision": OLDER},
        {"checkpoint": str(older)},
        {"checkpoint": REPO},
    ]
    reports = fresh_process(job, with_package=True, HF_HOME=str(home))
    assert_reports(reports, outputs, ["current", "older", "older", "current", "current"])
    for report, package in zip(reports, [True, False, False, True, True], strict=True):
        assert report["module"].startswith("modeling_diff." if package else "transformers_modules.")


def test_checkpoint_of_a_later_format_keeps_its_fields(saved, tmp_path):
    """A field that this revision does not know is neither an error nor lost on the way through."""
    for file in saved[CASE].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text()) | {"field_of_a_later_revision": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = modeling_diff.DiffLlamaForCausalLM.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["field_of_a_later_revision"] == 3
