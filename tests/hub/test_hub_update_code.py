"""
Checkpoints with the code of commit 5dc5cd9, which loses the cache under transformers 5.24, and what cures them.

From a folder and from a Hub on the loopback interface with the real client: loaded with and without our package,
updated, and loaded again from the same caches.
"""

import json

import pytest
import torch
import transformers
from hub_models import TOKENS, VARIANTS
from loopback_hub import LoopbackHub
from old_code import old_code, with_old_code
from packaging.version import Version

import modeling_diff
from conversion.hub.bundle import code_files


# The code of 5dc5cd9 was written for transformers 5.17 and later.
pytestmark = pytest.mark.transformers(since="5.16", reason="the old code does not load in it")
ROADS = ("folder", "hub")
WRONG = Version(transformers.__version__) >= Version("5.24")  # where the old code does not know the cache's name


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def places(hub, converted, tmp_path_factory):
    """Old checkpoints by road and variant."""
    home = tmp_path_factory.mktemp("old")
    found = {}
    for variant in VARIANTS:
        folder = with_old_code(converted[variant], home / variant)
        hub.add(f"me/old-{variant}", {path.name: path.read_bytes() for path in folder.iterdir()})
        found["folder", variant] = str(folder)
        found["hub", variant] = f"me/old-{variant}"
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.add("me/edited", files | {"diff_attention.py": files["diff_attention.py"] + b"# mine\n"})
    hub.add("me/llama", {"config.json": b'{"model_type": "llama"}'})
    hub.add("me/adapter", {"adapter_config.json": b"{}"})
    return found


@pytest.fixture(scope="module")
def stories(hub, places, run_calls, tmp_path_factory):
    """What three processes find: without our package, with it (which then updates), without it again."""
    home = tmp_path_factory.mktemp("stories")
    environment = hub.environment(home / "cache")
    loads = {place: ("load_and_report", {"checkpoint": checkpoint}) for place, checkpoint in places.items()}
    found = {"alone": run_calls(loads, home / "alone", **environment)}
    before = {variant: hub.files(f"me/old-{variant}") for variant in VARIANTS}
    calls = dict(loads)
    calls["dry"] = ("update", {"target": "me/old-v1", "dry_run": True})
    for refused in ("edited", "llama", "adapter", "absent"):
        calls[refused] = ("update", {"target": f"me/{refused}"})
    calls |= {("update", *place): ("update", {"target": checkpoint}) for place, checkpoint in places.items()}
    calls |= {("again", *place): ("update", {"target": checkpoint}) for place, checkpoint in places.items()}
    found["package"] = run_calls(calls, home / "package", with_package=True, **environment)
    found["cured"] = run_calls(loads, home / "cured", **environment)
    return found | {"before": before}


@pytest.fixture(scope="module")
def right(converted):
    """Greedy tokens from whole prompts, without any cache."""
    found = {}
    for variant in VARIANTS:
        model = modeling_diff.DiffLlamaForCausalLM.from_pretrained(converted[variant]).eval()
        tokens = TOKENS
        for _ in range(6):
            with torch.no_grad():
                logits = model(tokens, use_cache=False).logits
            tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), dim=1)
        found[variant] = tokens
    return found


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("road", ROADS)
def test_old_code_alone_is_wrong_from_5_24_on_and_right_before(stories, right, road, variant):
    report = stories["alone"][road, variant]
    assert report["module"].startswith("transformers_modules.")
    assert torch.equal(report["generated"], right[variant]) is not WRONG


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("road", ROADS)
def test_imported_package_computes_right_tokens_from_an_old_checkpoint(stories, right, road, variant):
    report = stories["package"][road, variant]
    assert report["module"] == "modeling_diff.modeling_diff_llama"
    assert torch.equal(report["generated"], right[variant])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("road", ROADS)
def test_updated_code_alone_computes_right_tokens(stories, right, road, variant):
    report = stories["cured"][road, variant]
    assert report["module"].startswith("transformers_modules.")
    assert torch.equal(report["generated"], right[variant])


@pytest.mark.parametrize("variant", VARIANTS)
def test_update_on_the_hub_is_one_commit_of_code_and_record(hub, stories, variant):
    before = stories["before"][variant]
    after = hub.files(f"me/old-{variant}")
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    today = {name: path.read_bytes() for name, path in code_files().items()}
    assert {name: content for name, content in after.items() if name.endswith(".py")} == today
    written = {name for name in today if old_code().get(name) != today[name]} | {"conversion.json"}
    removed = old_code().keys() - today.keys()
    assert changed == written | removed
    report = stories["package"]["update", "hub", variant]
    assert report["written"].keys() == written and set(report["removed"]) == removed
    assert report["commit"] == hub.repositories[f"me/old-{variant}"].refs["main"]
    records = [json.loads(files["conversion.json"]) for files in (before, after)]
    assert {**records[0], "sha256": None} == {**records[1], "sha256": None}


def test_second_update_changes_nothing(hub, stories):
    for road in ROADS:
        report = stories["package"]["again", road, "v2"]
        assert report["written"] == {} and report["commit"] is None
    assert len(hub.repositories["me/old-v2"].commits) == 2


def test_dry_run_on_the_hub_commits_nothing(hub, stories):
    report = stories["package"]["dry"]
    assert report["dry_run"] and "diff_transformers_compat.py" in report["written"] and report["commit"] is None
    assert "older than diff-llama's" in report["before"] and "5.24" in report["before"]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("edited", "me/edited/diff_attention.py: not as any diff-llama wrote it"),
        ("llama", "me/llama/config.json: model_type is 'llama'"),
        ("adapter", "me/adapter: an adapter"),
        ("absent", "no such repository"),
    ],
)
def test_what_is_not_ours_on_the_hub_is_refused_by_its_name(stories, name, told):
    refusal = stories["package"][name]["refusal"]
    assert told in refusal and "\n" not in refusal and "/tmp" not in refusal
