"""CheckpointWriter: what it writes and how much memory it takes. Oracles: safetensors, huggingface_hub."""

import hashlib
import json
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from hypothesis import given, settings
from safetensors.torch import load_file, save
from saved_checkpoints import TENSORS, drawn_tensors, names, specs_of, write, writer_for

from conversion.checkpoint import TensorSpec, plan_shards
from conversion.errors import ConversionError, FilesError


@settings(max_examples=60, deadline=None)
@given(drawn_tensors(max_name=6))
def test_shard_is_byte_for_byte_what_safetensors_writes(tensors):
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "out")
        write(target, tensors, max_shard_bytes=10**6)
        assert (target / "model.safetensors").read_bytes() == save(tensors, metadata={"format": "pt"})


@pytest.mark.parametrize("max_shard_bytes", [97, 150, 250, 10**9])
def test_shards_and_index_are_those_of_huggingface_hub(tmp_path, max_shard_bytes):
    write(tmp_path / "out", max_shard_bytes=max_shard_bytes)
    expected = split_torch_state_dict_into_shards(
        TENSORS, max_shard_size=max_shard_bytes, filename_pattern="model{suffix}.safetensors"
    )
    for file, tensor_names in expected.filename_to_tensors.items():
        loaded = load_file(tmp_path / "out" / file)
        assert set(loaded) == set(tensor_names)
        assert all(torch.equal(loaded[name], TENSORS[name]) for name in tensor_names)
    index = tmp_path / "out" / "model.safetensors.index.json"
    assert names(tmp_path / "out") == sorted(
        ["config.json", *expected.filename_to_tensors, *([index.name] if expected.is_sharded else [])]
    )
    if expected.is_sharded:
        assert json.loads(index.read_text()) == {
            "metadata": expected.metadata,
            "weight_map": expected.tensor_to_filename,
        }
    assert names(tmp_path) == ["out"]


def test_tensor_above_the_limit_has_a_shard_of_its_own():
    specs = {name: TensorSpec((size,), torch.int8) for name, size in {"a": 3, "big": 99, "b": 3, "c": 3}.items()}
    assert [shard.names for shard in plan_shards(specs, 6)] == [("a",), ("big",), ("b", "c")]


def test_strided_tensors_are_written_as_they_look(tmp_path):
    tensors = {
        "t": torch.arange(12.0).reshape(3, 4).T,
        "slice": torch.arange(9.0)[1::2],
        "one": torch.ones(1).expand(4),
    }
    write(tmp_path / "out", tensors, max_shard_bytes=10**9)
    loaded = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_tensors_are_looked_up_once_in_order_and_checksums_hold(tmp_path):
    asked = []

    class Lazy:
        def __getitem__(self, name):
            asked.append(name)
            return TENSORS[name]

    with writer_for(tmp_path / "out") as writer:
        shards = list(writer.pending())
        for shard in shards:
            writer.write_shard(shard, Lazy())
        writer.write_text("config.json", "{}")
        writer.commit()
    assert asked == [name for shard in shards for name in shard.names]
    digests = {shard.file_name: hashlib.sha256((tmp_path / "out" / shard.file_name).read_bytes()) for shard in shards}
    assert writer.checksums == {file: digest.hexdigest() for file, digest in digests.items()}


def test_umask_is_respected(tmp_path):
    (tmp_path / "read_only.py").write_text("pass")
    (tmp_path / "read_only.py").chmod(0o400)
    before = os.umask(0o027)
    try:
        with writer_for(tmp_path / "out") as writer:
            for shard in writer.pending():
                writer.write_shard(shard, TENSORS)
            writer.copy_file(tmp_path / "read_only.py", "code/module.py")
            writer.write_text("config.json", "{}")
            writer.commit()
    finally:
        os.umask(before)
    for path in (tmp_path / "out", *(tmp_path / "out").rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o640), path
    assert (tmp_path / "out" / "code" / "module.py").read_text() == "pass"


def test_nothing_looks_complete_before_commit_and_commit_wants_everything(tmp_path):
    with writer_for(tmp_path / "out") as writer:
        shards = list(writer.pending())
        with pytest.raises(ValueError, match="model-00001"):
            writer.commit()
        for shard in shards:
            writer.write_shard(shard, TENSORS)
        with pytest.raises(ValueError, match=r"config\.json"):
            writer.commit()
        writer.write_text("config.json", "{}")
        found = {path.name for path in tmp_path.rglob("*")}
        assert not found & {"out", "config.json", "model.safetensors.index.json", *(s.file_name for s in shards)}
    assert names(tmp_path) == [".out.partial"], "finished shards are kept"


@pytest.mark.parametrize("wrong", [torch.ones(1, 5), torch.ones(4), torch.ones(1, 4, dtype=torch.float16)])
def test_tensor_unlike_the_plan_is_refused(tmp_path, wrong):
    with pytest.raises(ConversionError, match=r"'layer\.0'"):
        write_mixed(tmp_path / "out", TENSORS | {"layer.0": wrong})
    assert names(tmp_path) == []


def write_mixed(target, given_tensors):
    with writer_for(target) as writer:
        for shard in writer.pending():
            writer.write_shard(shard, given_tensors)


def test_bad_plan_is_refused():
    with pytest.raises(ConversionError, match="max_shard_bytes 0"):
        plan_shards(specs_of(TENSORS), 0)
    with pytest.raises(ConversionError, match="complex128"):
        plan_shards({"a": TensorSpec((1,), torch.complex128)}, 9)


def test_copy_follows_no_link_out_of_the_source(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (tmp_path / "secret").write_text("key")
    (source / "LICENSE").symlink_to(tmp_path / "secret")
    (source / "NOTICE").write_text("note")
    with writer_for(tmp_path / "out", source=source) as writer:
        with pytest.raises(ConversionError, match="outside the folder"):
            writer.copy_file(source / "LICENSE")
        writer.copy_file(source / "NOTICE")
        with pytest.raises(FilesError, match="File exists"):
            writer.write_text("NOTICE", "again")
        with pytest.raises(ConversionError, match="missing"):
            writer.copy_file(source / "absent")


MEMORY = """
import resource, sys, torch
from pathlib import Path
from conversion.checkpoint import CheckpointReader, CheckpointWriter, TensorSpec, plan_shards

def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def convert(source, target):
    reader = CheckpointReader(source)
    specs = {name: TensorSpec(info.shape, info.dtype) for name, info in reader.tensors.items()}
    class Lazy:
        def __getitem__(self, name):
            return reader.read(name)
    with CheckpointWriter(target, plan_shards(specs, 10**9), source=source, overwrite=False, resume=False,
                          fingerprint="") as writer:
        for shard in writer.pending():
            writer.write_shard(shard, Lazy())
        writer.write_text("config.json", "{}")
        writer.commit()

folder = Path(sys.argv[1])
convert(folder / "small", folder / "warm")
before = peak_bytes()
convert(folder / "large", folder / "out")
print(peak_bytes() - before)
"""


def test_peak_memory_is_about_two_tensors_however_large_the_shard(tmp_path):
    tensor_bytes = 12 * 2**20
    for name, entries in {"small": 1, "large": tensor_bytes // 4}.items():
        write(tmp_path / name, {f"t{n}": torch.full((entries,), float(n)) for n in range(5)}, max_shard_bytes=10**9)
    run = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 2.5 * tensor_bytes
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "large" / "model.safetensors"
    ).read_bytes()
