"""Calibration text in every form it may come in, and every form it may not."""

import json
import sys

import pytest
import torch

from conversion.data.text import read_calibration
from conversion.errors import ConversionError


class Letters:
    """A tokenizer of single characters."""

    bos_token_id = 1

    def encode(self, text, *, add_special_tokens, verbose=False):
        assert not add_special_tokens
        return [ord(letter) % 96 for letter in text]


def read(path, num_tokens=24, row_tokens=8, tokenizer=Letters()):  # noqa: B008 (stateless)
    return read_calibration(path, tokenizer, num_tokens, row_tokens, vocab_size=96)


def test_text_comes_in_rows_behind_a_bos(tmp_path):
    path = tmp_path / "some text.txt"
    path.write_text("abcdefgh\nijklmnopqrstuvwxyz, and more that is not asked for\n")
    rows = read(path)
    assert rows.shape == (3, 8) and rows[:, 0].tolist() == [1, 1, 1]
    assert rows[:, 1:].flatten().tolist() == Letters().encode(
        "abcdefgh\nijklmnopqrst", add_special_tokens=False, verbose=False
    )


def test_json_lines_of_text_equal_text(tmp_path):
    plain, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    plain.write_text("abc" * 20)
    lines.write_text("\n".join([json.dumps({"text": "abc" * 10, "source": 1}), "", json.dumps({"text": "abc" * 10})]))
    assert torch.equal(read(plain), read(lines))


def test_json_lines_of_ids_need_no_tokenizer(tmp_path):
    path = tmp_path / "ids.jsonl"
    path.write_text("\n".join(json.dumps({"input_ids": list(range(10))}) for _ in range(3)))
    assert read(path, tokenizer=None).flatten().tolist() == (list(range(10)) * 3)[:24]


BAD = {
    "empty.txt": (b"", "empty"),
    "blank.jsonl": (b"\n\n", "empty"),
    "short.txt": (b"abc", "3 tokens, expected 21"),
    "image.txt": (b"\xff\xd8\xff\xe0 not text", "not UTF-8"),
    "zeros.txt": (b"text and \0\0\0", "NUL"),
    "torn.jsonl": (b'{"text": "abc"}\n{"text": ', "line 2 is not JSON"),
    "deep.jsonl": (b"[" * 100_000, "line 1 is not JSON"),
    "other.jsonl": (b'{"body": "abc"}', 'neither "text"'),
    "list.jsonl": (b"[1, 2]", 'neither "text"'),
    "half.jsonl": (b'\n{"text": "abc \\ud800 abc"}', r"line 2: text has '\\ud800' at 4"),
    "large.jsonl": (b'{"input_ids": [5, 96]}', "document 1: token 96, expected whole numbers from 0 to 95"),
    "words.jsonl": (b'{"input_ids": ["a"]}', "token 'a'"),
    "true.jsonl": (b'{"input_ids": [true]}', "token True"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file_is_refused_by_name_and_reason(tmp_path, name):
    data, reason = BAD[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConversionError, match=reason) as error:
        read(tmp_path / name)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(ConversionError, match="does not exist"):
        read(tmp_path / "none.txt")


def test_text_without_a_tokenizer_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("abc" * 20)
    with pytest.raises(ConversionError, match=r"no tokenizer \(tokenizer.json, or"):
        read(tmp_path / "a.txt", tokenizer=None)


def test_text_shorter_than_the_default_is_used_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("abcdefg" * 2 + "abc")
    rows = read_calibration(path, Letters(), 24, 8, vocab_size=96, whole_if_shorter=True)
    assert torch.equal(rows, read(path, num_tokens=16)) and len(rows) == 2
    path.write_text("abc")
    with pytest.raises(ConversionError, match="3 tokens, fewer than one sequence of 7"):
        read_calibration(path, Letters(), 24, 8, vocab_size=96, whole_if_shorter=True)


def test_less_than_a_row_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("abc" * 20)
    with pytest.raises(ConversionError, match="fewer than one sequence of 8"):
        read(tmp_path / "a.txt", num_tokens=7)


def test_folder_that_is_no_dataset_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    with pytest.raises(ConversionError, match="did not save"):
        read(tmp_path)


def test_dataset_without_the_package_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(ConversionError, match="needs the datasets package"):
        read(tmp_path)


def test_saved_dataset_equals_its_text(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["abc" * 10, "def" * 10]}).save_to_disk(tmp_path / "saved")
    (tmp_path / "a.txt").write_text("abc" * 10 + "def" * 10)
    assert torch.equal(read(tmp_path / "saved"), read(tmp_path / "a.txt"))
