"""Pages to look at in a browser. What all share: templates, safe text, the way to the disk."""

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
"""Cells of a ribbon; a longer row has several tokens a cell, so that the page stays small."""


@dataclass(frozen=True, slots=True)
class Tick:
    """A mark ``at`` a place of an axis, in the axis' own unit."""

    at: float
    label: str


def write_page(path: Path, html: str) -> None:
    """Put the page at ``path``, whole or not at all.

    Raises :class:`~omni_grpo_core.errors.TraceError` when the place cannot be written to.
    """
    write_file(path, html.encode("utf-8"))


def render(template: str, **values: Any) -> str:
    """A page of ``values``. Every inserted text is escaped, and made visible where it would act."""

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


def tokens_a_cell(length: int) -> int:
    """How many tokens a cell of a ribbon of ``length`` tokens stands for, at the most.

    >>> tokens_a_cell(210), tokens_a_cell(2400)
    (1, 4)
    """
    return max(1, -(-length // MOST_CELLS))
