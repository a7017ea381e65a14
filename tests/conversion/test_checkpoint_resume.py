"""Interrupted runs: what they leave, and what a run with `resume` makes of it."""

import shutil

import pytest
from saved_checkpoints import TENSORS, names, refusal, snapshot, write, writer_for

from conversion.errors import ConversionError, FilesError


STOPS = [KeyboardInterrupt, SystemExit, RuntimeError, FilesError]  # after any of them the same run may succeed


def interrupted(target, shards=2, error=KeyboardInterrupt, **options):
    with pytest.raises(error) as caught, writer_for(target, **options) as writer:
        for shard in list(writer.pending())[:shards]:
            writer.write_shard(shard, TENSORS)
        raise error("stopped")
    return caught.value


@pytest.mark.parametrize("error", STOPS)
@pytest.mark.parametrize("resume", [None, True, False])
def test_stopped_run_keeps_finished_shards_and_says_where_and_how_many_bytes(tmp_path, error, resume):
    stopped = interrupted(tmp_path / "new" / "out", error=error, resume=resume)
    partial = tmp_path / "new" / ".out.partial"
    assert [name.split("-of")[0] for name in names(partial / "shards")] == ["model-00001", "model-00002"]
    num_bytes = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    assert stopped.__notes__ == [f"kept: {partial} (finished shards, {num_bytes / 1e6:.1f} MB)"]
    with writer_for(tmp_path / "new" / "out", resume=None) as writer:
        assert len(list(writer.pending())) == len(writer.shards) - 2


@pytest.mark.parametrize(("error", "shards"), [(error, 0) for error in STOPS] + [(ConversionError, 2)])
def test_nothing_is_kept_without_a_finished_shard_or_of_input_that_will_not_do(tmp_path, error, shards):
    interrupted(tmp_path / "new" / "out", shards, error)
    assert names(tmp_path) == []


def test_a_run_without_a_name_keeps_nothing(tmp_path):
    interrupted(tmp_path / "out", fingerprint=None)
    assert names(tmp_path) == []


def test_a_stop_after_the_swap_leaves_no_work(tmp_path, monkeypatch):
    remove = shutil.rmtree
    swapped = []

    def stop_once(folder, **options):
        if (tmp_path / "out").exists() and not swapped:
            swapped.append(folder)
            raise KeyboardInterrupt
        remove(folder, **options)

    monkeypatch.setattr("conversion.checkpoint.writer.shutil.rmtree", stop_once)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out")
    assert swapped == [tmp_path / ".out.partial"]
    write(tmp_path / "whole")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")
    assert names(tmp_path) == ["out", "whole"]


def test_resume_skips_what_is_verified_and_ends_the_same(tmp_path):
    write(tmp_path / "whole")
    interrupted(tmp_path / "out")
    with writer_for(tmp_path / "out", resume=True) as writer:
        assert len(list(writer.pending())) == len(writer.shards) - 2
        assert set(writer.checksums) == {shard.file_name for shard in writer.shards[:2]}
    write(tmp_path / "out", resume=True)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")
    assert names(tmp_path) == ["out", "whole"]


def test_without_resume_the_same_run_goes_on_and_says_so(tmp_path, caplog):
    interrupted(tmp_path / "out")
    with writer_for(tmp_path / "out", resume=None) as writer:
        assert len(list(writer.pending())) == len(writer.shards) - 2
    (said,) = caplog.messages
    assert said.startswith(f"continuing from {tmp_path}/.out.partial (finished shards, 0.0 MB), kept by a stopped run")
    assert said.endswith("--no-resume starts afresh")


def test_no_resume_discards(tmp_path, caplog):
    interrupted(tmp_path / "out")
    with writer_for(tmp_path / "out", resume=False) as writer:
        assert len(list(writer.pending())) == len(writer.shards)
    assert not caplog.messages


def test_resume_with_nothing_there_starts_at_the_start(tmp_path):
    write(tmp_path / "whole")
    write(tmp_path / "out", resume=True)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "grow"])
def test_resume_writes_damaged_shards_again(tmp_path, damage):
    write(tmp_path / "whole")
    interrupted(tmp_path / "out")
    part = sorted((tmp_path / ".out.partial" / "shards").iterdir())[0]
    content = part.read_bytes()
    if damage == "remove":
        part.unlink()
    else:
        changed = {"flip": content[:-1] + b"\xff", "cut": content[:-1], "grow": content + b"\0"}
        part.write_bytes(changed[damage])
    with writer_for(tmp_path / "out", resume=True) as writer:
        assert next(writer.pending()).file_name == part.name.removesuffix(".part")
    write(tmp_path / "out", resume=True)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ({"fingerprint": "run 2"}, "different source or options"),
        ({"max_shard_bytes": 90}, "different dtypes, shapes or"),
    ],
)
def test_partial_folder_of_another_run_is_refused_by_resume_and_replaced_without(tmp_path, other, what, caplog):
    interrupted(tmp_path / "out")
    before = snapshot(tmp_path)
    message = refusal(write, tmp_path / "out", resume=True, **other)
    assert "belongs to another run" in message
    assert what in message
    assert snapshot(tmp_path) == before
    write(tmp_path / "whole", **other)
    write(tmp_path / "out", resume=None, **other)
    assert len(caplog.messages) == 1 and what in caplog.text and caplog.messages[0].endswith("; replaced")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_damaged_journal_is_refused_by_resume(tmp_path, text):
    interrupted(tmp_path / "out")
    (tmp_path / ".out.partial" / "journal.json").write_text(text)
    message = refusal(write, tmp_path / "out", resume=True)
    assert f"{tmp_path}/.out.partial" in message and "(--no-resume)" in message
    write(tmp_path / "out", resume=None)


def test_resume_after_a_stop_within_commit_writes_no_shard_again(tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("conversion.checkpoint.writer.swap_in", stop)
        write(tmp_path / "out", resume=True)
    with writer_for(tmp_path / "out", resume=True) as writer:
        assert list(writer.pending()) == []
