#!/usr/bin/env python3
"""Measures how densely the code is written, by folder: `.ci/density.py` for the tree, or for the commit after `--at`;
`.ci/density.py --list WHAT` for where one of the things counted is. Only the standard library is needed."""

import argparse
import ast
import io
import re
import statistics
import subprocess
import sys
import tempfile
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path


ROOT = Path(__file__).parents[1]
FOLDERS = ("modeling_diff", "conversion", "tests", "examples", ".ci")
# "one a layer", "8 bits a weight", "nats a token": a quantity, and then what it is counted by.
QUANTITIES = (
    r"\d[\d.]*|one|two|both|each|once|times|nats|bits?|bytes?|values?|numbers?|scalars?|norms?|lambda|floats?|calls?|"
    "heads|maps|keys|queries|layers|tokens|seconds|samples|prompts|pairs?|entry|line|window|slot"
)
UNITS = (
    "layer|token|head|map|query|key|row|second|pair|file|step|sequence|rank|sample|position|prompt|cell|parameter|shard|"
    "process|line|device|channel|block|program|image|weight|thousand"
)
PER = re.compile(rf"\b(?:{QUANTITIES}) an? (?:{UNITS})\b", re.IGNORECASE)
IZE = (
    "normal|quant|optim|real|initial|general|serial|organ|summar|random|material|factor|token|local|visual|categor|"
    "penal|util|minim|maxim|recogn|regular|parametr|symmetr|orthogonal|diagonal|final|special|vector|linear|author|"
    "item|priorit|standard|stabil|capital|synchron|discret|equal|ideal"
)
BRITISH_WORDS = (
    "behaviour|colour|neighbour|favour|honour|analys(?:e|es|ed|ing)\\b|licence|centre|spelt|catalogue|modell(?:ed|ing)|"
    "labell(?:ed|ing)|artefact|grey\\b|whilst|judgement"
)
BRITISH = re.compile(
    rf"(?<![a-z])(?:(?:un|de|re)?(?:{IZE})is(?:e|es|ed|er|ers|ing|able|ation|ations)\b|(?:{BRITISH_WORDS}))",
    re.IGNORECASE,
)
SKIP = "# fmt: " + "skip"
KERNELS = re.compile(r"diff_attention_(?:triton\w*_)?kernels\.py")  # which may lay out their arguments
COUNTED = (
    "format_skips",
    "tuple_assignments",
    "nested_conditionals",
    "positional_calls",
    "a_layer",
    "british",
    "sections",
)


class Measurements:
    """What the files of a folder hold: `counts` by name, and the `places` of each thing counted."""

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root
        self.counts: Counter[str] = Counter()
        self.file_lines: list[int] = []
        self.function_lines: list[int] = []
        self.places: defaultdict[str, list[str]] = defaultdict(list)

    def add(self, what: str, path: Path, line: int, text: str) -> None:
        self.counts[what] += 1
        self.places[what].append(f"{path.relative_to(self.root).as_posix()}:{line}: {text.strip()[:140]}")

    def per_thousand_lines(self, what: str) -> float:
        return 1000 * self.counts[what] / max(1, sum(self.file_lines))

    def read(self, path: Path) -> None:
        """Adds one file."""
        source = path.read_text(encoding="utf-8")
        lines = source.splitlines()
        self.file_lines.append(len(lines))
        for number, line in enumerate(lines, 1):
            if SKIP in line and not KERNELS.match(path.name):
                self.add("format_skips", path, number, line)
            for match in BRITISH.finditer(line):
                self.add("british", path, number, match.group())
        for number, text in prose(source):
            for match in PER.finditer(text):
                self.add("a_layer", path, number, match.group())
            self.counts["per_layer"] += len(re.findall(r"\b(?:per[- ](?:layer|token)|/token)\b", text))
        tree = ast.parse(source)
        for node in ast.walk(tree):
            for what in idioms(node):
                self.add(what, path, node.lineno, lines[node.lineno - 1])
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                self.function_lines.append(node.end_lineno - node.lineno + 1)
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                if missing := missing_sections(node):
                    self.add("sections", path, node.lineno, f"{node.name}: {', '.join(missing)}")
                else:
                    self.counts["with_sections"] += 1


def prose(source: str) -> Iterator[tuple[int, str]]:
    """Yields comments and strings of a file, each with the line it begins on."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING) or "FSTRING_MIDDLE" in tokenize.tok_name[token.type]:
            yield token.start[0], " ".join(token.string.split())


def idioms(node: ast.AST) -> Iterator[str]:
    """Yields the names of what makes one syntax node dense."""
    if isinstance(node, ast.IfExp):
        yield "conditionals"
        if any(isinstance(inner, ast.IfExp) for inner in ast.walk(node) if inner is not node):
            yield "nested_conditionals"
    if isinstance(node, ast.Call) and sum(not isinstance(argument, ast.Starred) for argument in node.args) > 3:
        yield "positional_calls"
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
        targets = [target for target in node.targets if isinstance(target, ast.Tuple)]
        if targets and not any(is_permutation(target, node.value) for target in targets):
            yield "tuple_assignments"


def is_permutation(target: ast.Tuple, value: ast.Tuple) -> bool:
    """Returns whether an assignment only exchanges names, as `a, b = b, a` does."""
    return {ast.unparse(part) for part in target.elts} == {ast.unparse(part) for part in value.elts}


def missing_sections(node: ast.FunctionDef | ast.ClassDef) -> list[str]:
    """Returns the docstring sections that a definition calls for and does not have."""
    docstring = ast.get_docstring(node)
    if docstring is None:
        return ["docstring"]
    if isinstance(node, ast.ClassDef):
        return []
    wanted = []
    arguments = node.args
    if arguments.posonlyargs or arguments.args or arguments.kwonlyargs or arguments.vararg or arguments.kwarg:
        wanted.append("Args")
    if node.returns is not None and ast.unparse(node.returns) != "None":
        wanted.append("Yields" if any(isinstance(inner, ast.Yield) for inner in ast.walk(node)) else "Returns")
    if any(isinstance(inner, ast.Raise) and inner.exc is not None for inner in ast.walk(node)):
        wanted.append("Raises")
    return [name for name in wanted if f"{name}:\n" not in f"{docstring}\n"]


def measure(folder: Path, *, root: Path = ROOT, inner: bool = True) -> Measurements:
    """Measures the Python files of a folder, with those of its subfolders if `inner`."""
    measured = Measurements(root)
    for path in sorted(folder.rglob("*.py") if inner else folder.glob("*.py")):
        if "__pycache__" not in path.parts:
            measured.read(path)
    return measured


def rows(root: Path) -> Iterator[tuple[str, Measurements]]:
    """Yields folders with their measurements; those of the two packages by subfolder as well."""
    for name in FOLDERS:
        yield name, measure(root / name, root=root)
        if name in ("modeling_diff", "conversion"):
            folders = {path.parent for path in (root / name).rglob("*.py") if "__pycache__" not in path.parts}
            for folder in sorted(folders):
                yield f"  {folder.relative_to(root).as_posix()}/", measure(folder, root=root, inner=False)


def print_table(root: Path) -> None:
    columns = [
        "files",
        "lines",
        "file",
        "function",
        "skips",
        "tuples/k",
        "conds/k",
        "nested",
        ">3 args",
        '"a"',
        '"per"',
    ]
    columns += ["British", "sections", "without"]
    print(f"{'folder':28}" + "".join(f"{column:>9}" for column in columns))
    for name, measured in rows(root):
        if not measured.file_lines:
            continue
        values = [len(measured.file_lines), sum(measured.file_lines)]
        values += [
            f"{statistics.median(lines or [0]):.0f}" for lines in (measured.file_lines, measured.function_lines)
        ]
        values += [measured.counts["format_skips"]]
        values += [f"{measured.per_thousand_lines(what):.1f}" for what in ("tuple_assignments", "conditionals")]
        names = (
            "nested_conditionals",
            "positional_calls",
            "a_layer",
            "per_layer",
            "british",
            "with_sections",
            "sections",
        )
        values += [measured.counts[what] for what in names]
        print(f"{name:28}" + "".join(f"{value:>9}" for value in values))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--at", metavar="COMMIT", help="Measure this commit instead of the working tree.")
    parser.add_argument("--list", choices=COUNTED, help="Print every place of one of the things counted.")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        root = ROOT
        if options.at:
            root = Path(scratch)
            archive = subprocess.run(["git", "archive", options.at], cwd=ROOT, capture_output=True, check=True).stdout
            subprocess.run(["tar", "-x", "-C", scratch], input=archive, check=True)
        if options.list:
            for name in FOLDERS:
                for place in measure(root / name, root=root).places[options.list]:
                    print(place)
        else:
            print_table(root)
    return 0


if __name__ == "__main__":
    sys.exit(main())
