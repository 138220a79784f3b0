"""HTML reports. Shared by all pages: templates, safe text, writing to disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from omni_grpo_core.io.atomic import write_file
from omni_grpo_core.report import visible

Decode = Callable[[Sequence[int]], str]
"""Token ids to text, special tokens kept."""
MOST_CELLS = 600
"""Cells per ribbon; a longer row gets several tokens per cell, which keeps the page small."""


@dataclass(frozen=True, slots=True)
class Tick:
    """A mark on an axis; ``at`` is in the axis' own unit."""

    at: float
    label: str


def write_page(path: Path, html: str) -> None:
    """Write the page to ``path``, whole or not at all.

    Raises :class:`~omni_grpo_core.errors.TraceError` if ``path`` cannot be written.
    """
    write_file(path, html.encode("utf-8"))


def render(template: str, **values: Any) -> str:
    """Render a page. All inserted text is escaped, and control characters are made visible."""

    def shown(item: Any) -> Any:
        return visible(item) if type(item) is str else item

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("omni_grpo_core", "report/templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=shown,
    )
    return environment.get_template(template).render(values)


def number_range(first: float, last: float) -> str:
    """
    >>> number_range(3, 3), number_range(3, 5)
    ('3', '3–5')
    """
    return f"{first:.9g}" if first == last else f"{first:.9g}–{last:.9g}"


def tokens_per_cell(length: int) -> int:
    """The most tokens that one cell represents in a ribbon of ``length`` tokens.

    >>> tokens_per_cell(210), tokens_per_cell(2400)
    (1, 4)
    """
    return max(1, -(-length // MOST_CELLS))
