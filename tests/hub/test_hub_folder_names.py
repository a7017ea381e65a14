"""Checkpoints load by their own code whatever their folder is called."""

import shutil

import pytest
import torch

from modeling_diff.diff_attention import operator_namespace


CASE = ("v2", "AutoModelForCausalLM")
NAMES = (
    "模型",
    "модель-v2",
    "🦙 diff",
    "my model",
    "my_model",  # what the one before becomes where all but letters turn into underscores
    "v1.0.2",
    "7b-diff",
    "class",
    "a" * 200,
    "elsewhere/模型",  # the same last name twice
)


@pytest.fixture(scope="module")
def reports(saved, fresh_process, tmp_path_factory):
    """What one fresh process finds in copies of one checkpoint, by name."""
    root = tmp_path_factory.mktemp("names")
    for name in NAMES:
        shutil.copytree(saved[CASE], root / name)
    job = [{"checkpoint": str(root / name), "auto_class": CASE[1]} for name in NAMES]
    return dict(zip(NAMES, fresh_process(job), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_folder_of_any_name_loads_by_its_own_code(reports, expected, name):
    assert reports[name]["module"].startswith("transformers_modules.")
    assert torch.equal(reports[name]["output"], expected[CASE]["output"])


def test_operator_names_are_ascii_short_and_one_per_module():
    names = {operator_namespace("diff_chunked", f"transformers_modules.{name}.x") for name in NAMES}
    assert len(names) == len(NAMES)
    assert all(name.isascii() and name.isidentifier() and len(name) < 64 for name in names)
