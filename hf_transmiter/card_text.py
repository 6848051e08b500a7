"""What goes into a card as text: escaped by default, since names come from anybody's repository.

Templates are in ``assets/cards``. Every value they print passes [`escape`]; code passes [`span`] or [`literal`]. What
is not known (`None`) prints as "not stated", so a template need not ask.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined


NOT_STATED = "not stated"
_FOLDER = Path(__file__).parent / "assets" / "cards"
# What markdown, HTML and the Hub's formulas would read as more than a letter. Underscores inside a word are harmless.
_SPECIAL = re.compile(r"[&<>|\\`*\[\]~#$]|(?<![^\W_])_|_(?![^\W_])|:(?=//)")
# Control characters, line and paragraph ends of every kind, and marks that turn the direction of what follows.
_UNPRINTABLE = re.compile(
    r"[\s\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ufffe\uffff]+"
)


class Raw(str):
    """Markdown that stays as it is."""


def one_line(value) -> str:
    """`value` as text on one line, without what cannot be printed or encoded."""
    return _printable(value).strip()


def _printable(value) -> str:
    return _UNPRINTABLE.sub(" ", str(value).encode("utf-8", "replace").decode("utf-8"))


def escape(value) -> str:
    """`value` as markdown that shows it and does nothing else; [`Raw`] as it is, numbers with thousands separated."""
    if isinstance(value, Raw):
        return str(value)
    if value is None:
        return NOT_STATED
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return _SPECIAL.sub(lambda match: f"&#{ord(match[0])};", _printable(value))


def span(value) -> Raw:
    """Inline code, "not stated" for `None`."""
    if value is None:
        return Raw(NOT_STATED)
    text = one_line(value)
    if not text or "`" in text or "|" in text:  # fences of several backticks do not survive tables
        return Raw(escape(text))
    return Raw(f"`{text}`")


def literal(value) -> Raw:
    """A text as a Python literal on one line, for code blocks."""
    return Raw(json.dumps(str(value).encode("utf-8", "replace").decode("utf-8"), ensure_ascii=False))


def argument(value) -> Raw:
    """A text as one argument of a shell command, for code blocks."""
    text = one_line(value)
    return Raw(text if re.fullmatch(r"[\w@%+=:,./-]+", text, re.ASCII) else "'" + text.replace("'", "'\"'\"'") + "'")


def listed(values, limit: int = 8) -> Raw:
    """The first values, escaped, and how many more there are."""
    values = list(values)
    shown = ", ".join(escape(one_line(value)) for value in values[:limit])
    return Raw(shown + (f" and {len(values) - limit:,} more" if len(values) > limit else ""))


def spans(values) -> Raw:
    """Every value as inline code."""
    return Raw(", ".join(span(value) for value in values) or NOT_STATED)


def short(value) -> Raw:
    """The first letters of a fingerprint."""
    return span(value if value is None else one_line(value)[:16])


def decimals(value) -> Raw:
    return Raw(NOT_STATED if value is None else f"{value:.3f}")


def start(value) -> str:
    """With a capital letter."""
    return value[:1].upper() + value[1:]


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        undefined=StrictUndefined,
        finalize=escape,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    for fill_in in (span, spans, short, decimals, start, literal, argument, listed):
        environment.filters[fill_in.__name__] = fill_in
    environment.filters["path"] = quote
    return environment


def fill(template: str, **facts) -> str:
    """A template of ``assets/cards`` with its facts; blank lines are never doubled.

    Raises:
        jinja2.TemplateError: no such template, or one that asks for a fact that was not passed.
    """
    text = _environment().get_template(template).render(**facts)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
