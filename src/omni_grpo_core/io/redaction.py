"""Texts without secrets. A secret is known by its look, and by being the value of an environment
variable whose name says so."""

from __future__ import annotations

import base64
import html
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

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


REDACTED = "<redacted>"

_SHORTEST = 4
"""Characters: shorter keys, such as the "x" a local server is given, protect nothing and stand in
too many innocent words."""


class Scrubber:
    """Texts without one secret, which is printable ASCII or empty (then every text is left alone).

    Known again as it is, escaped for URLs, JSON or HTML, and in base64 of anything it is part of,
    in any case (a header may be lowered).

    >>> clean = Scrubber("sk/12+34")
    >>> clean("Bearer sk/12+34, ?key=sk%2f12%2B34, {'k': 'sk\\\\/12+34'}")
    "Bearer <redacted>, ?key=<redacted>, {'k': '<redacted>'}"
    >>> clean(base64.b64encode(b"user:sk/12+34").decode())
    'dXNlcjp<redacted>A=='
    """

    def __init__(self, secret: str) -> None:
        self._found: re.Pattern[str] | None = None
        if len(secret) >= _SHORTEST:
            forms = [re.escape(secret), _spelled(secret), *map(_spelled, _base64(secret))]
            self._found = re.compile("|".join(forms), re.IGNORECASE)

    def __call__(self, text: str) -> str:
        return text if self._found is None else self._found.sub(REDACTED, text)

    @contextmanager
    def logs(self, *libraries: str) -> Iterator[None]:
        """Meanwhile, nothing that the libraries' loggers say holds the secret either: an HTTP
        client logs what servers send back."""

        def scrub(record: logging.LogRecord) -> bool:
            record.msg, record.args = self(record.getMessage()), ()
            return True

        loggers = [
            logging.getLogger(name)
            for name in [*logging.root.manager.loggerDict]
            if name.partition(".")[0] in libraries
        ]
        for logger in loggers:
            logger.addFilter(scrub)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeFilter(scrub)


def _spelled(text: str) -> str:
    # JSON in JSON escapes a backslash again
    return "".join(_character(c) for c in re.sub(r"\\+", r"\\", text))


def _character(character: str) -> str:
    """A character as it is or escaped, up to a few times over; atomic and bounded, so that hostile
    text takes time in proportion to its length."""
    code = ord(character)
    entity = rf"&(?:#0{{0,6}}{code}|#x0{{0,6}}{code:x});|{re.escape(html.escape(character))}"
    escaped = rf"\\{{1,8}}(?:u00{code:02x}|x{code:02x})"
    bare = r"\\{1,64}" if character == "\\" else rf"\\{{0,8}}{re.escape(character)}"
    return rf"(?>%(?:25){{0,3}}{code:02x}|{escaped}|{entity}|{bare})"


def _base64(secret: str) -> Iterator[str]:
    """What stands in the base64 of any text with the secret in it: its bits begin at one of three
    places in a character, and the first and the last character hold neighbours' bits too."""
    for before in range(3):
        data = b"\0" * before + secret.encode()
        whole = slice(-(-before * 8 // 6), len(data) * 8 // 6)
        yield base64.b64encode(data).decode()[whole]
        yield base64.urlsafe_b64encode(data).decode()[whole]
