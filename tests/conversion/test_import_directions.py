"""Who imports whom in conversion/: the rooms of DESIGN's layout, and that no import runs against them."""

import ast
from functools import cache
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
COMMANDS = {"convert", "export", "verify", "describe", "heal", "push", "update_code"}
# Each room and what it may import; commands and the command line may import any room.
MAY_IMPORT = {
    "errors": set(),
    "checkpoint": {"errors"},
    "data": {"errors"},
    "mapping": {"checkpoint", "errors"},
    "record": {"checkpoint", "errors"},
    "options": {"checkpoint", "errors", "mapping"},
    "source": {"checkpoint", "errors", "mapping"},
    "evaluation": {"checkpoint", "data", "errors", "mapping", "record", "source"},
    "planning": {"checkpoint", "errors", "mapping", "options", "record", "source"},
    "hub": {"checkpoint", "errors", "mapping", "record", "source"},
    "calibration": {"checkpoint", "data", "errors", "mapping", "options", "record", "source"},
    "healing": {"checkpoint", "data", "errors", "options", "record", "source"},
    "console": {"checkpoint", "errors", "hub", "options", "record"},
}
MAX_ROOMS = 23  # with __init__.py and __main__.py
MAX_FLOORS = 8


def room(path: Path) -> str:
    return path.relative_to(ROOT / "conversion").with_suffix("").parts[0]


def imported(path: Path) -> set[str]:
    """The rooms that a file imports when it is run, those for annotations alone left out."""
    found = set()
    nodes = [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module == "conversion":
            names = [f"conversion.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
        else:
            names = []
        found |= {name.split(".")[1] for name in names if name.startswith("conversion.")}
        nodes += ast.iter_child_nodes(node)
    return found - {room(path)}


@cache
def graph() -> dict[str, set[str]]:
    rooms: dict[str, set[str]] = {}
    for path in (ROOT / "conversion").rglob("*.py"):
        rooms.setdefault(room(path), set()).update(imported(path))
    return rooms


@pytest.mark.parametrize("name", sorted(MAY_IMPORT))
def test_room_imports_only_what_it_may(name):
    assert graph()[name] <= MAY_IMPORT[name]


def test_nobody_imports_a_command_but_the_command_line_and_the_package():
    importers = {name for name, rooms in graph().items() if rooms & (COMMANDS | {"cli"})}
    assert importers <= {"cli", "__init__", "__main__"}


def test_rooms_and_floors_are_few():
    def floor(name: str, above: tuple[str, ...] = ()) -> int:
        assert name not in above, f"imports run in a circle: {' -> '.join((*above, name))}"
        return 1 + max((floor(below, (*above, name)) for below in graph()[name]), default=0)

    assert len(graph()) <= MAX_ROOMS
    assert max(map(floor, graph())) <= MAX_FLOORS


def test_the_model_imports_nothing_of_the_conversion():
    for path in (ROOT / "modeling_diff").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                assert not any(name.split(".")[0] == "conversion" for name in names), path
