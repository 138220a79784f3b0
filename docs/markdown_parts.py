"""Parts of a generated page."""

from __future__ import annotations

import html
from collections.abc import Iterable

GENERATED = "<!-- made by docs/generate.py: change the code, then make it anew -->"


def page(title: str, parts: Iterable[str]) -> str:
    return "\n\n".join([GENERATED, f"# {title}", *(part for part in parts if part)]) + "\n"


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    return "\n".join([*lines, *(f"| {' | '.join(map(cell, row))} |" for row in rows)])


def code(text: str) -> str:
    """A pipe in a table: backticks keep its backslash in one Markdown and need it in the other."""
    if "|" not in text:
        return f"`{text}`"
    return f"<code>{html.escape(text, quote=False).replace('|', '&#124;')}</code>"
