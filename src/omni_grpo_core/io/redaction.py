"""Removal of secrets from texts. A secret is recognised by its form, or as the value of an
environment variable with a telling name."""

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
_SHORTEST_VALUE = 8
"""Characters: a variable's shorter value ("1", "true") occurs in too many innocent texts."""
_LOOK = re.compile(
    r"\b(?:sk|pk|rk)-[A-Za-z0-9_-]{16,}|\bhf_[A-Za-z0-9]{20,}|\bgh[pousr]_[A-Za-z0-9]{20,}"
    r"|\bAKIA[A-Z0-9]{16}\b|(?<=Bearer )\S+|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)


class Redactor:
    """Keeps the environment's secrets as of its creation, to recognise them; they are written
    nowhere."""

    def __init__(self) -> None:
        self._secrets = sorted(
            (
                value
                for name, value in os.environ.items()
                if _VARIABLE.search(name) and len(value) >= _SHORTEST_VALUE
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


_SHORTEST_KEY = 4
"""Characters: shorter keys, such as the "x" given to a local server, protect nothing and occur in
too many innocent words."""


class Scrubber:
    """Removes one secret, which is printable ASCII or empty (then texts stay as they are).

    Recognised verbatim, escaped for URLs, JSON or HTML, and inside base64, in upper or lower case
    (headers may be lowercased).

    >>> clean = Scrubber("sk/12+34")
    >>> clean("Bearer sk/12+34, ?key=sk%2f12%2B34, {'k': 'sk\\\\/12+34'}")
    "Bearer <redacted>, ?key=<redacted>, {'k': '<redacted>'}"
    >>> clean(base64.b64encode(b"user:sk/12+34").decode())
    'dXNlcjp<redacted>A=='
    """

    def __init__(self, secret: str) -> None:
        self._found: re.Pattern[str] | None = None
        if len(secret) >= _SHORTEST_KEY:
            forms = [re.escape(secret), _spelled(secret), *map(_spelled, _base64(secret))]
            self._found = re.compile("|".join(forms), re.IGNORECASE)

    def __call__(self, text: str) -> str:
        return text if self._found is None else self._found.sub(REDACTED, text)

    @contextmanager
    def logs(self, *libraries: str) -> Iterator[None]:
        """Meanwhile, remove the secret from the libraries' logs too: HTTP clients log what servers
        send back."""

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
    # JSON within JSON escapes a backslash again
    return "".join(_character(c) for c in re.sub(r"\\+", r"\\", text))


def _character(character: str) -> str:
    """A character verbatim or escaped, up to a few times over; atomic and bounded, so matching
    hostile text takes linear time."""
    code = ord(character)
    entity = rf"&(?:#0{{0,6}}{code}|#x0{{0,6}}{code:x});|{re.escape(html.escape(character))}"
    escaped = rf"\\{{1,8}}(?:u00{code:02x}|x{code:02x})"
    bare = r"\\{1,64}" if character == "\\" else rf"\\{{0,8}}{re.escape(character)}"
    return rf"(?>%(?:25){{0,3}}{code:02x}|{escaped}|{entity}|{bare})"


def _base64(secret: str) -> Iterator[str]:
    """What the base64 of any text containing the secret contains: its bits start at one of three
    offsets, and its first and last character also hold bits of neighbours."""
    for before in range(3):
        data = b"\0" * before + secret.encode()
        whole = slice(-(-before * 8 // 6), len(data) * 8 // 6)
        yield base64.b64encode(data).decode()[whole]
        yield base64.urlsafe_b64encode(data).decode()[whole]
