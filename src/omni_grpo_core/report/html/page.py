"""What every page shares: its templates, safe text, and how it reaches the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from omni_grpo_core.io.atomic import write_file
from omni_grpo_core.report.text import visible


def write_page(path: Path, html: str) -> None:
    """Put the page at ``path``, whole or not at all.

    Raises :class:`~omni_grpo_core.errors.TraceError` when the place cannot be written to.
    """
    write_file(path, html.encode("utf-8"))


def environment() -> jinja2.Environment:
    """Templates whose every inserted text is escaped, and made visible where it would act."""

    def shown(item: Any) -> Any:
        return visible(item) if type(item) is str else item

    return jinja2.Environment(
        loader=jinja2.PackageLoader("omni_grpo_core", "report/templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=shown,
    )
