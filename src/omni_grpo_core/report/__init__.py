"""Results for people: pages and terminal output, which judge nothing, and text made safe to show
in either.

A completion may contain anything: escape codes that repaint a terminal, characters that reverse
the text after them, lone surrogates that no file can hold. Here they become visible.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from omni_grpo_core.types import Malformed, Parsed, Row, audio_words

_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # controls, all but tab and newline
    "\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff"  # zero width, or changes direction
    "\ud800-\udfff"  # lone surrogates
    "\ufffe\uffff]"  # noncharacters, which XML refuses
)


def visible(text: str) -> str:
    r"""``text`` with every control and invisible character written out.

    C0 controls become control pictures (U+2400 to U+241F); the others Python escapes.

    >>> visible("a\x1b[2Jb\u202ec\n")
    'a␛[2Jb\\u202ec\n'
    """
    return _UNSEEN.sub(_written_out, text)


def shortened(text: str, limit: int) -> str:
    """At most ``limit`` characters of ``text``, with a count of those cut.

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


PieceKind = Literal["context", "think", "answer", "plain", "fault", "after"]
_LONGEST = 6000
"""Characters shown per piece."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a completion. A ``fault`` is a marker: its text says what is wrong."""

    kind: PieceKind
    text: str


def pieces(text: str, parsed: Parsed | Malformed) -> tuple[Piece, ...]:
    """``text`` in order, tags kept; every character is in exactly one piece.

    >>> pieces("ab", Malformed("text outside the tags: 'b'", 1))[1]
    Piece(kind='fault', text="text outside the tags: 'b' (character 1)")
    """
    if isinstance(parsed, Malformed):
        made = [
            Piece("plain", text[: parsed.where]),
            Piece("fault", f"{parsed.what} (character {parsed.where})"),
            Piece("after", text[parsed.where :]),
        ]
    else:
        made, last = [], 0
        for name in ("context", "think", "answer"):
            section = getattr(parsed, name)
            made += [Piece("plain", text[last : section.start]), Piece(name, section.text)]
            last = section.end
        made.append(Piece("plain", text[last:]))
    return tuple(Piece(p.kind, shortened(p.text, _LONGEST)) for p in made if p.text)


def kind_of(row: Row) -> tuple[str | bool, ...]:
    """How media reach the model in this row: audio mode, whether an item comes in several chunks,
    and the modalities in token order."""
    items = {(span.modality, span.item) for span in row.spans}
    modalities = dict.fromkeys(span.modality for span in row.spans)
    return (audio_words(row.audio_in_video), len(row.spans) > len(items), *modalities)


def varied(rows: Sequence[Row], limit: int) -> tuple[int, ...]:
    """Indices of at most ``limit`` rows, ascending: the first of each kind, then the second, …"""
    seen: dict[tuple[str | bool, ...], int] = {}
    ranked = []
    for index, row in enumerate(rows):
        rank = seen.get(kind_of(row), 0)
        seen[kind_of(row)] = rank + 1
        ranked.append((rank, index))
    return tuple(sorted(index for _, index in sorted(ranked)[:limit]))
