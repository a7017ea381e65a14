"""A certificate goes up and onto the card with the weights that it is of, and with no others."""

import json
import shutil

import pytest
from huggingface_hub import ModelCard

from conversion.checkpoint.file_identity import fields_sha256, file_sha256
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


def read(path):
    return json.loads(path.read_text())


def edit(folder, name="certificate.json", **changes):
    (folder / name).write_text(json.dumps(read(folder / name) | changes))


def state_config(folder):
    """In the certificate, as it is written today."""
    fields = fields_sha256(read(folder / "config.json"))
    edit(folder, model=read(folder / "certificate.json")["model"] | {"config_fields": fields})


def report(folder):
    check = {"name": "converted", "outcome": "measured", "detail": "", "values": {"loss_nats": 0.1234}}
    return {"promise": read(folder / "conversion.json")["promise"]["kind"], "passed": True, "checks": [check]}


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


def idle_config(folder):
    """Fields that no number depends on, as owners of a model change them."""
    idle = {"use_cache": False, "dtype": "bfloat16", "eos_token_id": [2, 5], "transformers_version": "9.0.0"}
    edit(folder, "config.json", **idle, architectures=["Other"], _name_or_path="me/x")


def other_attention(folder):
    config = read(folder / "config.json")
    lambdas = {"lambda_init": [0.4] * config["num_hidden_layers"]}
    edit(folder, "config.json", **lambdas if config["variant"] == "v1" else {"use_qk_norm": True})


def other_rotary(folder):
    edit(folder, "config.json", rope_parameters={"rope_theta": 500.0, "rope_type": "default"})


@pytest.mark.parametrize("change", [other_attention, other_rotary])
@pytest.mark.parametrize("stated", [True, False], ids=["certificate with config", "older certificate"])
def test_config_that_numbers_depend_on_takes_the_numbers_along(folder, change, stated):
    """An older certificate, too, and the figures of record and report; the weights are as they were."""
    if stated:
        state_config(folder)
    before = plan_upload(folder, "me/Llama-x", verification=report(folder))
    card = before.contents["README.md"].decode()
    assert "certificate.json" in before.contents and "| KL (nats/token)" in card and "0.1234" in card
    assert "At the end of the conversion: " in card and "was changed after the conversion" not in card
    change(folder)
    plan = plan_upload(folder, "me/Llama-x", verification=report(folder))
    card = plan.contents["README.md"].decode()
    assert "certificate.json" not in plan.contents and "KL" not in card and "0.1234" not in card
    assert "At the end of the conversion: " not in card and "`config.json` was changed after the conversion" in card
    said = [note for note in plan.notes if "config.json" in note]
    assert len(said) == 2 and said[0].startswith("certificate.json is left out: certificate.json is of another config")
    assert said[1].startswith("config.json has changed since the conversion") and "convert again" in said[1]


@pytest.mark.parametrize("stated", [True, False], ids=["certificate with config", "older certificate"])
def test_config_that_no_number_depends_on_is_the_owners(folder, stated):
    if stated:
        state_config(folder)
    idle_config(folder)
    plan = plan_upload(folder, "me/Llama-x")
    assert "certificate.json" in plan.contents and not [note for note in plan.notes if "config.json" in note]
    assert "At the end of the conversion: " in plan.contents["README.md"].decode()


def test_any_change_may_matter_to_an_older_record(folder):
    """Which has the hash of config.json alone, and without a change nothing to say."""
    edit(folder, "conversion.json", config_fields=None)
    assert not [note for note in plan_upload(folder, "me/Llama-x").notes if "config.json" in note]
    idle_config(folder)
    plan = plan_upload(folder, "me/Llama-x")
    assert "certificate.json" not in plan.contents and any("has changed since" in note for note in plan.notes)
    assert "At the end of the conversion: " not in plan.contents["README.md"].decode()


def test_certificate_of_earlier_weights_leaves_the_repository():
    assert is_replaced("certificate.json") and not is_replaced("README.md")
