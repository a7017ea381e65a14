"""A self-contained HTML page: text, tables and plots, each plot once for light and once for dark."""

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

from .report_figures import DARK, LIGHT, Draw


STYLE = """
:root { color-scheme: light; --page: #fff; --ink: #1d2330; --muted: #5d6677; --line: #e3e6ec; --soft: #f5f7fa;
  --accent: #1f77c9; }
:root[data-theme=dark] { color-scheme: dark; --page: #171b24; --ink: #e6e9f0; --muted: #9aa4b8; --line: #2d3443;
  --soft: #1e2430; --accent: #5aa9f5; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.55 system-ui, sans-serif; }
main { max-width: 980px; margin: 0 auto; padding: 32px 28px 64px; }
header { display: flex; align-items: baseline; gap: 16px; }
h1 { font-size: 27px; line-height: 1.25; margin: 0; flex: 1; letter-spacing: -.01em; }
h2 { font-size: 19px; margin: 44px 0 6px; padding-top: 18px; border-top: 1px solid var(--line); }
p { margin: 6px 0 12px; max-width: 74ch; }
.note, figcaption { color: var(--muted); font-size: 13.5px; max-width: 80ch; }
nav { margin: 14px 0 0; display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 14px; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
button { font: inherit; font-size: 13px; color: var(--muted); background: none; border: 1px solid var(--line);
  border-radius: 6px; padding: 3px 11px; cursor: pointer; }
.table { overflow-x: auto; margin: 14px 0 18px; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; min-width: 62%; }
th, td { padding: 5px 14px 5px 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; color: var(--muted); }
th:first-child, td:first-child, .words th:nth-child(2), .words td:nth-child(2) { text-align: left; }
tr.published td { color: var(--muted); font-style: italic; }
figure { margin: 16px 0 22px; }
figure img { max-width: 100%; height: auto; display: block; }
:root[data-theme=light] .dark, :root[data-theme=dark] .light { display: none; }
@media print { button { display: none; } }
"""
SCRIPT = """
const root = document.documentElement;
document.querySelector("button").addEventListener("click", () => {
  root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
});
"""
# Before anything is drawn, so that a dark page does not flash.
THEME = (
    'document.documentElement.dataset.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";'
)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], published: Sequence[Sequence[str]] = ()) -> str:
    """Renders a table. Cells are text; a second column of words is aligned left; `published` rows are set apart."""

    def line(cells: Sequence[str], tag: str, css: str = "") -> str:
        return f"<tr{css}>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    words = any(row[1][:1].isalpha() for row in rows)
    body = "".join([line(row, "td") for row in rows] + [line(row, "td", " class=published") for row in published])
    opening = f"<div class=table><table{' class=words' if words else ''}>"
    return f"{opening}<thead>{line(header, 'th')}</thead><tbody>{body}</tbody></table></div>"


def figure(draw: Draw, models: Sequence[dict[str, Any]], caption: str) -> str:
    """Renders a plot inline, once for each theme."""
    images = []
    for name, palette in (("light", LIGHT), ("dark", DARK)):
        buffer = io.BytesIO()
        drawn = draw(models, palette)
        drawn.savefig(buffer, format="png", dpi=144)
        width = round(102 * drawn.get_size_inches()[0])  # pixels of the page, the same per inch in every plot
        data = base64.b64encode(buffer.getvalue()).decode()
        source = f"data:image/png;base64,{data}"
        images.append(f'<img class={name} width={width} alt="{html.escape(caption)}" src="{source}">')
    return f"<figure>{''.join(images)}<figcaption>{html.escape(caption)}</figcaption></figure>"


def paragraph(text: str, css: str = "") -> str:
    """Renders a paragraph of text."""
    return f"<p{f' class={css}' if css else ''}>{html.escape(text)}</p>"


def page(title: str, sections: dict[str, str]) -> str:
    """Renders the document from the HTML of each section by its heading. It needs no network and no other file."""
    title = html.escape(title)
    links = "".join(f'<a href="#s{i}">{html.escape(name)}</a>' for i, name in enumerate(sections))
    body = "".join(
        f"<section id=s{i}><h2>{html.escape(name)}</h2>{content}</section>"
        for i, (name, content) in enumerate(sections.items())
    )
    return (
        "<!doctype html><html lang=en data-theme=light><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width">'
        f"<title>{title}</title><style>{STYLE}</style><script>{THEME}</script><main><header><h1>{title}</h1>"
        f"<button>light / dark</button></header><nav>{links}</nav>{body}</main><script>{SCRIPT}</script></html>\n"
    )
