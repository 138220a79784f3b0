"""Text of models and data, made safe to look at.

A completion may hold anything: escape codes that repaint a terminal, characters that reverse the
text after them, halves of surrogate pairs that no file can hold. Here they become visible.
"""

from __future__ import annotations

import re

_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # controls, all but tab and newline
    "\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff"  # no width, or changes direction
    "\ud800-\udfff]"  # lone surrogates
)


def visible(text: str) -> str:
    r"""``text`` with every character that acts instead of showing written out.

    C0 controls become their pictures (U+2400 to U+241F); the others their Python escapes.

    >>> visible("a\x1b[2Jb\u202ec\n")
    'a␛[2Jb\\u202ec\n'
    """
    return _UNSEEN.sub(_written_out, text)


def shortened(text: str, limit: int) -> str:
    """At most ``limit`` characters of ``text``; what was cut is counted.

    >>> shortened("x" * 50, 10)
    'xxxxxxxxxx … (40 more characters)'
    """
    if len(text) <= limit:
        return text
    return f"{text[:limit]} … ({len(text) - limit} more characters)"


def _written_out(match: re.Match[str]) -> str:
    code = ord(match.group())
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "␡"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
