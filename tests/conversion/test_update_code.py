"""`update-code` in a folder: what it changes, what it leaves alone, what it refuses, and what a kill leaves behind."""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from command_line import run
from killed_processes import die_at_step, no_sync, run_victim
from random_llamas import edit_json, random_diffllama, random_llama, saved
from saved_checkpoints import snapshot

from conversion import (
    ConversionError,
    FilesError,
    convert_checkpoint,
    update_checkpoint_code,
    verify_checkpoint,
)
from conversion.checkpoint.output_folder import locked
from conversion.describe import describe_checkpoint
from conversion.hub import bundle
from conversion.hub.bundle import code_files
from conversion.push import plan_upload
from modeling_diff.diff_transformers_compat import NEWEST_TESTED_TRANSFORMERS, OLDEST_TORCH, OLDEST_TRANSFORMERS


sys.path.append(str(Path(__file__).parents[1] / "hub"))
from old_code import old_code, with_old_code


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return saved(random_llama(), tmp_path_factory.mktemp("sources") / "llama")


@pytest.fixture(scope="module")
def converted(llama, tmp_path_factory):
    """Not to be changed."""
    folder = tmp_path_factory.mktemp("converted") / "v2"
    convert_checkpoint(llama, folder, "v2", max_shard_size="20KB")
    return folder


@pytest.fixture
def old(converted, tmp_path):
    """The checkpoint with the code of 5dc5cd9, to be changed."""
    return with_old_code(converted, tmp_path / "old")


def identities(folder: Path, pattern: str) -> dict[str, tuple[int, int]]:
    """Inode and time of change, by name: equal only for a file that nobody wrote."""
    stats = {path.name: path.stat() for path in folder.glob(pattern)}
    return {name: (stat.st_ino, stat.st_ctime_ns) for name, stat in stats.items()}


def test_update_leaves_the_folder_as_a_conversion_of_today(old, converted, llama):
    weights = identities(old, "*.safetensors")
    assert len(weights) > 2
    result = run("update-code", old)
    assert result.exit_code == 0, result.stderr
    assert snapshot(old) == snapshot(converted)
    assert identities(old, "*.safetensors") == weights
    assert verify_checkpoint(old, against=llama).passed
    assert "older than diff-llama's" in result.stdout and "importing modeling_diff" in result.stdout


def test_dry_run_says_the_same_and_changes_nothing(old):
    before = identities(old, "*")
    promised = json.loads(run("update-code", old, "--dry-run", "--json").stdout)
    assert identities(old, "*") == before
    done = json.loads(run("update-code", old, "--json").stdout)
    assert promised | {"dry_run": False} == done
    assert done["written"].keys() > {"diff_transformers_compat.py", "conversion.json"}


def test_second_update_writes_nothing(old):
    update_checkpoint_code(old)
    before = identities(old, "*")
    report = update_checkpoint_code(old)
    assert not report.written and "nothing to do" in report.notes[0]
    assert identities(old, "*") == before


def test_auto_map_gets_all_heads_and_config_keeps_all_else(old):
    """Whatever else is there: fields of no known meaning, an own tokenizer class, numbers as they were written."""
    config = json.loads((old / "config.json").read_text())
    full = config.pop("auto_map")
    tokenizer = {"AutoTokenizer": ["tokenization_mine.Mine", None]}
    some = {"AutoConfig": full["AutoConfig"], "AutoModelForCausalLM": f"me/there--{full['AutoModelForCausalLM']}"}
    config |= {"auto_map": some | tokenizer, "rms_norm_eps": 1e-7, "field_of_mine": [1, {"b": 2.5, "a": None}]}
    (old / "config.json").write_text(json.dumps(config))
    update_checkpoint_code(old)
    written = json.loads((old / "config.json").read_text())
    assert list(written) == list(config), "in their order"
    assert written == config | {"auto_map": full | tokenizer}


def test_checksum_of_a_config_edited_since_is_not_renewed(old):
    """What `verify` would have told, it still tells; a config that the update alone changed passes."""
    config = json.loads((old / "config.json").read_text())
    del config["auto_map"]["AutoModel"]
    (old / "config.json").write_text(json.dumps(config))
    record = json.loads((old / "conversion.json").read_text())
    update_checkpoint_code(old)
    assert (
        json.loads((old / "conversion.json").read_text())["sha256"]["config.json"] == record["sha256"]["config.json"]
    )
    outcomes = {check.name: check.outcome for check in verify_checkpoint(old).checks}
    assert outcomes["checksums"] == "failed"


def test_checkpoint_without_record_or_code_gets_the_code_alone(old):
    """As the Trainer saves them, and as someone left them who deleted all code."""
    (old / "conversion.json").unlink()
    for path in old.glob("*.py"):
        path.unlink()
    edit_json(old / "config.json", auto_map=None)
    update_checkpoint_code(old)
    assert {path.name for path in old.glob("*.py")} == code_files().keys()
    assert len(json.loads((old / "config.json").read_text())["auto_map"]) == 6
    assert not (old / "conversion.json").exists()


def test_known_code_without_a_record_is_updated_without_force(old):
    (old / "conversion.json").unlink()
    update_checkpoint_code(old)
    assert (old / "modeling_diff_llama.py").read_bytes() == code_files()["modeling_diff_llama.py"].read_bytes()


def test_files_that_today_s_code_lacks_are_removed_and_others_stay(old, monkeypatch):
    former = b"from .diff_attention import eager_attention_forward\n"
    known = bundle.known_code() | {"diff_former.py": {hashlib.sha256(former).hexdigest()[:16]}}
    monkeypatch.setattr(bundle, "known_code", lambda: known)
    (old / "diff_former.py").write_bytes(former)
    (old / "train_mine.py").write_text("print('mine')")
    renamed = {"diff_attention_check.py", "diff_attention_fused.py", "diff_attention_kernels.py"}  # of the old code
    assert set(update_checkpoint_code(old).removed) == {"diff_former.py"} | renamed
    assert not any((old / name).exists() for name in renamed)
    assert not (old / "diff_former.py").exists() and (old / "train_mine.py").exists()


def test_edited_code_is_refused_by_name_and_replaced_when_asked(old):
    with (old / "diff_attention.py").open("a") as file:
        file.write("# mine\n")
    before = snapshot(old)
    refused = run("update-code", old)
    assert refused.exit_code == 1 and refused.stderr.count("\n") == 1
    assert f"{old / 'diff_attention.py'}: not as any diff-llama wrote it" in refused.stderr
    assert "--force" in refused.stderr
    with pytest.raises(ConversionError, match="force=True"):
        update_checkpoint_code(old)
    assert snapshot(old) == before
    report = update_checkpoint_code(old, force=True)
    assert "diff_attention.py was edited, and is replaced" in report.notes
    assert b"# mine" not in (old / "diff_attention.py").read_bytes()


def test_newer_code_is_not_taken_back_unless_asked(old):
    update_checkpoint_code(old)
    compat = old / "diff_transformers_compat.py"
    lines = compat.read_text().splitlines(keepends=True)
    later = ['NEWEST_TESTED_TRANSFORMERS = "6.1.0"\n' if line.startswith("NEWEST_") else line for line in lines]
    compat.write_text("".join(later))
    digest = hashlib.sha256(compat.read_bytes()).hexdigest()
    record = json.loads((old / "conversion.json").read_text())
    edit_json(old / "conversion.json", sha256=record["sha256"] | {compat.name: digest})  # as its conversion wrote it
    with pytest.raises(ConversionError, match="newer than this diff-llama's"):
        update_checkpoint_code(old)
    assert "upgrade diff-llama" in describe_checkpoint(old)["code"]["state"]
    assert compat.name in update_checkpoint_code(old, force=True).written


def foreign(folder: Path) -> None:
    edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_theirs.Model"})
    (folder / "modeling_theirs.py").write_text("raise SystemExit")


def linked(folder: Path) -> None:
    (folder / "config.json").rename(folder / "blob")
    (folder / "config.json").symlink_to("blob")


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (foreign, "auto_map takes the model from modeling_theirs.py, which is not diff-llama's"),
        (linked, "config.json: a link, as in the Hub's cache"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda folder: (folder / "config.json").unlink(), "config.json: missing"),
        (lambda folder: edit_json(folder / "config.json", model_type="diffllama"), "model_type is 'diffllama'"),
    ],
)
def test_what_is_not_ours_is_refused_and_left_alone(old, change, told, force):
    change(old)
    before = snapshot(old)
    result = run("update-code", old, *(["--force"] if force else []))
    assert result.exit_code == 1 and told in result.stderr and result.stderr.count("\n") == 1, result.stderr
    assert snapshot(old) == before


def test_other_folders_are_refused_in_one_line(llama, tmp_path):
    theirs = saved(random_diffllama(), tmp_path / "theirs")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    told = {llama: "model_type is 'llama'", theirs: "model_type is 'diffllama'", tmp_path / "adapter": "an adapter"}
    for folder, message in (told | {tmp_path / "nowhere": "does not exist"}).items():
        result = run("update-code", folder)
        assert result.exit_code == 1 and message in result.stderr and result.stderr.count("\n") == 1, result.stderr
    assert "--revision" in run("update-code", llama, "--revision", "main").stderr


def test_two_updates_at_once_are_one(old):
    before = snapshot(old)
    with locked(old / ".update-code"), pytest.raises(FilesError, match="another run is writing"):
        update_checkpoint_code(old)
    assert snapshot(old) == before


def test_card_names_the_releases_that_the_code_beside_it_needs(old, converted):
    """A push of old code says which, and an update puts today's in its place."""
    today = f"`transformers >= {OLDEST_TRANSFORMERS}` (newest tested: {NEWEST_TESTED_TRANSFORMERS})"
    assert today in (converted / "README.md").read_text() and f"`torch >= {OLDEST_TORCH}`" in card_of(converted)
    plan = plan_upload(old, "me/old")
    card = plan.contents["README.md"].decode()
    assert "below 5.24" in card and today not in card
    assert any(note.startswith("code: older than diff-llama's") for note in plan.notes)
    (old / "README.md").write_text(card)
    update_checkpoint_code(old)
    assert today in card_of(old) and "below 5.24" not in card_of(old)
    assert not any(note.startswith("code:") for note in plan_upload(old, "me/old").notes)


def card_of(folder: Path) -> str:
    return (folder / "README.md").read_text()


@pytest.mark.parametrize(("installed", "wrong"), [("5.23.0", False), ("5.24.0", True), ("5.31.1", True)])
def test_inspect_and_verify_tell_old_code_and_where_it_is_wrong(old, converted, monkeypatch, installed, wrong):
    monkeypatch.setattr(bundle, "INSTALLED_TRANSFORMERS", installed)
    code = describe_checkpoint(old)["code"]
    assert (code["age"], code["wrong_here"], code["edited"]) == ("older", wrong, [])
    check = next(check for check in verify_checkpoint(old).checks if check.name == "code")
    assert check.outcome == ("failed" if wrong else "passed")
    for text in (code["state"], check.detail):
        assert "older than diff-llama's" in text and "wrong under transformers >= 5.24" in text
        assert "diff-llama update-code" in text and (f"{installed} is installed" in text) is wrong
    assert describe_checkpoint(converted)["code"]["state"] == "the same as diff-llama's"


def test_wrong_code_does_not_keep_verify_from_judging_the_rest(old, monkeypatch):
    """The function is computed by the package's code."""
    monkeypatch.setattr(bundle, "INSTALLED_TRANSFORMERS", "5.24.0")
    outcomes = {check.name: check.outcome for check in verify_checkpoint(old).checks}
    assert outcomes["code"] == "failed" and outcomes["cache"] == "passed"


def test_every_file_of_old_and_of_former_code_is_known():
    for name, content in old_code().items():
        assert hashlib.sha256(content).hexdigest()[:16] in bundle.known_code()[name], name


def victim(folder, kill_at):
    """Updates in a process of its own, which dies at step `kill_at`: before a sync, a rename, a removal."""
    os.fsync = no_sync
    die_at_step(kill_at, *((os, name) for name in ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir")))
    update_checkpoint_code(folder)


def test_killed_at_every_step_is_old_new_or_does_not_load_and_a_rerun_ends_right(old, tmp_path, monkeypatch):
    """A load needs config.json: wherever it is, all code is of one version."""
    monkeypatch.setattr(os, "fsync", no_sync)
    before = snapshot(old)
    new = shutil.copytree(old, tmp_path / "new")
    update_checkpoint_code(new)
    after = snapshot(new)
    assert before.keys() - after.keys() and after.keys() - before.keys()  # files are added, and removed
    seen = set()
    for step in range(1, 200):
        folder = shutil.copytree(old, tmp_path / str(step))
        code = run_victim(victim, folder, step)
        found = {name: content for name, content in snapshot(folder).items() if not name.startswith(".update-code")}
        if "config.json" in found:
            assert found in (before, after)
        else:
            result = run("inspect", folder)
            assert result.exit_code == 1 and "interrupted" in result.stderr and "update-code" in result.stderr
        seen.add("old" if found == before else "new" if found == after else "neither")
        update_checkpoint_code(folder)
        assert snapshot(folder) == after
        shutil.rmtree(folder)
        if code == 0:
            break
    assert seen == {"old", "new", "neither"} and 30 < step < 199


@pytest.mark.parametrize("signal_error", [KeyboardInterrupt, SystemExit])
def test_interrupted_while_files_move_is_completed_first(old, converted, monkeypatch, signal_error):
    """Nothing half done is left, as the command line says."""
    replace = os.replace
    calls = []

    def interrupted(*paths):
        calls.append(paths)
        if len(calls) == 3:
            raise signal_error
        replace(*paths)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(signal_error):
        update_checkpoint_code(old)
    assert snapshot(old) == snapshot(converted)
