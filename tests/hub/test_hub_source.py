"""Sources on the Hub: what may be written for one, what comes down, and the same advice as for a folder."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from conversion import ConversionError, push_checkpoint
from conversion.checkpoint import CheckpointReader
from conversion.source.hub_address import HubAddress, parse_address
from conversion.source.location import locate_source


HERE = Path(__file__).parent
CONFIG = {"config.json": b"{}", "tokenizer.json": b"{}", "modeling_evil.py": b"raise SystemExit", "notes.json": b"{}"}


def index(*names: str) -> bytes:
    return json.dumps({"weight_map": {f"tensor{i}": name for i, name in enumerate(names)}}).encode()


# What a repository holds; of it, what comes down (None: a refusal).
LAYOUTS = {
    "single": ({"model.safetensors": b"x", "model-v2.safetensors": b"y"}, ["model.safetensors"]),
    "odd names": (
        {
            "model.safetensors.index.json": index("pytorch_model-1.safetensors", "w[1]*.safetensors"),
            "pytorch_model-1.safetensors": b"x",
            "w[1]*.safetensors": b"y",
            "w1.safetensors": b"z",
            "model.bin": b"z",
        },
        ["model.safetensors.index.json", "pytorch_model-1.safetensors", "w[1]*.safetensors"],
    ),
    "folder": (
        {
            "model.safetensors.index.json": index("weights/a.safetensors"),
            "weights/a.safetensors": b"x",
            "a.safetensors": b"y",
            "onnx/config.json": b"{}",
        },
        ["model.safetensors.index.json", "weights/a.safetensors"],
    ),
    "index and single": (
        {"model.safetensors.index.json": index("a.safetensors"), "a.safetensors": b"x", "model.safetensors": b"y"},
        ["a.safetensors", "model.safetensors", "model.safetensors.index.json"],
    ),
    "safetensors next to pickles": (
        {"model.safetensors": b"x", "pytorch_model.bin": b"y", "pytorch_model.bin.index.json": index("p.bin")},
        ["model.safetensors", "pytorch_model.bin.index.json"],
    ),
    "pickle": ({"pytorch_model.bin": b"x"}, None),
    "pickles": ({"pytorch_model.bin.index.json": index("p-1.bin"), "p-1.bin": b"x"}, None),
    "adapter": ({"adapter_model.safetensors": b"x", "adapter_config.json": b"{}"}, None),
    "gguf": ({"model.Q4_K_M.gguf": b"x"}, None),
    "Meta's": ({"consolidated.00.pth": b"x", "params.json": b"{}"}, None),
    "no index": ({"model-00001-of-00002.safetensors": b"x"}, None),
    "nothing": ({}, None),
}
OTHER = {"config.json": b"{}", "model.safetensors": b"other"}
ADDRESSES = {  # all of the repository with a revision of its own, "v2/x"
    "me/revisions@v2/x": "v2/x",
    "hf://me/revisions@v2/x": "v2/x",
    "{url}/me/revisions/tree/v2%2Fx": "v2/x",
    "https://huggingface.co/me/revisions": "main",
    "hf.co/me/revisions/blob/main/config.json": "main",
}


@pytest.fixture(scope="module")
def located(tmp_path_factory):
    folder = tmp_path_factory.mktemp("located")
    repositories = {f"me/{i}": {"main": CONFIG | files} for i, (files, _) in enumerate(LAYOUTS.values())}
    repositories["me/revisions"] = {"v2/x": OTHER, "main": OTHER | {"LICENSE": b"text"}}
    steps = [{"source": repo} for repo in repositories if repo != "me/revisions"]
    steps += [{"source": "me/5", "allow_pickle": True}, {"source": "me/6", "allow_pickle": True}]
    steps += [{"source": address} for address in ADDRESSES]
    job, reports = folder / "job.pickle", folder / "reports.pickle"
    settings = {"home": str(folder / "home"), "reports": str(reports), "repositories": repositories, "steps": steps}
    job.write_bytes(pickle.dumps(settings))
    process = subprocess.run(
        [sys.executable, HERE / "source_process.py", job],
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=300,
        env={"PYTHONPATH": str(HERE.parents[1]), "PATH": "/usr/bin:/bin", "TQDM_DISABLE": "1"},
    )
    assert process.returncode == 0, process.stderr[-4000:]
    commits, found = pickle.loads(reports.read_bytes())
    keys = [*LAYOUTS, "allowed pickle", "allowed pickles", *ADDRESSES]
    return commits, dict(zip(keys, found, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_index_decides_what_comes_down(located, layout, tmp_path):
    """What is refused gets a folder's own advice: the reader's, of the same files."""
    files, expected = LAYOUTS[layout]
    report = located[1][layout]
    if expected is not None:
        assert report.get("files") == sorted(["config.json", "tokenizer.json", *expected]), report
        return
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ConversionError) as refusal:
        CheckpointReader(tmp_path)
    advice = str(refusal.value).removeprefix(str(tmp_path))
    assert report["error"] == f"me/{list(LAYOUTS).index(layout)}{advice}"
    assert not [name for name in report["asked"] if name.endswith((".bin", ".pth", ".gguf"))]


def test_pickles_come_down_where_they_are_allowed(located):
    assert located[1]["allowed pickle"]["files"] == ["config.json", "pytorch_model.bin", "tokenizer.json"]
    assert "p-1.bin" in located[1]["allowed pickles"]["files"]


@pytest.mark.parametrize("address", ADDRESSES)
def test_address_is_read_at_its_revision(located, address):
    commits, reports = located
    assert reports[address]["hub_id"] == "me/revisions"
    assert reports[address]["revision"] == commits["me/revisions", ADDRESSES[address]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("meta-llama/Llama-3.2-1B", ("meta-llama/Llama-3.2-1B", None)),
        ("owner/name@v1.0", ("owner/name", "v1.0")),
        ("owner/name@refs/pr/3", ("owner/name", "refs/pr/3")),
        ("hf://owner/name", ("owner/name", None)),
        ("https://huggingface.co/owner/name/", ("owner/name", None)),
        ("http://www.huggingface.co/owner/name?library=transformers#files", ("owner/name", None)),
        ("HTTPS://HuggingFace.co/owner/name.git", ("owner/name", None)),
        ("huggingface.co/owner/name/tree/main", ("owner/name", "main")),
        ("https://hf.co/owner/name/tree/refs%2Fpr%2F3", ("owner/name", "refs/pr/3")),
        ("https://hf.co/owner/name/tree/refs/pr/3", ("owner/name", "refs/pr/3")),
        ("https://huggingface.co/owner/name/commit/0123abc", ("owner/name", "0123abc")),
        ("https://huggingface.co/owner/name/resolve/main/model.safetensors?download=true", ("owner/name", "main")),
        (f"{constants.ENDPOINT}/owner/name", ("owner/name", None)),
        ("out/v2/x", None),
        ("/owner/name", None),
        ("../name", None),
        ("./name", None),
        ("name", None),
        ("owner/na me@x", None),
    ],
)
def test_address_is_parsed_as_the_hub_writes_it(text, expected):
    assert parse_address(text) == (expected and HubAddress(*expected))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("https://github.com/owner/name", "outside of the Hub"),
        ("ftp://huggingface.co/owner/name", "outside of the Hub"),
        ("https://huggingface.co.example.org/owner/name", "outside of the Hub"),
        ("https://huggingface.co:99999999/owner/name", "no address"),
        ("https://[/owner/name", "no address"),
        ("https://huggingface.co/datasets/owner/name", "a data set"),
        ("https://huggingface.co/owner", "names no repository"),
        ("https://huggingface.co/owner/name/discussions/3", "a page of owner/name"),
        ("https://huggingface.co/owner/name/tree", "a page of owner/name"),
        ("https://huggingface.co/owner/name/tree/main/onnx", "a folder inside"),
        ("https://huggingface.co/owner/name/blob/main/onnx/config.json", "a folder inside"),
        ("hf://datasets/owner/name", "hf://OWNER/NAME"),
        ("owner/name@", "no revision after"),
    ],
)
def test_addresses_of_something_else_are_refused(text, said):
    with pytest.raises(ConversionError, match=said):
        locate_source(text)


def test_folder_here_comes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name@v1").mkdir(parents=True)
    assert locate_source("owner/name@v1").hub_id is None


def test_two_revisions_are_refused(converted):
    with pytest.raises(ConversionError, match="leave out one"):
        locate_source("owner/name@v1", "v2")
    with pytest.raises(ConversionError, match="leave out one"):
        push_checkpoint(converted["v2"], "owner/name@v1", revision="v2", dry_run=True)


def test_record_names_the_commit_of_its_own_repository_only(tmp_path, monkeypatch):
    asked = []

    def download(hub_id, revision, **options):
        asked.append(revision)
        (tmp_path / "model.safetensors").touch()
        return str(tmp_path)

    monkeypatch.setattr("conversion.source.location.snapshot_download", download)
    recorded = {"hub_id": "owner/name", "revision": "c0ffee"}
    for source in ("owner/name", "owner/name@v2", "owner/other"):
        locate_source(source, recorded=recorded)
    assert asked[::2] == ["c0ffee", "v2", None]
    assert locate_source(tmp_path, recorded=recorded).folder == tmp_path  # a copy here: no revision is missed


@pytest.mark.parametrize("repo", ["https://hf.co/me/Llama-x", "hf.co/me/Llama-x/tree/main", "me/Llama-x@main"])
def test_upload_takes_the_same_addresses(converted, repo):
    report = push_checkpoint(converted["v2"], repo, dry_run=True)
    assert (report.repo_id, report.revision) == ("me/Llama-x", "main")
