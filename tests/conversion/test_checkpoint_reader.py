"""CheckpointReader against real faults in real files; the oracle is the safetensors library."""

import hashlib
import json
import os
import pickle
import shutil
import tempfile
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from saved_checkpoints import drawn_tensors, read_refusal, same

from conversion.checkpoint.file_identity import content_identity, quick_identity
from conversion.checkpoint.reader import CheckpointReader, count_nonfinite
from conversion.errors import ConversionError, FilesError


TENSORS = {
    "model.embed.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "model.norm.weight": torch.arange(4, dtype=torch.bfloat16),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 3, dtype=torch.float16),
}


def sharded(folder: Path, shards: dict[str, dict[str, torch.Tensor]], **index: object) -> Path:
    for file, tensors in shards.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / file)
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map} | index))
    return folder


@pytest.fixture
def two_shards(tmp_path):
    names = sorted(TENSORS)
    parts = {f"model-0000{n + 1}-of-00002.safetensors": names[2 * n : 2 * n + 2] for n in range(2)}
    return sharded(tmp_path, {file: {name: TENSORS[name] for name in part} for file, part in parts.items()})


def test_single_file_reads_like_safetensors(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    reader = CheckpointReader(tmp_path)
    assert list(reader.tensors) == sorted(TENSORS)
    assert reader.files == (tmp_path / "model.safetensors",)
    for name, tensor in TENSORS.items():
        info = reader.tensors[name]
        assert same(reader.read(name), tensor)
        assert (info.shape, info.dtype, info.num_bytes) == (tuple(tensor.shape), tensor.dtype, tensor.nbytes)


def test_shards_read_like_safetensors_and_hash_like_sha256sum(two_shards):
    reader = CheckpointReader(two_shards)
    assert [path.name for path in reader.files] == [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert all(same(reader.read(name), tensor) for name, tensor in TENSORS.items())
    lines = os.popen(f"cd '{two_shards}' && sha256sum *.safetensors").read().split()
    assert reader.sha256() == dict(zip(lines[1::2], lines[::2], strict=True))


def test_tensor_read_is_a_copy_that_leaves_the_file_alone(two_shards):
    reader = CheckpointReader(two_shards)
    reader.read("model.embed.weight").zero_()
    assert same(reader.read("model.embed.weight"), TENSORS["model.embed.weight"])


@settings(max_examples=60, deadline=None)
@given(drawn_tensors(max_name=8))
def test_every_valid_file_is_accepted_and_identical(tensors):
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, Path(folder, "model.safetensors"))
        reader = CheckpointReader(Path(folder))
        assert list(reader.tensors) == sorted(tensors)
        assert all(same(reader.read(name), tensor) for name, tensor in tensors.items())


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["a", "b", "c", "d", "rotary_emb.inv_freq"]),
        st.sampled_from(["one.safetensors", "two.safetensors", "sub/three.safetensors", "../out.safetensors", "", "."])
        | st.none()
        | st.text(max_size=4),
        max_size=5,
    )
    | st.none()
    | st.lists(st.integers(), max_size=2)
)
def test_any_index_is_refused_or_names_exactly_what_is_read(weight_map):
    with tempfile.TemporaryDirectory() as outer:
        folder = Path(outer, "folder")
        shards = {"one.safetensors": "ab", "two.safetensors": "c", "sub/three.safetensors": "d"}
        tensors = {file: {name: torch.tensor([ord(name)]) for name in names} for file, names in shards.items()}
        sharded(folder, tensors, weight_map=weight_map)
        save_file({"d": torch.zeros(1)}, Path(outer, "out.safetensors"))
        try:
            reader = CheckpointReader(folder)
        except ConversionError as error:
            assert "\n" not in str(error)
            return
        assert set(reader.tensors) == set(weight_map) - {"rotary_emb.inv_freq"}
        assert all(info.file == weight_map[name] for name, info in reader.tensors.items())
        assert all(reader.read(name).item() == ord(name) for name in reader.tensors)


def test_folder_that_is_no_checkpoint_says_what_it_is(tmp_path):
    assert "does not exist" in read_refusal(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    assert "is a file" in read_refusal(tmp_path / "file")
    assert "no weights" in read_refusal(tmp_path)
    for name, advice in {
        "model-00001-of-00002.safetensors": "without model.safetensors.index.json",
        "consolidated.00.pth": "Meta's own format",
        "llama.Q4.gguf": "GGUF",
        "adapter_model.safetensors": "as --adapter",
    }.items():
        (tmp_path / name).write_text("")
        assert advice in read_refusal(tmp_path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not JSON"),
        ("[]", "a JSON list"),
        ("{}", "weight_map is None"),
        ('{"weight_map": {}}', "weight_map is {}"),
        ('{"weight_map": {"a": 3}}', "is in 3"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "'a' appears twice"),
        ("version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_bad_index_is_refused(tmp_path, text, reason):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert reason in read_refusal(tmp_path)


def test_missing_shard_is_refused(two_shards):
    (two_shards / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors: missing" in read_refusal(two_shards)


def test_index_and_shards_that_disagree_are_refused(two_shards):
    index = two_shards / "model.safetensors.index.json"
    listed = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": listed | {"extra": "model-00001-of-00002.safetensors"}}))
    assert "'extra' is in no file, the index says model-00001-of-00002.safetensors" in read_refusal(two_shards)
    index.write_text(json.dumps({"weight_map": listed | {"scalar": "model-00001-of-00002.safetensors"}}))
    assert "'scalar' is in model-00002-of-00002.safetensors, the index says model-00001" in read_refusal(two_shards)
    del listed["scalar"]
    index.write_text(json.dumps({"weight_map": listed}))
    assert "'scalar' is in model-00002-of-00002.safetensors, the index says nothing" in read_refusal(two_shards)


def test_rotary_buffers_may_be_listed_or_not(tmp_path):
    rotary = "model.layers.0.self_attn.rotary_emb.inv_freq"
    sharded(tmp_path, {"one.safetensors": {"a": torch.ones(1), rotary: torch.ones(2)}})
    index = tmp_path / "model.safetensors.index.json"
    for listed in ({"a": "one.safetensors"}, {"a": "one.safetensors", "x.rotary_emb.inv_freq": "one.safetensors"}):
        index.write_text(json.dumps({"weight_map": listed}))
        assert list(CheckpointReader(tmp_path).tensors) == ["a", rotary]


def test_tensor_in_two_shards_is_refused(tmp_path):
    sharded(tmp_path, {"one.safetensors": {"a": torch.ones(1), "b": torch.ones(1)}, "two.safetensors": TENSORS})
    save_file({"a": torch.zeros(1), **TENSORS}, tmp_path / "two.safetensors")
    assert "'a' is in both one.safetensors and two.safetensors" in read_refusal(tmp_path)


def test_single_file_beside_an_index_is_refused_unless_listed(two_shards):
    save_file(TENSORS, two_shards / "model.safetensors")
    assert "both model.safetensors and model.safetensors.index.json" in read_refusal(two_shards)
    sharded(two_shards, {"model.safetensors": TENSORS})
    assert set(CheckpointReader(two_shards).tensors) == set(TENSORS)


@pytest.mark.parametrize(
    "path", ["../evil.safetensors", "a\nb", "a\\b", "sub/../../evil.safetensors", "{outer}/evil.safetensors"]
)
def test_index_path_out_of_the_folder_is_refused(tmp_path, path):
    save_file(TENSORS, tmp_path / "evil.safetensors")
    folder = sharded(tmp_path / "folder", {"one.safetensors": TENSORS})
    listed = dict.fromkeys(TENSORS, path.format(outer=tmp_path))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    assert "expected a file inside the folder" in read_refusal(folder)


def test_links_out_of_the_folder_are_refused(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    link = folder / "model.safetensors"
    link.symlink_to(tmp_path / "absent")
    assert "missing" in read_refusal(folder)
    save_file(TENSORS, tmp_path / "absent")
    assert "outside the folder" in read_refusal(folder)
    link.unlink()
    link.symlink_to(link)
    read_refusal(folder, FilesError)


def test_weights_that_are_no_regular_file_are_refused(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    assert "not a regular file" in read_refusal(tmp_path)


def test_links_of_a_hub_cache_are_followed_inside_that_model_only(tmp_path):
    model = tmp_path / "models--meta--llama"
    snapshot = model / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    save_file(TENSORS, model / "blobs" / "abc")
    save_file(TENSORS, tmp_path / "models--other")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    (tmp_path / "alias").symlink_to(snapshot)
    for folder in (snapshot, tmp_path / "alias"):
        assert set(CheckpointReader(folder).tensors) == set(TENSORS)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(tmp_path / "models--other")
    assert "outside the folder" in read_refusal(snapshot)


def test_source_changed_while_open_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    reader = CheckpointReader(tmp_path)
    os.truncate(path, path.stat().st_size - 4)
    for action in (lambda: reader.read("model.embed.weight"), reader.sha256):
        with pytest.raises(ConversionError, match="changed while being read"):
            action()
    path.unlink()
    with pytest.raises(FilesError, match="No such file"):
        reader.read("scalar")


def changed_under_its_time(path):
    """Other bytes, the same size, and the time of the last write put back."""
    before = path.stat()
    time.sleep(0.02)  # file systems count the time of a change in ticks of some milliseconds
    with path.open("r+b") as stream:
        stream.seek(-2, os.SEEK_END)
        stream.write(b"\x01\x02")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("kind", ["safetensors", "pickle"])
def test_bytes_changed_with_the_time_put_back_are_refused(tmp_path, kind):
    path = tmp_path / {"safetensors": "model.safetensors", "pickle": "pytorch_model.bin"}[kind]
    {"safetensors": save_file, "pickle": torch.save}[kind](TENSORS, path)
    reader = CheckpointReader(tmp_path, allow_pickle=True)
    reader.check_unchanged()
    changed_under_its_time(path)
    for action in (lambda: reader.read("scalar"), reader.sha256, reader.check_unchanged):
        with pytest.raises(ConversionError, match="changed while being read"):
            action()


def test_identities_tell_files_apart(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(bytes(10**6))
    quick = quick_identity([path])
    whole = content_identity([path])
    copied = shutil.copy(path, tmp_path / "copy")
    assert content_identity([copied])[0][1] == whole[0][1], "a copy is the same content"
    changed_under_its_time(path)
    assert quick_identity([path])[0][-1] != quick[0][-1], "the last block is among the samples"
    assert content_identity([path]) != whole == [["weights", hashlib.sha256(bytes(10**6)).hexdigest()]]
    assert content_identity([tmp_path]) == content_identity([tmp_path / "copy", path]), "folders are their files"


def test_pickle_needs_permission_and_reads_the_same(tmp_path):
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    assert "allow_pickle=True" in read_refusal(tmp_path)
    reader = CheckpointReader(tmp_path, allow_pickle=True)
    assert list(reader.tensors) == sorted(TENSORS)
    assert all(same(reader.read(name), tensor) for name, tensor in TENSORS.items())
    save_file({"safe": torch.ones(1)}, tmp_path / "model.safetensors")
    assert list(CheckpointReader(tmp_path).tensors) == ["safe"]


def test_pickle_shards_read_through_their_index(tmp_path):
    for number, name in enumerate(TENSORS):
        torch.save({name: TENSORS[name]}, tmp_path / f"{number}.bin")
    listed = {name: f"{number}.bin" for number, name in enumerate(TENSORS)}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": listed}))
    reader = CheckpointReader(tmp_path, allow_pickle=True)
    assert all(same(reader.read(name), tensor) for name, tensor in TENSORS.items())


class Bomb:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True])
def test_malicious_pickle_is_refused_and_runs_nothing(tmp_path, legacy):
    fuse = tmp_path / "exploded"
    path = tmp_path / "pytorch_model.bin"
    if legacy:
        path.write_bytes(pickle.dumps({"a": Bomb(fuse)}))
    else:
        torch.save({"a": Bomb(fuse)}, path)
    assert "refused by torch.load" in read_refusal(tmp_path, allow_pickle=True)
    assert not fuse.exists()
    torch.load(path, weights_only=False) if not legacy else pickle.loads(path.read_bytes())
    assert fuse.exists()  # it was a real one


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([1], "holds a list"),
        ({"model": {"a": torch.ones(1)}}, "'model' holds a dict"),
        ({"step": 3}, "'step' holds a int"),
        ({"a": torch.eye(2).to_sparse()}, "expected a dense tensor"),
    ],
)
def test_pickle_of_something_else_is_refused(tmp_path, content, reason):
    torch.save(content, tmp_path / "pytorch_model.bin")
    assert reason in read_refusal(tmp_path, allow_pickle=True)


@pytest.mark.parametrize("keep", [0, 1, 40, -100])
def test_truncated_pickle_is_refused(tmp_path, keep):
    path = tmp_path / "pytorch_model.bin"
    torch.save(TENSORS, path)
    path.write_bytes(path.read_bytes()[:keep])
    assert "refused by torch.load" in read_refusal(tmp_path, allow_pickle=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2])
def test_count_nonfinite_gives_number_and_first_place(dtype, monkeypatch):
    monkeypatch.setattr("conversion.checkpoint.reader.CHUNK_ENTRIES", 5)
    tensor = torch.ones(3, 4)
    assert count_nonfinite(tensor.to(dtype)) == (0, None)
    tensor[1, 3] = float("-inf")
    tensor[2, 0] = tensor[2, 3] = float("nan")
    assert count_nonfinite(tensor.to(dtype)) == (3, (1, 3))
    assert count_nonfinite(torch.tensor(float("inf"), dtype=dtype)) == (1, ())
    assert count_nonfinite(torch.empty(0, 3, dtype=dtype)) == (0, None)


def test_count_nonfinite_of_whole_numbers_is_nothing():
    assert count_nonfinite(torch.arange(3)) == (0, None)
