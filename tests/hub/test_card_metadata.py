"""Metadata of others is carried as text: no reader of YAML 1.1 or 1.2 may find another value in our cards."""

import re
import shutil
from itertools import pairwise

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

from conversion.hub.card_metadata import metadata_block, read_metadata
from conversion.hub.model_card import source_metadata
from conversion.push import plan_upload


# What YAML 1.1 or 1.2 readers take for something else than text.
TREACHEROUS = [
    *("no", "No", "NO", "yes", "on", "Off", "y", "n", "true", "False", "1:20", "010", "0o17", "0x1F", "1e3", "1_000"),
    *("2024-01-01", "2024-01-01T10:00:00Z", ".inf", ".nan", "1.0", "-5", "12", "=", "<<"),
]
# The core schema of YAML 1.2.2, section 10.3.2, in which the Hub's own reader (js-yaml 4) takes plain scalars.
CORE_SCHEMA = re.compile(
    r"null|Null|NULL|~|true|True|TRUE|false|False|FALSE|[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"
    r"|[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)|"
)


def card(folder, block):
    (folder / "README.md").write_text(f"---\n{block}\n---\n# x\n")
    return folder / "README.md"


def scalars(block):
    """(plain, text) of every scalar of a block that is meant as text, as the events of the parser have it."""
    events = [event for event in yaml.parse(block.strip("-\n")) if isinstance(event, yaml.ScalarEvent)]
    return [(event.style is None, event.value) for event in events]


@pytest.mark.parametrize("text", TREACHEROUS)
def test_text_stays_text_for_every_reader(tmp_path, text):
    source = card(tmp_path, f"language: {text}\nlicense: {text}\ntags:\n- {text}\n")
    found = read_metadata(source)
    assert found == {"language": text, "license": text, "tags": [text]}
    block = metadata_block(ModelCardData(**found))
    assert yaml.safe_load(block.strip("-\n")) == found  # YAML 1.1
    assert not [value for plain, value in scalars(block) if plain and CORE_SCHEMA.fullmatch(value)]  # YAML 1.2
    assert not [value for plain, value in scalars(block) if plain and value.casefold() in ("y", "n")]  # strict 1.1


@pytest.mark.parametrize("text", ["", "~", "null", "Null", "NULL", "{a: b}", "[[x]]"])
def test_null_and_structures_are_no_text(tmp_path, text):
    assert not read_metadata(card(tmp_path, f"license: {text}\nlanguage: en")).get("license")


def test_plain_words_stay_unquoted():
    block = metadata_block(ModelCardData(license="llama3.2", language=["en", "no"], base_model="me/Llama-3.2_x"))
    assert "license: llama3.2\n" in block and '- en\n- "no"\n' in block and "base_model: me/Llama-3.2_x\n" in block


@pytest.mark.parametrize(
    "text",
    ["two\nlines", "---", "...", "#x", "a: b", "a #b", "'", '"', "\\x", "{x}", "*x", "&x", "!x", "%x", "x ", " "],
)
def test_metadata_block_holds_any_text(text):
    """What is not printable is escaped, and nothing ends the block."""
    block = metadata_block(ModelCardData(license=text, license_name="x"))
    assert ModelCard(block + "\n# x\n").data.to_dict()["license"] == text.replace("\n", "\\n")
    assert ModelCard(block + "\n# x\n").data.to_dict()["license_name"] == "x"


def test_references_and_depth_cost_nothing(tmp_path):
    lines = ["language: &a [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"{name}: &{name} [{', '.join([f'*{last}'] * 10)}]" for last, name in pairwise("abcdefghijklm")]
    assert read_metadata(card(tmp_path, "\n".join(lines)))["language"] == ["x"] * 10
    assert read_metadata(card(tmp_path, "license: " + "[" * 100_000)) == {}


@pytest.mark.parametrize("start", ["", "\ufeff", "\n"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_block_is_found_as_the_hub_finds_it(tmp_path, start, end):
    (tmp_path / "README.md").write_bytes(end.join([start + "---", "license: mit", "---", "text"]).encode())
    assert read_metadata(tmp_path / "README.md") == {"license": "mit"}


def test_norwegian_survives_conversion_and_upload(converted, tmp_path):
    folder = shutil.copytree(converted["v2"], tmp_path / "v2")
    text = (folder / "README.md").read_text()
    (folder / "README.md").write_text(text.replace("language: en", "language: no"))
    assert source_metadata(folder)["language"] == "no"
    uploaded = plan_upload(folder, "me/x").contents["README.md"].decode()
    assert ModelCard(uploaded).data.to_dict()["language"] == "no"
