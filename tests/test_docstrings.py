"""What is exported says what it takes, gives and raises: the docstrings from which the Python reference is made."""

import ast
import importlib
import inspect
import pkgutil
import re
import textwrap
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import FunctionType

import pytest

import conversion
import modeling_diff


ROOT = Path(__file__).parents[1]
PACKAGES = [conversion, modeling_diff]
SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises):\n((?: .*\n|\n)*)", re.MULTILINE)


def exported():
    """(name, object) of each function and class in the `__all__` of a package or of one inside it."""
    for package in PACKAGES:
        inner = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        for name in [package.__name__, *(found.name for found in inner if found.ispkg)]:
            module = importlib.import_module(name)
            for each in getattr(module, "__all__", ()):
                found = getattr(module, each)
                if isinstance(found, type | FunctionType):
                    yield f"{name}.{each}", found


EXPORTED = dict(exported())


def sections(docstring):
    """The sections of a Google docstring: the names that each lists, in `Returns` none."""
    return {
        title: set(re.findall(r"^    \**(\w+):", text, re.MULTILINE))
        for title, text in SECTION.findall(f"{inspect.cleandoc(docstring or '')}\n")
    }


def parameters_of(function):
    return {name for name in inspect.signature(function).parameters if name != "self"}


def parts_of(found):
    """What a class is made of: its fields, or else what its own `__init__` takes."""
    if not is_dataclass(found):
        return parameters_of(found.__init__) if "__init__" in vars(found) else set()
    # TrainingArguments document theirs; those that ours change are listed again.
    foreign = [
        base for base in found.__mro__ if is_dataclass(base) and base.__module__.split(".")[0] == "transformers"
    ]
    kept = [
        each for each in fields(found) if not any(base.__dataclass_fields__.get(each.name) is each for base in foreign)
    ]
    return {each.name for each in kept if not each.name.startswith("_")}


def raises(function):
    """Whether the body of a function raises something new itself."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return any(isinstance(node, ast.Raise) and node.exc is not None for node in ast.walk(tree))


@pytest.mark.parametrize("name", [name for name, found in EXPORTED.items() if isinstance(found, FunctionType)])
def test_exported_function_documents_arguments_results_and_errors(name):
    function = EXPORTED[name]
    documented = sections(function.__doc__)
    assert documented.get("Args", set()) == parameters_of(function)
    if inspect.signature(function).return_annotation not in (None, "None"):
        assert documented.keys() & {"Returns", "Yields"}
    assert not raises(function) or documented.get("Raises")


@pytest.mark.parametrize("name", [name for name, found in EXPORTED.items() if isinstance(found, type)])
def test_exported_class_documents_what_it_is_made_of(name):
    found = EXPORTED[name]
    documented = sections(vars(found).get("__doc__"))
    assert vars(found).get("__doc__")
    if not issubclass(found, BaseException):
        assert parts_of(found) <= documented.get("Args", set()) | documented.get("Attributes", set())


def test_reference_shows_the_defaults_and_the_help_of_a_config():
    """What griffe, which does not run the code, would not know without our extension."""
    griffe = pytest.importorskip("griffe")
    extensions = griffe.load_extensions(str(ROOT / ".ci" / "docs_fields.py"))
    package = griffe.load("conversion", search_paths=[ROOT], extensions=extensions)
    config = package["options.conversion.ConversionConfig"]
    for field in fields(conversion.ConversionConfig):
        assert config.parameters[field.name].default == repr(field.default), field.name
        assert f"    {field.name}: {field.metadata['help']}" in config.docstring.value.splitlines()
    healing = package["healing.config.HealingConfig"]
    assert healing.parameters["stage"].default == "'kl'"
    assert "    save_total_limit: Number of checkpoints to keep." in healing.docstring.value
    assert "push_to_hub" not in healing.docstring.value  # of TrainingArguments, unchanged
