"""For mkdocstrings: the docstrings' roles, literals and doctests as Markdown."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_ROLE = re.compile(r":\w+:`~?(?:[\w.]+\.)?(\w+)`")
_DOCTEST = re.compile(r"^([ ]*)(>>> .*(?:\n\1(?! *\n).+)*)", re.MULTILINE)


def as_markdown(text: str) -> str:
    """Roles without their modules, literals in single backticks, doctests in fences."""
    text = _ROLE.sub(r"`\1`", text).replace("::\n", ":\n")
    text = re.sub(r"``([^`\n]+(?:\n[^`]+)?)``", r"`\1`", text)
    return _DOCTEST.sub(r"\1```pycon\n\1\2\n\1```", text)


class Markdown(Extension):
    """Converts every docstring before it is parsed."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
