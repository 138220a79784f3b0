"""A completion taken apart for showing: its sections, or the place where it goes wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from omni_grpo_core.report.html.visible import shortened
from omni_grpo_core.types import Malformed, Parsed

PieceKind = Literal["context", "think", "answer", "plain", "fault", "after"]
_LONGEST = 6000
"""Characters of a piece that are shown."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a completion. A ``fault`` is the mark itself: its text says what is wrong."""

    kind: PieceKind
    text: str


def pieces(text: str, parsed: Parsed | Malformed) -> tuple[Piece, ...]:
    """``text`` in order, tags kept; every character of it stands in exactly one piece.

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
