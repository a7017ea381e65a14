"""SIGKILL at any moment of a write: nothing half done looks whole, the old target survives, a rerun ends the same."""

import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conversion.checkpoint import CheckpointWriter, TensorSpec, plan_shards
from conversion.checkpoint import output_folder as target_module


TENSORS = {f"layer.{n}": torch.full((64, 16), float(n)) for n in range(5)}
# A fork server has torch imported once and no threads: each victim is a clean process, started in milliseconds.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "pytest", "safetensors.torch", "conversion.checkpoint.writer"])


class Slow:
    """Tensors that take a while, so that a random moment hits any part of the work."""

    def __getitem__(self, name):
        time.sleep(0.01)
        return TENSORS[name]


def write(target, tensors=TENSORS, **options):
    specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()}
    options = {"source": None, "overwrite": False, "resume": False, "fingerprint": "run"} | options
    with CheckpointWriter(target, plan_shards(specs, 2 * 64 * 16 * 4), **options) as writer:
        for shard in writer.pending():
            writer.write_shard(shard, tensors)
        writer.write_text("README.md", "card")
        writer.write_text("config.json", "{}")
        writer.commit()


def no_exchange(one, other):
    return False


def victim(target, kill_at=None, exchange=True, **options):
    """Writes in a process of its own, which dies at step `kill_at`: a sync, a rename or the removal of a folder."""
    steps = 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal steps
            steps += 1
            if steps == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    os.fsync = counted(no_sync)
    os.rename, os.rmdir = counted(os.rename), counted(os.rmdir)
    target_module._exchange = counted(target_module._exchange if exchange else no_exchange)
    write(target, **options)


def no_sync(descriptor):
    """For fsync: a killed process, unlike a power cut, loses nothing that was written."""


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch):
    monkeypatch.setattr(os, "fsync", no_sync)


def run_victim(*args, kill_after_s=None, **options):
    """Exit code of a process that writes; killed after a time, if one is given."""
    process = PROCESSES.Process(target=victim, args=args, kwargs=options)
    process.start()
    process.join(kill_after_s)
    if kill_after_s is not None and process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode


def snapshot(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_nothing_half_done(folder: Path, whole: dict[str, bytes]) -> None:
    """Whatever has a config.json, or weights under a name that loads, is a whole checkpoint or one being committed."""
    for config in folder.rglob("config.json"):
        assert snapshot(config.parent) == whole, config
    for index in folder.rglob("*.index.json"):
        assert whole.keys() - snapshot(index.parent).keys() <= {"config.json"}
    for weights in folder.rglob("*.safetensors"):
        load_file(weights)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "out"
    write(folder)
    return snapshot(folder)


def test_killed_at_random_moments_then_resumed_is_byte_identical(tmp_path, whole):
    durations = []  # on this machine, now; the first run starts the fork server as well
    for name in ("first", "second"):
        began = time.monotonic()
        assert run_victim(tmp_path / name, tensors=Slow()) == 0
        durations.append(time.monotonic() - began)
    moments = random.Random(0)
    outcomes = []
    for attempt in range(6):
        outer = tmp_path / str(attempt)
        outer.mkdir()
        for _ in range(2):
            moment = moments.uniform(0.1, 0.9) * durations[-1]
            code = run_victim(outer / "out", tensors=Slow(), resume=True, kill_after_s=moment)
            outcomes.append(code)
            assert_nothing_half_done(outer, whole)
            if (outer / "out").exists():
                break
            assert code != 0
        if not (outer / "out").exists():
            write(outer / "out", resume=True)
        assert snapshot(outer / "out") == whole
    assert -signal.SIGKILL in outcomes


def test_killed_at_every_step_then_resumed_is_byte_identical(tmp_path, whole):
    for step in range(1, 100):
        outer = tmp_path / str(step)
        outer.mkdir()
        code = run_victim(outer / "out", kill_at=step, resume=True)
        assert_nothing_half_done(outer, whole)
        if (outer / "out").exists():
            assert snapshot(outer / "out") == whole
        write(outer / "out", resume=True, overwrite=True)
        assert snapshot(outer / "out") == whole
        assert sorted(path.name for path in outer.iterdir()) == ["out"]
        if code == 0:
            break
        shutil.rmtree(outer)
    assert 20 < step < 99


@pytest.mark.parametrize("exchange", [True, False])
def test_killed_at_every_step_of_an_overwrite_keeps_the_old_or_has_the_new(tmp_path, whole, exchange, monkeypatch):
    if not exchange:
        monkeypatch.setattr(target_module, "_exchange", no_exchange)
    old = {"config.json": b'{"old": 1}', "model.safetensors": b"old weights"}
    for step in range(1, 100):
        outer = tmp_path / str(step)
        (outer / "out").mkdir(parents=True)
        for name, content in old.items():
            (outer / "out" / name).write_bytes(content)
        code = run_victim(outer / "out", kill_at=step, overwrite=True, exchange=exchange)
        if (outer / "out").exists():
            assert snapshot(outer / "out") in (old, whole)
        else:
            assert not exchange
            assert snapshot(outer / ".out.partial" / "aside") == old
        write(outer / "out", overwrite=True)
        assert snapshot(outer / "out") == whole
        assert sorted(path.name for path in outer.iterdir()) == ["out"]
        if code == 0:
            break
        shutil.rmtree(outer)
    assert 20 < step < 99
