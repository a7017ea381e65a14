"""What travels beside the weights: every spelling of it, and nothing that is not the file itself."""

import pytest
from huggingface_hub.utils import filter_repo_objects
from tiny_tokenizers import TINY_LLAMA

from conversion import ConversionError
from conversion.checkpoint.companions import companion_files, read_tokenizer
from conversion.evaluation.behavior import encode_texts
from conversion.hub.licenses import license_warnings, llama_terms
from conversion.hub.upload_files import UploadFolder, read_upload_folder
from conversion.source.location import TEXT_PATTERNS


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n"
AGREEMENT = "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\n"


def adapter_files(folder) -> UploadFolder:
    """The same folder as something to push; an adapter needs the least."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_text("{}")
    return read_upload_folder(folder)


@pytest.mark.parametrize(
    "names",
    [
        ("LICENSE", "NOTICE", "USE_POLICY.md"),
        ("license.txt", "Notice.txt", "Use_Policy.md"),
        ("Licence.md", "notice", "use_policy.md"),
    ],
)
def test_licences_are_known_in_every_spelling(tmp_path, names):
    for name in names:
        (tmp_path / name).write_text(AGREEMENT)
    (tmp_path / "LICENSES").mkdir()
    files, notes = companion_files(tmp_path)
    assert files.keys() == set(names) and "no license in the source" not in notes
    terms = llama_terms({}, tmp_path)
    assert terms is not None and terms.license == "Llama 3.1 Community License"
    assert license_warnings({"license": "llama3.1"}, terms, names, "me/Llama-x") == []
    assert set(names) <= adapter_files(tmp_path).files.keys()
    assert list(filter_repo_objects(names, allow_patterns=TEXT_PATTERNS)) == list(names)


@pytest.mark.parametrize("name", ["tokenizer.model", "spiece.model", "sentencepiece.bpe.model"])
def test_sentencepiece_files_travel_by_each_of_their_names(tmp_path, name):
    (tmp_path / name).write_bytes(b"pieces")
    assert companion_files(tmp_path)[0] == {name: tmp_path / name}
    assert name in adapter_files(tmp_path).files


@pytest.mark.parametrize("collect", [companion_files, adapter_files], ids=["convert", "push"])
@pytest.mark.parametrize("name", ["tokenizer.json", "LICENSE", "additional_chat_templates/tools.jinja"])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda path: path.symlink_to("../blobs/lost"), "missing; download it again"),
        (lambda path: path.write_text(POINTER), "a git-lfs pointer, not the file; run `git lfs pull`"),
        (lambda path: path.symlink_to(__file__), "outside the folder; copy the file itself here"),
    ],
    ids=["lost blob", "pointer", "link out"],
)
def test_file_that_is_not_itself_is_refused(tmp_path, collect, name, fault, message):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    fault(tmp_path / name)
    with pytest.raises(ConversionError, match=message) as caught:
        collect(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / name)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer.json": POINTER}, "cannot be loaded"),
        ({"tokenizer.json": "{}"}, "cannot be loaded"),
        ({"tokenizer_config.json": "{}"}, "cannot be loaded"),
        ({"tokenizer_config.json": '{"tokenizer_class": "LlamaTokenizer"}'}, "no vocabulary"),
    ],
)
def test_tokenizer_that_cannot_be_used_is_refused(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConversionError, match=message) as caught:
        read_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_tokenizer_is_read_where_there_is_one(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"pieces")
    assert read_tokenizer(tmp_path) is None
    assert len(read_tokenizer(TINY_LLAMA)) == 2048  # among them a bos


@pytest.mark.parametrize(
    ("vocab_size", "texts", "message"),
    [
        (96, None, "gives token [0-9]+, expected whole numbers from 0 to 95, as vocab_size is 96"),
        (2048, [""], "two tokens long"),
    ],
)
def test_texts_that_a_model_cannot_read_are_refused(vocab_size, texts, message):
    with pytest.raises(ConversionError, match=message):
        encode_texts(TINY_LLAMA, vocab_size, 128, texts)
    assert all(ids.shape[1] > 1 for ids in encode_texts(TINY_LLAMA, 2048, 128, ["The sea", ""]))
