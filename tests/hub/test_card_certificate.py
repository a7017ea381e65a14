"""A certificate goes up and onto the card with the weights that it is of, and with no others."""

import json
import shutil

import pytest
from huggingface_hub import ModelCard

from conversion.checkpoint.file_identity import file_sha256
from conversion.hub.upload_files import is_replaced
from conversion.push import plan_upload


MEASURE = {
    "name": "KL",
    "unit": "nats/token",
    "source": 0.0,
    "model": 1.8528,
    "relative": 0.1568,
    "threshold": 0.9,
    "details": {},
    "outcome": "failed",
}
FACTS = {"name": "facts", "unit": "share", "source": 0.0, "model": 0.25, "relative": None, "threshold": None}


@pytest.fixture(params=["v1", "v2"])
def folder(converted, tmp_path, request):
    """With a certificate of its weights."""
    folder = shutil.copytree(converted[request.param], tmp_path / request.param)
    certificate = {
        "format": "diff-llama certificate",
        "suite": 1,
        "passed": False,
        "failed": ["KL"],
        "model": {
            "name": "x",
            "variant": request.param,
            "promise": "parity",
            "weights": {path.name: file_sha256(path) for path in folder.glob("*.safetensors")},
        },
        "source": {"name": "llama", "hub_id": None, "revision": None, "weights": {}},
        "seed": 0,
        "data": {},
        "measures": [MEASURE, FACTS | {"details": {}, "outcome": "measured"}],
        "literature": [{"what": "another | one", "relative": 0.983, "source": "arXiv:2505.03005"}],
        "judge": None,
        "environment": {},
    }
    (folder / "certificate.json").write_text(json.dumps(certificate))
    return folder


def edit(folder, **changes):
    found = json.loads((folder / "certificate.json").read_text())
    (folder / "certificate.json").write_text(json.dumps(found | changes))


def test_card_shows_the_certificate_that_goes_up(folder):
    plan = plan_upload(folder, "me/Llama-x")
    assert plan.contents["certificate.json"] == folder / "certificate.json"
    text = ModelCard(plan.contents["README.md"].decode()).text
    section = text[text.index("## Certificate") : text.index("## Sizes")]
    assert "**Below its threshold: KL.**" in section
    assert "| KL (nats/token) | 0.000 | 1.853 | 15.7% | 90% |" in section
    assert "| facts | 0.0% | 25.0% | - | not judged |" in section
    assert "98.3%" in section and "--check" in section


def test_verdict_without_a_failure_says_so(folder):
    edit(folder, passed=True, failed=[], measures=[MEASURE | {"outcome": "passed", "relative": 0.95}])
    card = plan_upload(folder, "me/Llama-x").contents["README.md"].decode()
    assert "Every measure that is judged reaches its threshold." in card and "**Below" not in card


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model": {"name": "x", "variant": "v1", "promise": "parity", "weights": {}}}, "is of other weights"),
        ({"suite": 7}, "of suite 7"),
        ({"format": "x509"}, "not a certificate"),
        ({"failed": []}, "passed is False"),
    ],
)
def test_other_certificates_stay_behind_with_a_note(folder, change, reason):
    edit(folder, **change)
    plan = plan_upload(folder, "me/Llama-x")
    assert "certificate.json" not in plan.contents
    assert "## Certificate" not in plan.contents["README.md"].decode()
    assert any(note.startswith("certificate.json is left out: ") and reason in note for note in plan.notes)


def test_certificate_of_earlier_weights_leaves_the_repository():
    assert is_replaced("certificate.json") and not is_replaced("README.md")
