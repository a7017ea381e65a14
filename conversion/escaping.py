"""Foreign text (names and values out of files, of the Hub, of other programs) made fit to be shown to people."""

import html
import re


# What Markdown or the Hub's formulas would act on within a line; `://` and `www.` become links by themselves.
MARKUP = re.compile(r"[\\`*\[\]|~$]|:(?=//)|(?<=www)\.", re.IGNORECASE)


def escape(text: object) -> str:
    """Returns the text on one line, with `\\x1b`, `\\n`, `\\u202e` in place of what cannot be seen.

    Everything foreign passes through here before it is printed, logged, raised as an error or put into a card.
    """
    shown = str(text)
    if shown.isprintable():
        return shown
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in shown)


def markdown(text: object) -> str:
    """Returns the escaped text as plain words of a Markdown line or table cell, in which no HTML is left either."""
    return html.escape(MARKUP.sub(lambda found: "\\" + found[0], escape(text)), quote=False)


def code_span(text: object) -> str:
    """Returns the escaped text between backticks, more of them than it holds in a row."""
    shown = escape(text).strip() or " "
    longest = max((len(run) for run in re.findall("`+", shown)), default=0)
    fence, space = "`" * (longest + 1), " " if longest else ""
    return f"{fence}{space}{shown}{space}{fence}"
