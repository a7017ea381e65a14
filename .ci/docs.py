"""
What the documentation takes from the code: the command line's reference, tables, and files outside docs/.

    docs.py          writes the file tree and the table of models into their pages
    docs.py check    says whether they are as they should be

As a hook of mkdocs (`mkdocs build`) it fills in the command line's reference, and makes pages of README, the changelog
and the notebook, so that links of pages which are read on a code host lead somewhere in the built site as well.
"""

import ast
import html
import importlib
import json
import posixpath
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[1]
TREE_FOLDERS = ("modeling_diff", "conversion", "examples")
COMMANDS = "<!-- commands -->"
NOTEBOOK = "examples/notebooks/convert_and_compare.ipynb"
# Files outside docs/ that become pages of the site.
PAGES = {
    "README.md": "readme.md",
    "CONTRIBUTING.md": "developer/contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples/assets/tiny-llama/README.md": "tiny-llama.md",
    NOTEBOOK: "notebook.md",
}
PICTURES = (".png", ".svg")
# Text in brackets, which may itself be a picture, and a target.
LINK = re.compile(r"(!?)\[((?:[^\[\]]|!\[[^\]]*\]\([^)\s]*\))*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"^(```.*?^```[^\n]*$)", re.MULTILINE | re.DOTALL)


def purpose(path: Path) -> str:
    """Returns the first sentence of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(text.partition("\n\n")[0].split())
    return re.split(r"(?<=\.) ", paragraph, maxsplit=1)[0].rstrip(".")


def file_tree() -> str:
    """Returns every Python file of the code with its purpose, as a block of Markdown."""
    lines = []
    for top in TREE_FOLDERS:
        folders = sorted({path.parent for path in (ROOT / top).rglob("*.py")})
        for folder in folders:
            files = sorted(path for path in folder.glob("*.py"))
            width = max(len(path.name) for path in files) + 2
            lines.append(f"{folder.relative_to(ROOT).as_posix()}/")
            lines += [f"    {path.name:{width}}{purpose(path)}".rstrip() for path in files]
    return "```\n" + "\n".join(lines) + "\n```\n"


def model_table() -> str:
    """Returns the models that can be converted as a table of Markdown."""
    from conversion.source.architectures import ARCHITECTURES

    rows = [
        f"| `{name}` | {cell(row.models)} | {cell(row.adds)} | {cell(row.limits)} |"
        for name, row in ARCHITECTURES.items()
    ]
    header = [
        "| `model_type` | models | what its layers have that LLaMA's have not | what is refused |",
        "|---|---|---|---|",
    ]
    return "\n".join([*header, *rows]) + "\n"


# Between two comments of its name in a page: readable on a code host, and a test says when it is old.
WRITTEN = {
    "docs/developer/architecture.md": ("tree", file_tree),
    "docs/concepts/conversion.md": ("models", model_table),
}


def renewed(page: str) -> str:
    """Returns the text of a page of `WRITTEN` with its block as the code has it today."""
    name, block = WRITTEN[page]
    text = (ROOT / page).read_text(encoding="utf-8")
    start = f"<!-- {name} -->\n"
    end = f"<!-- /{name} -->"
    return text[: text.index(start) + len(start)] + block() + text[text.index(end) :]


def program() -> Any:
    """Returns the command group behind the console script `diff-llama`."""
    import typer

    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    module = importlib.import_module(scripts["diff-llama"].partition(":")[0])
    return typer.main.get_command(module.app)


def command_reference() -> str:
    """Returns a section of Markdown per command: what it does, its usage, its arguments and options."""
    sections = []
    for name, command in program().commands.items():
        context = command.context_class(command, info_name=f"diff-llama {name}")
        usage = command.get_usage(context).partition(": ")[2]
        records = [param.get_help_record(context) for param in command.get_params(context)]
        rows = [f"| {code(option)} | {cell(meaning)} |" for option, meaning in filter(None, records)]
        table = "\n".join(["| argument or option | meaning |", "|---|---|", *rows])
        sections.append(f"## diff-llama {name}\n\n{command.help}\n\n```text\n{usage}\n```\n\n{table}\n")
    return "\n".join(sections)


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")


def code(text: str) -> str:
    """Returns code for a cell; between backticks Python-Markdown would show the backslash before a bar."""
    return f"<code>{html.escape(text).replace('|', '&#124;')}</code>"


def notebook_page(path: Path) -> str:
    """Returns a notebook as Markdown, with the outputs that it was saved with; pictures are within the page."""
    parts = []
    for entry in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(entry["source"])
        parts.append(source if entry["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in entry.get("outputs", []):
            data = output.get("data", {"text/plain": output.get("text", [])})
            if "image/png" in data:
                parts.append(f"![output](data:image/png;base64,{data['image/png'].strip()})")
            else:
                parts.append("```text\n" + "".join(data["text/plain"]).rstrip() + "\n```")
    return "\n\n".join(parts) + "\n"


def site_links(markdown: str, source: str, page: str) -> str:
    """
    Returns a page with links that lead somewhere in the site; one to a file that is not in it becomes its text.

    Args:
        markdown: The page as a code host shows it.
        source: Its file in the repository.
        page: Its place in the site.
    """

    def replaced(found: re.Match) -> str:
        mark, text, target = found.groups()
        text = LINK.sub(replaced, text)
        if re.match(r"[a-z]+:|#", target):
            return f"{mark}[{text}]({target})"
        path, _, anchor = target.partition("#")
        there = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if there.startswith("docs/"):
            there = there.removeprefix("docs/")
        elif there in PAGES:
            there = PAGES[there]
        elif not there.endswith(PICTURES):
            return text
        relative = posixpath.relpath(there, posixpath.dirname(page))
        return f"{mark}[{text}]({relative}{'#' + anchor if anchor else ''})"

    parts = FENCE.split(markdown)
    return "".join(part if part.startswith("```") else LINK.sub(replaced, part) for part in parts)


def linked_pictures() -> Iterator[str]:
    """Yields the pictures outside docs/ that pages show."""
    pages = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")} | set(PAGES)
    for page in sorted(pages):
        for _, _, target in LINK.findall((ROOT / page).read_text(encoding="utf-8")):
            there = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
            if there.endswith(PICTURES) and not there.startswith(("docs/", "http")) and ":" not in target:
                yield there


def on_config(config: Any) -> Any:
    """Has the code next to this file imported, whatever is installed. Called by mkdocs."""
    sys.path.insert(0, str(ROOT))
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds pages and pictures from outside docs/. Called by mkdocs."""
    from mkdocs.structure.files import File

    for source, page in PAGES.items():
        path = ROOT / source
        markdown = notebook_page(path) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=site_links(markdown, source, page)))
    for picture in dict.fromkeys(linked_pictures()):
        files.append(File.generated(config, picture, abs_src_path=str(ROOT / picture)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Fills in the command line's reference and turns links out of docs/. Called by mkdocs."""
    if page.file.src_uri not in PAGES.values():
        markdown = site_links(markdown, f"docs/{page.file.src_uri}", page.file.src_uri)
    return markdown.replace(COMMANDS, command_reference()) if COMMANDS in markdown else markdown


def main(arguments: list[str]) -> None:
    if arguments not in ([], ["check"]):
        raise SystemExit(__doc__)
    sys.path.insert(0, str(ROOT))
    for page in WRITTEN:
        text = renewed(page)
        if not arguments:
            (ROOT / page).write_text(text, encoding="utf-8")
        elif text != (ROOT / page).read_text(encoding="utf-8"):
            raise SystemExit(f"{page}: what is written from the code is not that of today; run python .ci/docs.py")


if __name__ == "__main__":
    main(sys.argv[1:])
