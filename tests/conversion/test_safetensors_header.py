"""Headers of safetensors files: every fault refused by name, every mutation refused or read like the library."""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save
from saved_checkpoints import read_refusal, same

from conversion.checkpoint.reader import CheckpointReader
from conversion.errors import ConversionError


GOOD = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def raw_file(header: object, data: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


BAD_FILES = {
    "empty file": (b"", "0 bytes"),
    "too short": (b"\0" * 9, "9 bytes"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 99\n", "git lfs pull"),
    "html": (b"<!DOCTYPE html><html></html>", "announces a header"),
    "header absurdly long": (raw_file(GOOD, b"\0" * 8, 2**63), "announces a header of 9223372036854775808"),
    "header longer than file": (raw_file(GOOD, b"", 500), "announces a header of 500"),
    "header not JSON": (raw_file(b'{"a": ', b"\0" * 8), "not JSON"),
    "header not UTF-8": (raw_file(b'{"\xff": 1}', b"\0" * 8), "not JSON"),
    "header NaN": (raw_file(b'{"a": NaN}', b""), "NaN is not JSON"),
    "header nested deeply": (raw_file(b"[" * 99_999, b""), "nested more than 100 deep"),
    "header number too long": (raw_file(b'{"a": ' + b"9" * 9999 + b"}", b""), "not JSON"),
    "header a list": (raw_file([], b""), "a JSON list"),
    "name twice": (raw_file(b'{"a": {}, "a": {}}', b""), "'a' appears twice"),
    "no tensors": (raw_file({}, b""), "no tensors"),
    "entry a number": (raw_file({"a": 3}, b""), "tensor 'a': header entry is a int"),
    "shape missing": (raw_file({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, b"\0" * 8), "shape None"),
    "shape negative": (raw_file({"a": GOOD["a"] | {"shape": [-2]}}, b"\0" * 8), "shape [-2]"),
    "shape true": (raw_file({"a": GOOD["a"] | {"shape": [2, True]}}, b"\0" * 8), "shape [2, True]"),
    "shape float": (raw_file({"a": GOOD["a"] | {"shape": [2.0]}}, b"\0" * 8), "shape [2.0]"),
    "shape beyond 64 bits": (raw_file({"a": GOOD["a"] | {"shape": [2**64, 0]}}, b""), "shape [18446744073709551616"),
    "shape too large": (raw_file({"a": GOOD["a"] | {"shape": [3]}}, b"\0" * 8), "takes 12"),
    "dtype unknown": (raw_file({"a": GOOD["a"] | {"dtype": "F31"}}, b"\0" * 8), "dtype 'F31'"),
    "dtype a list": (raw_file({"a": GOOD["a"] | {"dtype": ["F32"]}}, b"\0" * 8), "dtype ['F32']"),
    "offsets backwards": (raw_file({"a": GOOD["a"] | {"data_offsets": [8, 0]}}, b"\0" * 8), "data_offsets [8, 0]"),
    "offsets outlying": (raw_file({"a": GOOD["a"] | {"data_offsets": [800, 808]}}, b"\0" * 8), "leaves a gap"),
    "offsets overlapping": (
        raw_file(GOOD | {"b": GOOD["a"] | {"data_offsets": [4, 12]}}, b"\0" * 12),
        "'b' starts at data byte 4, expected 8: it overlaps",
    ),
    "same bytes twice": (raw_file(GOOD | {"b": GOOD["a"]}, b"\0" * 8), "overlaps"),
    "gap": (raw_file({"a": GOOD["a"] | {"data_offsets": [4, 12]}}, b"\0" * 12), "leaves a gap"),
    "truncated": (raw_file(GOOD, b"\0" * 7), "truncated: tensor 'a' ends at data byte 8 of 7"),
    "trailing bytes": (raw_file(GOOD, b"\0" * 11), "3 trailing bytes"),
    "metadata not text": (raw_file({"__metadata__": {"format": 1}} | GOOD, b"\0" * 8), "refused by safetensors"),
    "name not UTF-8": (raw_file(b'{"\\ud800": ' + json.dumps(GOOD["a"]).encode() + b"}", b"\0" * 8), "refused by"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_refused_by_name_and_reason(tmp_path, case):
    content, reason = BAD_FILES[case]
    (tmp_path / "model.safetensors").write_bytes(content)
    message = read_refusal(tmp_path)
    assert str(tmp_path) in message
    assert reason in message


@st.composite
def mutated_files(draw) -> bytes:
    """A valid file with bytes of it replaced, inserted or removed, or one field of its header replaced."""
    content = save({"first": torch.arange(6.0).reshape(2, 3), "second": torch.arange(5, dtype=torch.int8)})
    length = int.from_bytes(content[:8], "little")
    if draw(st.booleans()):
        header = json.loads(content[8 : 8 + length])
        entry = header[draw(st.sampled_from(sorted(header)))]
        numbers = st.integers(-2, 40) | st.sampled_from([2**31, 2**63, 2**64])
        values = st.none() | st.booleans() | numbers | st.text(max_size=3) | st.lists(numbers, max_size=3)
        entry[draw(st.sampled_from(["dtype", "shape", "data_offsets", "extra"]))] = draw(values)
        return raw_file(header, content[8 + length :])
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        begin = draw(st.integers(0, len(changed)))
        end = min(len(changed), begin + draw(st.integers(0, 3)))
        changed[begin:end] = draw(st.binary(max_size=3) | st.sampled_from([b"0", b"1", b"9", b" ", b'"', b"}", b","]))
    return bytes(changed)


@settings(max_examples=200, deadline=None)
@given(mutated_files())
def test_mutated_file_is_refused_or_read_like_safetensors(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        path.write_bytes(content)
        try:
            reader = CheckpointReader(Path(folder))
        except ConversionError as error:
            assert "\n" not in str(error)
            return
        expected = load_file(path)
        assert list(reader.tensors) == sorted(expected)
        assert all(same(reader.read(name), tensor) for name, tensor in expected.items())
