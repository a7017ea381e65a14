"""The target folder: what is refused, how it is replaced, and a disk that is too small."""

import errno
import os
import resource
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from saved_checkpoints import TENSORS, names, refusal, snapshot, write, writer_for

from conversion.checkpoint import CheckpointWriter, TensorSpec, plan_shards
from conversion.checkpoint import output_folder as target_module
from conversion.checkpoint.output_folder import check_room, check_space, check_target
from conversion.errors import FilesError


def test_target_that_is_a_file_or_under_one_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "is a file" in refusal(write, tmp_path / "file", overwrite=True)
    assert "is a file" in refusal(write, tmp_path / "file" / "out")
    assert snapshot(tmp_path) == {"file": b"mine"}


def test_target_that_touches_the_source_is_refused(tmp_path):
    source = tmp_path / "outer" / "source"
    write(source)
    before = snapshot(tmp_path)
    (tmp_path / "link").symlink_to(source)
    for target, relation in {
        source: "is the source",
        tmp_path / "link": "is the source",
        source / "sub" / "out": "is inside the source",
        tmp_path / "link" / "out": "is inside the source",
        tmp_path / "outer": "contains the source",
        source.parent / "x" / ".." / "source": "is the source",
    }.items():
        for given_source in (source, tmp_path / "link"):
            assert relation in refusal(write, target, source=given_source, overwrite=True)
    assert snapshot(tmp_path) == before


def test_target_with_content_needs_overwrite_and_overwrite_needs_a_checkpoint(tmp_path):
    (tmp_path / "out").mkdir()
    write(tmp_path / "out")
    assert "--overwrite" in refusal(write, tmp_path / "out")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "diary.txt").write_text("mine")
    assert "no checkpoint" in refusal(write, tmp_path / "home", overwrite=True)
    assert (tmp_path / "home" / "diary.txt").exists()


def test_target_that_is_a_mount_point_or_a_circle_is_refused(tmp_path):
    assert "mount point" in refusal(check_target, Path("/proc"), source=None, overwrite=True)
    (tmp_path / "loop").symlink_to("loop")
    assert "cannot be resolved" in refusal(check_target, tmp_path / "loop", source=None, overwrite=True)


def test_target_through_a_link_is_written_where_it_points(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "real")
    write(tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "real" / "config.json").exists()


def test_read_only_target_is_refused(tmp_path):
    with tempfile.TemporaryDirectory() as outer:  # pytest's own folders are closed to other users
        os.chmod(outer, 0o555)
        child = os.fork()
        if not child:
            code = 1
            try:
                if os.getuid() == 0:
                    os.setuid(65534)
                check_target(Path(outer, "out"), source=None, overwrite=False)
            except FilesError as error:
                code = 0 if "no permission to write" in str(error) else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("name", ["ü 模型 'x' $HOME", "n" * 255, "ü" * 127])
def test_any_legal_name_will_do(tmp_path, name):
    write(tmp_path / name)
    assert names(tmp_path) == [name]
    assert "too long" in refusal(write, tmp_path / ("n" * 256))


def test_missing_parents_are_made_and_taken_back(tmp_path):
    with pytest.raises(KeyboardInterrupt), writer_for(tmp_path / "a" / "b" / "out"):
        assert (tmp_path / "a" / "b").exists()
        raise KeyboardInterrupt
    assert names(tmp_path) == []
    write(tmp_path / "a" / "b" / "out")
    assert names(tmp_path / "a" / "b") == ["out"]


@pytest.mark.parametrize("exchange", [True, False])
def test_overwrite_replaces_everything(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(target_module, "_exchange", lambda one, other: False)
    write(tmp_path / "out", max_shard_bytes=40)
    write(tmp_path / "fresh", max_shard_bytes=10**9)
    write(tmp_path / "out", max_shard_bytes=10**9, overwrite=True)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "fresh")
    assert names(tmp_path) == ["fresh", "out"]


def test_exchange_leaves_no_moment_without_a_target(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not target_module._exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("no renameat2 here")
    assert (names(tmp_path / "a"), names(tmp_path / "b")) == (["b"], ["a"])
    with pytest.raises(OSError):
        target_module._exchange(tmp_path / "a", tmp_path / "absent")


def test_failed_swap_puts_the_old_checkpoint_back(tmp_path, monkeypatch):
    write(tmp_path / "out")
    before = snapshot(tmp_path / "out")
    monkeypatch.setattr(target_module, "_exchange", lambda one, other: False)
    rename = os.rename

    def fail(one, other):
        if Path(one).name == "tree":
            raise OSError(errno.EIO, "Input/output error", str(one))
        rename(one, other)

    monkeypatch.setattr(os, "rename", fail)
    assert "Input/output error" in refusal(write, tmp_path / "out", max_shard_bytes=40, overwrite=True)
    assert snapshot(tmp_path / "out") == before
    assert names(tmp_path) == [".out.partial", "out"], "the shards are finished, and the disk may be mended"


def test_target_filled_meanwhile_is_left_alone(tmp_path):
    with pytest.raises(FilesError, match="filled it meanwhile"), writer_for(tmp_path / "out") as writer:
        for shard in writer.pending():
            writer.write_shard(shard, TENSORS)
        writer.write_text("config.json", "{}")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "config.json").write_text("mine")
        writer.commit()
    assert snapshot(tmp_path / "out") == {"config.json": b"mine"}
    assert names(tmp_path) == [".out.partial", "out"]


def test_second_run_on_one_target_is_refused(tmp_path):
    with writer_for(tmp_path / "out") as writer:
        assert "another run is writing" in refusal(write, tmp_path / "out")
        assert "another run is writing" in refusal(write, tmp_path / "out", resume=True)
        write(tmp_path / "other")
        for shard in writer.pending():
            writer.write_shard(shard, TENSORS)
        writer.write_text("config.json", "{}")
        writer.commit()
    assert "exists and is not empty" in refusal(write, tmp_path / "out")
    assert names(tmp_path) == ["other", "out"]


@pytest.mark.parametrize("resume", [True, False])
def test_too_little_disk_is_refused_first_with_numbers(tmp_path, resume):
    huge = {"a": TensorSpec((10**18,), torch.int8)}
    writer = CheckpointWriter(
        tmp_path / "out", plan_shards(huge, 10**19), source=None, overwrite=False, resume=resume, fingerprint=""
    )
    assert "1000000000.034 GB are needed, " in refusal(writer.__enter__)
    assert names(tmp_path) == []
    check_space(tmp_path / "not" / "yet", 1)


def test_room_is_counted_with_what_an_earlier_run_left(tmp_path, monkeypatch):
    monkeypatch.setattr(target_module.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    for folder, num_bytes in ((".out.partial/shards", 200), (".out.calibration", 30), ("other", 7)):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "file").write_bytes(bytes(num_bytes))
    check_room(tmp_path / "out", 1230)
    assert "are needed" in refusal(check_room, tmp_path / "out", 1231)


@pytest.mark.parametrize("resume", [True, False, None])
def test_full_disk_mid_way_is_named_and_a_resume_continues(tmp_path, resume):
    disk_full = pytest.raises(FilesError, match="No space left on device; free space")
    with disk_full, writer_for(tmp_path / "out", resume=resume) as writer:
        first, second, *_ = writer.pending()
        writer.write_shard(first, TENSORS)
        writer._part(second).symlink_to("/dev/full")
        writer.write_shard(second, TENSORS)
    assert names(tmp_path) == [".out.partial"]
    with writer_for(tmp_path / "out", resume=True) as writer:
        assert next(writer.pending()).file_name == second.file_name
    assert names(tmp_path) == [".out.partial"]


def test_file_size_limit_is_reported(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    big = {"big": torch.zeros(300_000)}
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
    try:
        assert "--max-shard-size" in refusal(write, tmp_path / "out", big, max_shard_bytes=10**9)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == []
