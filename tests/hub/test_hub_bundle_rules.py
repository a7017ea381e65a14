"""The root files of `modeling_diff` travel beside the weights: what their text must be for every road to find them."""

import ast
import re
import sys
from pathlib import Path

import pytest

import modeling_diff


FOLDER = Path(modeling_diff.__file__).parent
FILES = sorted(FOLDER.glob("*.py"))
ENTRY_FILES = {"configuration_diff_llama.py", "modeling_diff_llama.py"}
THIRD_PARTY = {"torch", "transformers", "huggingface_hub"}
OPTIONAL = {"triton"}


@pytest.fixture(params=FILES, ids=lambda file: file.name)
def file(request):
    return request.param


@pytest.fixture
def tree(file):
    return ast.parse(file.read_text(encoding="utf-8"))


def imports(tree: ast.AST) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


def absolute_packages(nodes: list[ast.Import | ast.ImportFrom]) -> set[str]:
    """Top-level names of everything imported absolutely."""
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0]
    return {name.split(".")[0] for name in names}


def guarded_imports(tree: ast.AST) -> list[ast.Import | ast.ImportFrom]:
    """Imports in the body of a `try` that has an `except ImportError`."""
    guarded = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Try) and any(
            isinstance(handler.type, ast.Name) and handler.type.id in ("ImportError", "ModuleNotFoundError")
            for handler in node.handlers
        ):
            guarded += [found for statement in node.body for found in imports(statement)]
    return guarded


def relative_imports(tree: ast.AST) -> list[ast.ImportFrom]:
    return [node for node in imports(tree) if isinstance(node, ast.ImportFrom) and node.level > 0]


def test_relative_imports_name_a_file_beside(file, tree):
    for node in relative_imports(tree):
        where = f"{file.name}:{node.lineno}"
        assert node.level == 1, f"{where}: `..` leads out of the bundle"
        assert node.module, f"{where}: `from . import x` is not followed when the code is saved"
        assert "." not in node.module, f"{where}: the bundle is flat"
        assert (FOLDER / f"{node.module}.py").is_file(), f"{where}: {node.module} is no file of the bundle"


def test_relative_imports_are_written_as_the_copier_reads_them(file, tree):
    """transformers finds them by this expression, over the whole text: docstrings and comments included."""
    found = re.findall(r"^\s*from\s+\.(\S+)\s+import", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(set(found)) == sorted({node.module for node in relative_imports(tree)})
    assert not re.findall(r"^\s*import\s+\.", file.read_text(encoding="utf-8"), flags=re.MULTILINE)


def test_no_docstring_line_reads_as_an_import(file, tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
            for line in text.splitlines():
                assert not re.match(r"\s*(from\s+\.|import\s)", line), f"{file.name}: {line!r}"


def test_only_torch_transformers_and_the_standard_library_are_imported(file, tree):
    allowed = THIRD_PARTY | set(sys.stdlib_module_names) | OPTIONAL
    assert absolute_packages(imports(tree)) <= allowed


def test_optional_packages_are_imported_under_except_import_error(file, tree):
    guarded = guarded_imports(tree)
    unguarded = [node for node in imports(tree) if node not in guarded]
    assert not absolute_packages(unguarded) & OPTIONAL


def test_no_import_is_hidden_from_the_copier(tree):
    """By name at run time: neither copied nor checked."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            assert called not in ("import_module", "__import__")


def reached_from(entry: str) -> set[str]:
    reached = set()
    waiting = {entry}
    while waiting:
        name = waiting.pop()
        reached.add(name)
        tree = ast.parse((FOLDER / name).read_text(encoding="utf-8"))
        waiting |= {f"{node.module}.py" for node in relative_imports(tree)} - reached
    return reached


@pytest.mark.parametrize("entry", sorted(ENTRY_FILES))
def test_entry_names_every_file_that_it_reaches(entry):
    """From a local folder, transformers 5.6 copies these and looks no further."""
    tree = ast.parse((FOLDER / entry).read_text(encoding="utf-8"))
    assert {f"{node.module}.py" for node in relative_imports(tree)} == reached_from(entry) - {entry}


def test_configuration_imports_no_code_of_the_model():
    """But what says first that transformers is too old, and what PEFT and vLLM read by way of the config."""
    expected = {
        "configuration_diff_llama.py",
        "diff_adapters.py",
        "diff_engines.py",
        "diff_llama_fields.py",
        "diff_transformers_compat.py",
    }
    assert reached_from("configuration_diff_llama.py") == expected


def test_saved_checkpoint_holds_exactly_the_files_that_its_code_needs(saved):
    needed = set().union(*(reached_from(entry) for entry in ENTRY_FILES))
    assert needed <= {file.name for file in FILES}
    for checkpoint in saved.values():
        assert {file.name for file in checkpoint.glob("*.py")} == needed
        for name in needed:
            assert (checkpoint / name).read_bytes() == (FOLDER / name).read_bytes()


def test_every_file_of_the_package_reaches_the_bundle():
    """A file that the model never imports does not travel; then it belongs in a library's folder."""
    assert {file.name for file in FILES} - {"__init__.py"} == set().union(*map(reached_from, ENTRY_FILES))
