"""Foreign text as words of a Markdown page."""

import html
import re

from conversion.errors import escape


# What Markdown or the Hub's formulas would act on within a line; `://` and `www.` become links by themselves.
MARKUP = re.compile(r"[\\`*\[\]|~$]|:(?=//)|(?<=www)\.", re.IGNORECASE)


def markdown(text: object) -> str:
    """Returns the escaped text as plain words of a Markdown line or table cell, in which no HTML is left either."""
    return html.escape(MARKUP.sub(lambda found: "\\" + found[0], escape(text)), quote=False)


def code_span(text: object) -> str:
    """Returns the escaped text between backticks, more of them than it holds in a row."""
    shown = escape(text).strip() or " "
    longest = max((len(run) for run in re.findall("`+", shown)), default=0)
    fence = "`" * (longest + 1)
    space = " " if longest else ""
    return f"{fence}{space}{shown}{space}{fence}"
