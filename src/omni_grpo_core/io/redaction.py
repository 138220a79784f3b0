"""Texts without secrets. A secret is known by its look, and by being the value of an environment
variable whose name says so."""

from __future__ import annotations

import os
import re

REDACTED = "<redacted>"

_VARIABLE = re.compile(r"key|token|secret|passw|credential|auth", re.IGNORECASE)
_SHORTEST = 8
"""Characters: a shorter value of a variable ("1", "true") stands in too many innocent texts."""
_LOOK = re.compile(
    r"\b(?:sk|pk|rk)-[A-Za-z0-9_-]{16,}|\bhf_[A-Za-z0-9]{20,}|\bgh[pousr]_[A-Za-z0-9]{20,}"
    r"|\bAKIA[A-Z0-9]{16}\b|(?<=Bearer )\S+|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)


class Redactor:
    """Holds the environment's secrets of the moment it was made, to know them again; they are
    written nowhere."""

    def __init__(self) -> None:
        self._secrets = sorted(
            (
                value
                for name, value in os.environ.items()
                if _VARIABLE.search(name) and len(value) >= _SHORTEST
            ),
            key=len,
            reverse=True,
        )

    def text(self, value: str) -> str:
        """
        >>> Redactor().text("Authorization: Bearer abcdef")
        'Authorization: Bearer <redacted>'
        """
        for secret in self._secrets:
            value = value.replace(secret, REDACTED)
        return _LOOK.sub(REDACTED, value)
