"""Which rope sections a text model really works with, wherever its version keeps them.

A checkpoint saved by another major version of transformers loads with the sections of another
model: every position is then rotated wrongly, and nothing is raised.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def rope_sections(text_model: Any) -> str:
    """The sections in force, as text; ``""`` where there are none.

    Modules come before the configuration: some versions read it once, when they are made.

    >>> from types import SimpleNamespace as Model
    >>> rope_sections(Model(config=Model(rope_parameters={"mrope_section": [16, 24, 24]})))
    '16 24 24'
    """
    for sections in _found(text_model):
        return " ".join(str(int(size)) for size in sections)
    return ""


def _found(text_model: Any) -> Iterator[Any]:
    modules = text_model.modules() if hasattr(text_model, "modules") else ()
    for owner in (*modules, getattr(text_model, "config", None)):
        own = getattr(owner, "mrope_section", None)
        if isinstance(own, list | tuple):
            yield own
        for name in ("rope_parameters", "rope_scaling"):
            told = getattr(owner, name, None)
            if isinstance(told, dict) and told.get("mrope_section"):
                yield told["mrope_section"]
