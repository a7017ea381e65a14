"""SIGKILL at any moment of a write: nothing half done looks whole, the old target survives, a rerun ends the same."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from killed_processes import die_at_step, no_sync, run_victim
from safetensors.torch import load_file
from saved_checkpoints import names, snapshot

from conversion.checkpoint import CheckpointWriter, TensorSpec, plan_shards
from conversion.checkpoint import output_folder as target_module


TENSORS = {f"layer.{n}": torch.full((64, 16), float(n)) for n in range(5)}


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
    os.fsync = no_sync
    if not exchange:
        target_module._exchange = no_exchange
    die_at_step(kill_at, (os, "fsync"), (os, "rename"), (os, "rmdir"), (target_module, "_exchange"))
    write(target, **options)


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch):
    monkeypatch.setattr(os, "fsync", no_sync)


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
        assert run_victim(victim, tmp_path / name, tensors=Slow()) == 0
        durations.append(time.monotonic() - began)
    moments = random.Random(0)
    outcomes = []
    for attempt in range(6):
        outer = tmp_path / str(attempt)
        outer.mkdir()
        for _ in range(2):
            moment = moments.uniform(0.1, 0.9) * durations[-1]
            code = run_victim(victim, outer / "out", tensors=Slow(), resume=True, kill_after_s=moment)
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
        code = run_victim(victim, outer / "out", kill_at=step, resume=True)
        assert_nothing_half_done(outer, whole)
        if (outer / "out").exists():
            assert snapshot(outer / "out") == whole
        write(outer / "out", resume=True, overwrite=True)
        assert snapshot(outer / "out") == whole
        assert names(outer) == ["out"]
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
        code = run_victim(victim, outer / "out", kill_at=step, overwrite=True, exchange=exchange)
        if (outer / "out").exists():
            assert snapshot(outer / "out") in (old, whole)
        else:
            assert not exchange
            assert snapshot(outer / ".out.partial" / "aside") == old
        write(outer / "out", overwrite=True)
        assert snapshot(outer / "out") == whole
        assert names(outer) == ["out"]
        if code == 0:
            break
        shutil.rmtree(outer)
    assert 20 < step < 99
