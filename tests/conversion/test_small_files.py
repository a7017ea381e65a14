"""Files that should be small, texts and JSON: each fault named at once, whatever the size, and no secret published."""

import json
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from random_llamas import edit_json, random_llama, saved
from saved_checkpoints import read_refusal

from conversion import ConversionError, convert_checkpoint
from conversion.checkpoint.companions import companion_files
from conversion.checkpoint.json_files import CHUNK_CHARS, LIMITS, MAX_NESTING, parse_json, read_small
from conversion.describe import describe_checkpoint
from conversion.errors import MemoryLimitError, memory_error
from conversion.hub.card_metadata import read_metadata
from conversion.hub.upload_files import read_upload_folder
from conversion.source.location import TEXT_PATTERNS


SMALLEST = min(limit for _, limit in LIMITS)
KEY = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXk=\n"


@pytest.fixture
def source(llama):
    """A LLaMA to spoil: a config and weights."""
    (llama / "generation_config.json").unlink()
    return llama


def sparse(path: Path, size: int) -> None:
    with path.open("wb") as stream:
        stream.truncate(size)


def refusal(action):
    with pytest.raises(ConversionError) as caught:
        action()
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def convert(source):
    return convert_checkpoint(source, source.parent / "v2", "v2", dry_run=True)


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "LICENSE",
        "NOTICE.txt",
        "generation_config.json",
        "tokenizer_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "chat_template.jinja",
    ],
)
def test_file_far_too_large_is_refused_before_it_is_read(source, name):
    """20 GB that take no room on the disk: read whole, they would end the process."""
    sparse(source / name, 20 << 30)
    started = time.monotonic()
    assert f"{name}: 21,474,836,480 bytes, expected at most" in refusal(lambda: convert(source))
    assert time.monotonic() - started < 10


def test_index_far_too_large_is_refused(source):
    (source / "model.safetensors").unlink()
    sparse(source / "model.safetensors.index.json", 20 << 30)
    assert "model.safetensors.index.json: 21,474,836,480 bytes" in read_refusal(source)


@pytest.mark.parametrize("name", ["LICENSE", "config.json", "modeling_diff_llama.py", "README.md", "tokenizer.json"])
def test_push_refuses_a_file_far_too_large(llama, tmp_path, name):
    convert_checkpoint(llama, tmp_path / "v2", "v2")
    sparse(tmp_path / "v2" / name, 20 << 30)
    assert f"{name}: 21,474,836,480 bytes" in refusal(lambda: read_upload_folder(tmp_path / "v2"))


def test_limit_is_where_the_table_says(tmp_path):
    sparse(tmp_path / "config.json", SMALLEST)
    assert len(read_small(tmp_path / "config.json")) == SMALLEST
    sparse(tmp_path / "config.json", SMALLEST + 1)
    refusal(lambda: read_small(tmp_path / "config.json"))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "LICENSE", "generation_config.json"])
def test_pipe_in_place_of_a_file_is_refused_and_not_waited_for(source, name):
    (source / name).unlink(missing_ok=True)
    os.mkfifo(source / name)
    assert f"{name}: not a regular file" in refusal(lambda: convert(source))


def test_pipe_in_place_of_a_card_is_no_card_and_not_waited_for(source):
    os.mkfifo(source / "README.md")
    found: list[object] = []
    reader = threading.Thread(target=lambda: found.append(read_metadata(source / "README.md")), daemon=True)
    reader.start()
    reader.join(timeout=20)
    assert found == [{}]


def test_folder_in_place_of_the_config_is_named(source):
    (source / "config.json").unlink()
    (source / "config.json").mkdir()
    assert "config.json: not a regular file" in refusal(lambda: convert(source))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "generation_config.json"])
def test_empty_file_is_refused_where_none_is_empty(source, name):
    (source / name).write_bytes(b"")
    (source / "NOTICE").write_bytes(b"")
    assert f"{name}: empty; download it again" in refusal(lambda: convert(source))
    (source / name).unlink()
    assert "no license in the source" not in convert(source).notes


JSON_FAULTS = {
    "byte order mark": (b"\xef\xbb\xbf{}", "byte order mark.*save it as UTF-8 without one"),
    "UTF-16": ("{}".encode("utf-16"), "UTF-16.*save it as UTF-8"),
    "Latin-1": ('{"a": "é"}'.encode("latin-1"), "not UTF-8 at byte 7"),
    "list": (b"[1]", "a JSON list"),
    "NaN": (b'{"a": NaN}', "NaN is not JSON"),
    "Infinity": (b'{"a": -Infinity}', "-Infinity is not JSON"),
    "a number of 5,000 digits": (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON"),
    "twice": (b'{"a": 1, "b": {"c": 1, "c": 2}}', "'c' appears twice; keep the one"),
    "deep": (b'{"a":' * (MAX_NESTING + 1) + b"1" + b"}" * (MAX_NESTING + 1), f"more than {MAX_NESTING} deep"),
    "deep lists": (b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}", f"more than {MAX_NESTING} deep"),
    "deeper than the parser": (b'{"a": ' + b"[" * 10**6 + b"]" * 10**6 + b"}", f"more than {MAX_NESTING} deep"),
}


@pytest.mark.parametrize("fault", JSON_FAULTS)
def test_json_that_cannot_be_taken_is_refused_by_its_fault(fault):
    data, message = JSON_FAULTS[fault]
    with pytest.raises(ConversionError, match=message) as caught:
        parse_json(data, "config.json")
    assert str(caught.value).startswith("config.json") and len(str(caught.value)) < 300


def test_json_of_the_deepest_nesting_allowed_is_taken():
    depth = MAX_NESTING - 1
    assert parse_json(b'{"a": ' + b"[" * depth + b"]" * depth + b"}", "x").keys() == {"a"}
    assert parse_json(b'{"a": [' + b"[]," * 10**5 + b"[]]}", "x").keys() == {"a"}


def test_json_as_python_writes_it_is_taken_where_asked_for():
    assert parse_json(b'{"a": Infinity}', "x", nonfinite=True) == {"a": float("inf")}


def test_key_twice_among_a_million_is_found_at_once():
    text = json.dumps({f"k{number}": 0 for number in range(10**6)})[:-1] + ', "k999999": 1}'
    started = time.monotonic()
    assert "'k999999' appears twice" in refusal(lambda: parse_json(text.encode(), "x"))
    assert time.monotonic() - started < 30  # counted name by name it takes hours


def test_shape_of_a_million_numbers_is_refused_at_once(tmp_path):
    shape = [2**62] * 10**6
    header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert "expected at most 64 whole numbers" in read_refusal(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_field_that_nobody_reads_may_be_no_number(source, value):
    """As Python writes it and transformers reads it: left out with a note."""
    edit_json(source / "config.json", loss_at_the_end=value)
    (source / "tokenizer_config.json").write_text(json.dumps({"model_max_length": value}))
    assert "config.json: loss_at_the_end is not kept" in convert(source).notes


LICENSES = ["LICENSE", "license.txt", "LICENSE-CODE", "LICENSE_MODEL.md", "Notice", "use_policy.md", "COPYING"]
OTHERS = [
    "license_private.key",
    "LICENSE.pem",
    "license.json.bak",
    "NOTICE.p12",
    "notices.db",
    "LICENSES",
    "licensekey",
]


def test_only_names_that_licenses_have_travel(source):
    for name in [*LICENSES, *OTHERS]:
        (source / name).write_text("terms\n")
    files, _ = companion_files(source)
    assert files.keys() == set(LICENSES)
    found = filter_repo_objects([*LICENSES, *OTHERS], allow_patterns=TEXT_PATTERNS)
    assert list(found) == LICENSES
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (source / name).write_text("{}")
    assert not set(OTHERS) & read_upload_folder(source).files.keys()


@pytest.mark.parametrize("content", [b"\x7fELF\x00\x01", b"\x89PNG\r\n\x1a\n", KEY.encode(), b"MIT\n" + KEY.encode()])
def test_license_that_is_no_text_or_holds_a_key_is_neither_copied_nor_pushed(source, content):
    (source / "LICENSE").write_bytes(content)
    files, notes = companion_files(source)
    assert "LICENSE" not in files and any(note.startswith("LICENSE is no text") for note in notes)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (source / name).write_text("{}")
    assert "LICENSE: no text, or holds a private key" in refusal(lambda: read_upload_folder(source))


@pytest.mark.parametrize("content", ["Copyright © 2024\n".encode(e) for e in ("utf-8", "latin-1", "utf-16")])
def test_license_is_a_text_in_any_encoding(source, content):
    (source / "LICENSE").write_bytes(content)
    assert "LICENSE" in companion_files(source)[0]


@pytest.mark.parametrize("secret", ["hf_" + "a" * 34, KEY])
@pytest.mark.parametrize("name", ["README.md", "tokenizer_config.json", "chat_template.jinja"])
def test_secret_in_any_text_stops_a_push(source, secret, name):
    """One that lies across the border of two parts as well."""
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (source / file).write_text("{}")
    (source / name).write_text("x" * (CHUNK_CHARS - 11) + " " + secret)
    message = refusal(lambda: read_upload_folder(source))
    assert message.startswith(f"{name}: holds a") and secret not in message


LITTLE_MEMORY = """
import resource, sys
import conversion.cli as cli
import conversion.convert  # with torch, whose libraries need more than is left
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (int(sys.argv.pop(1)) << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
cli.main()
"""


@pytest.mark.parametrize("pickled", [False, True])
def test_address_space_below_a_shard_is_called_a_lack_of_memory(tmp_path, pickled):
    """A file of 400 MB where 100 MB are left; sparse, so that the test needs neither."""
    entry = {"dtype": "F32", "shape": [10**8], "data_offsets": [0, 4 * 10**8]}
    header = json.dumps({"model.norm.weight": entry}).encode()
    source = saved(random_llama(), tmp_path / "llama")
    (source / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(source / "model.safetensors", 8 + len(header) + 4 * 10**8)
    if pickled:
        (source / "model.safetensors").unlink()
        torch.save({"model.norm.weight": torch.zeros(10**8)}, source / "pytorch_model.bin")
    arguments = ["convert", source, tmp_path / "v2", "--variant", "v2", "--allow-pickle"]
    command = [sys.executable, "-c", LITTLE_MEMORY, "100", *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == MemoryLimitError.exit_code
    assert "not enough memory" in run.stderr and "ulimit -v" in run.stderr and run.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "lacking"),
    [
        (MemoryError(), True),
        (OSError(12, "Cannot allocate memory"), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\nmore"), True),
        (OSError("libgomp.so.1: failed to map segment from shared object"), True),
        (ImportError("libtorch_cpu.so: cannot map zero-fill pages"), True),
        (ImportError("libgomp.so.1: cannot allocate memory in static TLS block"), False),
        (RuntimeError("shapes differ"), False),
        (OSError(2, "No such file"), False),
    ],
)
def test_lack_of_memory_is_known_in_every_library_s_words(error, lacking):
    found = memory_error(error, "x")
    assert (found is not None) == lacking
    assert found is None or (str(found).startswith("x: not enough memory") and "\n" not in str(found))


def test_lack_of_memory_is_recognized_in_torchs_own_words():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55, dtype=torch.uint8)
    assert memory_error(caught.value, "x")


def test_inspect_refuses_a_config_far_too_large(source):
    sparse(source / "config.json", 20 << 30)
    assert "config.json: 21,474,836,480 bytes" in refusal(lambda: describe_checkpoint(source))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 20 << 20  # KiB
