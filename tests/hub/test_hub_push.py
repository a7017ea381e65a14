"""`diff-llama push` with the real client: what goes up, where to, who may see it, and what the card says."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from hub_models import LICENSE_TEXT
from huggingface_hub import ModelCard
from loopback_hub import TOKEN
from safetensors.torch import load_file, save_file

import modeling_diff
from conversion import ConversionError, convert_checkpoint, push_checkpoint, verify_checkpoint
from conversion.hub.upload_files import read_upload_folder
from conversion.record import read_record


REPO = "me/Llama-tiny-diff"
STRAY = {
    "optimizer.pt": "state",
    "rng_state.pth": "state",
    "training_args.bin": "state",
    "trainer_state.json": "{}",
    "token": TOKEN,
    ".env": f"HF_TOKEN={TOKEN}",
    "events.out.tfevents.1": "log",
    "model-00009-of-00009.safetensors": "a shard of another run",
    "modeling_other.py": "raise SystemExit",
    ".git/config": "[core]",
    ".cache/huggingface/x.lock": "",
    "checkpoint-10/model.safetensors": "weights",
    "__pycache__/modeling_diff_llama.pyc": "code",
    ".v1.calibration/layer.safetensors": "work",
}


@pytest.fixture(scope="module")
def folders(converted, llama, tmp_path_factory):
    """Folders to push, by name."""
    home = tmp_path_factory.mktemp("folders")
    found = dict(converted)
    found["v1 before"] = {path.name: path.read_bytes() for path in converted["v1"].iterdir()}

    def copy(name: str, source: Path) -> Path:
        found[name] = home / name
        return Path(shutil.copytree(source, found[name]))

    littered = copy("littered", converted["v1"])
    for name, text in STRAY.items():
        (littered / name).parent.mkdir(parents=True, exist_ok=True)
        (littered / name).write_text(text)
    own_card = copy("own_card", converted["v2"]) / "README.md"
    own_card.write_text("---\nlicense: llama3.2\n---\n\n# Mine\n")
    bad_card = copy("bad_card", converted["v2"]) / "README.md"
    bad_card.write_text("---\nlicense: no-such-license\n---\n\n# Mine\n")
    open_source = copy("open_source", llama)
    (open_source / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    found["open"] = home / "open"
    convert_checkpoint(open_source, found["open"], "v2")
    found["whole"] = home / "whole"
    convert_checkpoint(llama, found["whole"], "v1", uncalibrated=True, lambda_init="paper")
    found["verification"] = home / "verification.json"
    texts = [" ".join(f"w{3 + (start + step * 7) % 45}" for step in range(24)) for start in (0, 5)]
    verified = verify_checkpoint(converted["v1"], llama, texts=texts)
    found["verification"].write_text(json.dumps(verified.to_dict()))
    return found


@pytest.fixture(scope="module")
def reports(folders, run_pushes):
    def push(folder: str, *options: str, repo: str = REPO, **more) -> dict:
        return {"arguments": [str(folders[folder]), repo, *options], **more}

    public = {REPO: {"private": False}}
    steps = {
        "dry": push("v1", "--dry-run"),
        "first": push("v1"),
        "repeated": push("v1", fresh=False),
        "resharded": push("whole", fresh=False),
        "branch": push("v2", "--revision", "two", fresh=False),
        "pull_request": push("v2", "--create-pr", fresh=False),
        "pull_request_nowhere": push("v2", "--create-pr"),
        "littered": push("littered"),
        "public_as_asked": push("v1", "--public"),
        "already_public": push("v1", repositories=public),
        "already_public_as_asked": push("v1", "--public", repositories=public),
        "open": push("open", "--json"),
        "open_private": push("open", "--private"),
        "own_card": push("own_card"),
        "bad_card": push("bad_card"),
        "verified": push("v1", "--verification", str(folders["verification"])),
        "exported": push("v1", "--format", "diffllama"),
        "not_exportable": push("v2", "--format", "diffllama"),
        "other_owner": push("v1", repo="someone/else"),
        "renamed": push("v1", repo="me/my-model"),
    }
    return dict(zip(steps, run_pushes(list(steps.values())), strict=True))


def uploaded(report: dict, ref: str = "main") -> dict[str, bytes]:
    assert report["exit_code"] == 0, report["stderr"]
    return report["files"][REPO][ref]


def card(report: dict) -> ModelCard:
    return ModelCard(uploaded(report)["README.md"].decode())


def test_dry_run_lists_files_and_bytes_and_asks_nothing(reports, converted):
    report = reports["dry"]
    assert report["exit_code"] == 0 and report["endpoints"] == [] and report["files"] == {}
    for path in converted["v1"].iterdir():
        assert path.name in report["stdout"]
    assert f"{(converted['v1'] / 'tokenizer.json').stat().st_size:,}" in report["stdout"]
    total = int(re.search(r"files +([\d,]+)", report["stdout"])[1].replace(",", ""))
    assert total == sum(len(content) for content in uploaded(reports["first"]).values())


def test_everything_goes_up_byte_for_byte_but_for_the_card(reports, converted):
    files = uploaded(reports["first"])
    expected = {path.name: path.read_bytes() for path in converted["v1"].iterdir()}
    assert files.keys() == expected.keys()
    assert {name: content for name, content in files.items() if name != "README.md"} == {
        name: content for name, content in expected.items() if name != "README.md"
    }
    assert {"LICENSE.txt", "USE_POLICY.md", "modeling_diff_llama.py", "tokenizer.json"} <= files.keys()
    assert sum(name.endswith(".safetensors") for name in files) > 1


def test_one_commit_makes_it_visible(reports):
    assert reports["first"]["endpoints"].count("commit") == 1


def test_pushing_the_same_again_makes_no_commit(reports):
    assert reports["repeated"]["exit_code"] == 0
    assert reports["repeated"]["refs"] == reports["first"]["refs"]


def test_shards_of_an_earlier_upload_are_removed_in_the_same_commit(reports):
    before, after = uploaded(reports["repeated"]), uploaded(reports["resharded"])
    assert "model.safetensors.index.json" in before and "model.safetensors" not in before
    assert [name for name in after if "safetensors" in name] == ["model.safetensors"]
    assert reports["resharded"]["endpoints"].count("commit") == 1


def test_branch_and_pull_request_leave_main_as_it_is(reports):
    for name, ref in (("branch", "two"), ("pull_request", "refs/pr/1")):
        assert uploaded(reports[name]) == uploaded(reports["resharded"])
        assert json.loads(uploaded(reports[name], ref)["config.json"])["variant"] == "v2"
    assert "/discussions/1" in reports["pull_request"]["stdout"]
    assert reports["pull_request_nowhere"]["exit_code"] == 1
    assert "a pull request needs it" in reports["pull_request_nowhere"]["stderr"]


def test_only_the_allow_list_goes_up(reports):
    assert uploaded(reports["littered"]) == uploaded(reports["first"])


def test_gated_base_is_private_unless_asked_otherwise(reports):
    assert reports["first"]["private"] == {REPO: True}
    assert "private, as the base is under the Llama 3.2 Community License" in reports["first"]["stdout"]
    assert reports["public_as_asked"]["private"] == {REPO: False}
    assert "public as asked, though" in reports["public_as_asked"]["stdout"]


def test_gated_base_does_not_slip_into_a_public_repository(reports):
    report = reports["already_public"]
    assert report["exit_code"] == 1 and "--public" in report["stderr"] and report["files"][REPO]["main"] == {}
    assert reports["already_public_as_asked"]["exit_code"] == 0


def test_open_base_is_as_the_hub_has_it_by_default(reports):
    assert reports["open"]["private"] == {REPO: False} and reports["open_private"]["private"] == {REPO: True}
    report = json.loads(reports["open"]["stdout"])
    assert report["commit"] == reports["open"]["refs"][REPO]["main"]
    assert report["files"]["config.json"] == len(uploaded(reports["open"])["config.json"])


def test_name_rule_of_the_license_is_a_warning(reports):
    assert "begin with 'Llama'" in reports["renamed"]["stdout"] and reports["renamed"]["exit_code"] == 0
    assert "begin with 'Llama'" not in reports["first"]["stdout"]


def test_notice_that_the_license_asks_for_is_named(reports):
    assert "Notice file that says: Llama 3.2 is licensed under" in reports["first"]["stdout"]


def test_own_card_goes_up_as_it_is(reports, folders):
    assert uploaded(reports["own_card"])["README.md"] == (folders["own_card"] / "README.md").read_bytes()
    assert "README.md is your own" in reports["own_card"]["stdout"]


def test_card_that_the_hub_refuses_stops_before_anything_is_uploaded(reports):
    report = reports["bad_card"]
    assert report["exit_code"] == 1 and "Invalid metadata in README.md" in report["stderr"]
    assert "put" not in report["endpoints"] and report["files"][REPO]["main"] == {}


def test_card_names_the_repository_and_inherits_the_license(reports):
    found = card(reports["first"])
    assert found.data.license == "llama3.2" and found.data.language == "en"
    assert found.data.library_name == "transformers" and found.data.pipeline_tag == "text-generation"
    assert found.data.get("base_model_relation") is None
    assert f'from_pretrained("{REPO}"' in found.text and "**Built with Llama**" in found.text
    assert "needs healing" in found.text


def test_measured_numbers_reach_card_and_model_index(reports, folders):
    checks = {check["name"]: check for check in json.loads(folders["verification"].read_text())["checks"]}
    values = checks["converted"]["values"]
    results = {result.metric_type: result.metric_value for result in card(reports["verified"]).data.eval_results}
    assert results == {key: pytest.approx(value, abs=1e-6) for key, value in values.items()}
    assert f"| {values['kl_nats']:.4g} |" in card(reports["verified"]).text
    measured = read_record(folders["v1"])["measured"]["values"]
    results = {result.metric_type: result.metric_value for result in card(reports["first"]).data.eval_results}
    assert results == {key: pytest.approx(value, abs=1e-6) for key, value in measured.items()}


def test_export_goes_up_without_code_and_is_the_same_function(reports, converted, tmp_path):
    for name, content in uploaded(reports["exported"]).items():
        (tmp_path / name).write_bytes(content)
    assert not list(tmp_path.glob("*.py")) and (tmp_path / "LICENSE.txt").read_text() == LICENSE_TEXT
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs).__module__ == "transformers.models.diffllama.modeling_diffllama"
    ours = modeling_diff.DiffLlamaForCausalLM.from_pretrained(converted["v1"])
    tokens = torch.arange(3, 20)[None]
    # float32, sums in another order
    torch.testing.assert_close(theirs(tokens).logits, ours(tokens).logits, rtol=1e-4, atol=1e-4)
    assert reports["not_exportable"]["exit_code"] == 1 and "cannot be exported" in reports["not_exportable"]["stderr"]


def test_export_inherits_card_and_gate(reports):
    assert card(reports["exported"]).data.license == "llama3.2" and reports["exported"]["private"] == {REPO: True}


def test_somebody_elses_namespace_is_refused(reports):
    assert reports["other_owner"]["exit_code"] == 1 and "HTTP 403" in reports["other_owner"]["stderr"]


def test_folder_is_left_as_it_was(reports, folders):
    assert reports["verified"]["exit_code"] == 0
    assert {path.name: path.read_bytes() for path in folders["v1"].iterdir()} == folders["v1 before"]


def refusal(folder: Path, repo: str = REPO, **options) -> str:
    with pytest.raises(ConversionError) as caught:
        push_checkpoint(folder, repo, dry_run=True, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["README.md", "conversion.json", "tokenizer_config.json", "LICENSE.txt"])
def test_file_with_a_token_is_refused_without_repeating_it(converted, tmp_path, name):
    folder = shutil.copytree(converted["v2"], tmp_path / "v2")
    (folder / name).write_text(json.dumps({"token": TOKEN}))
    message = refusal(folder)
    assert message.startswith(f"{name}: holds a Hub token") and TOKEN not in message


def test_file_that_leads_out_of_the_folder_is_refused(converted, tmp_path):
    folder = shutil.copytree(converted["v2"], tmp_path / "v2")
    (tmp_path / "secret").write_text("mine")
    (folder / "LICENSE").symlink_to(tmp_path / "secret")
    assert "outside the folder" in refusal(folder)


@pytest.mark.parametrize("target", ["../evil.Class", "other/repo--modeling.Class", "/etc/x.Class"])
def test_code_elsewhere_is_refused(converted, tmp_path, target):
    folder = shutil.copytree(converted["v2"], tmp_path / "v2")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"]["AutoModel"] = target
    (folder / "config.json").write_text(json.dumps(config))
    assert "auto_map names" in refusal(folder)


def test_folders_that_a_stranger_could_not_load_are_refused(converted, llama, tmp_path):
    assert "does not exist" in refusal(tmp_path / "nowhere")
    assert "expected diff_llama" in refusal(llama)
    folder = shutil.copytree(converted["v2"], tmp_path / "no_code")
    (folder / "diff_attention.py").unlink()
    assert "diff_attention.py: missing" in refusal(folder)
    folder = shutil.copytree(converted["v2"], tmp_path / "no_shard")
    sorted(folder.glob("*.safetensors"))[0].unlink()
    assert "missing" in refusal(folder)


def test_record_of_other_weights_is_not_published(converted, tmp_path):
    folder = shutil.copytree(converted["v2"], tmp_path / "v2")
    model = modeling_diff.DiffLlamaForCausalLM.from_pretrained(folder)
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    model.lm_head.weight.data += 1
    # Not save_pretrained, which takes the record out of use itself.
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    assert "conversion.json" in refusal(folder) or "missing" in refusal(folder)
    (folder / "conversion.json").unlink()
    assert push_checkpoint(folder, REPO, dry_run=True).files


def test_verification_that_failed_or_is_of_another_model_is_refused(converted):
    failed = {"promise": "bit-exact", "passed": False, "checks": [{"name": "logits", "outcome": "failed"}]}
    assert "the verification failed (logits)" in refusal(converted["v2"], verification=failed)
    assert "verify this folder" in refusal(converted["v2"], verification=failed | {"promise": "parity"})


def test_arguments_that_cannot_be_are_refused(converted):
    assert "OWNER/NAME" in refusal(converted["v2"], repo="name")
    assert "goes to main" in refusal(converted["v2"], create_pr=True, revision="two")
    assert "native, diffllama" in refusal(converted["v2"], format="gguf")


# peft 0.21 asks for it.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapter_goes_up_without_the_base(converted, tmp_path):
    """With a note on each of the two things that keep others from loading it."""
    peft = pytest.importorskip("peft")
    model = modeling_diff.DiffLlamaForCausalLM.from_pretrained(converted["v1"])
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    notes = " ".join(push_checkpoint(tmp_path, REPO, dry_run=True).notes)
    assert "by a local path" in notes and "auto_mapping" in notes
    (tmp_path / "optimizer.pt").write_text("state")
    found = read_upload_folder(tmp_path)
    assert found.kind == "adapter"
    assert found.files.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert load_file(found.files["adapter_model.safetensors"])
