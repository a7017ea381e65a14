"""Interrupted runs: what they leave, and what a run with `resume` makes of it."""

import pytest
from saved_checkpoints import TENSORS, names, refusal, snapshot, write, writer_for


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_interrupted_run_leaves_nothing(tmp_path, error):
    with pytest.raises(error), writer_for(tmp_path / "out") as writer:
        writer.write_shard(next(writer.pending()), TENSORS)
        raise error
    assert names(tmp_path) == []


def interrupted(target, shards=2, **options):
    with pytest.raises(KeyboardInterrupt), writer_for(target, resume=True, **options) as writer:
        for shard in list(writer.pending())[:shards]:
            writer.write_shard(shard, TENSORS)
        raise KeyboardInterrupt


def test_resume_skips_what_is_verified_and_ends_the_same(tmp_path):
    write(tmp_path / "whole")
    interrupted(tmp_path / "out")
    with writer_for(tmp_path / "out", resume=True) as writer:
        assert len(list(writer.pending())) == len(writer.shards) - 2
        assert set(writer.checksums) == {shard.file_name for shard in writer.shards[:2]}
    write(tmp_path / "out", resume=True)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")
    assert names(tmp_path) == ["out", "whole"]


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
def test_partial_folder_of_another_run_is_refused_by_resume_and_replaced_without(tmp_path, other, what):
    interrupted(tmp_path / "out")
    before = snapshot(tmp_path)
    message = refusal(write, tmp_path / "out", resume=True, **other)
    assert "belongs to another run" in message
    assert what in message
    assert snapshot(tmp_path) == before
    write(tmp_path / "whole", **other)
    write(tmp_path / "out", **other)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_damaged_journal_is_refused_by_resume(tmp_path, text):
    interrupted(tmp_path / "out")
    (tmp_path / ".out.partial" / "journal.json").write_text(text)
    assert "leave out --resume" in refusal(write, tmp_path / "out", resume=True)
    write(tmp_path / "out")


def test_resume_after_a_stop_within_commit_writes_no_shard_again(tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("conversion.writer.swap_in", stop)
        write(tmp_path / "out", resume=True)
    with writer_for(tmp_path / "out", resume=True) as writer:
        assert list(writer.pending()) == []
