"""Which option does an answer name?

An answer names an option by its label (``B``, ``b``, ``(B)``, ``B.``, ``B)``), by label and text
(``B. red``) or by the text alone (``red``). A label with another option's text names none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from omni_grpo_core.rewards.words import fold, tidy

_LABEL = re.compile(r"[(\[]?([A-Za-z])[)\].:,、。]*")
_LABELLED = re.compile(r"[(\[]?([A-Za-z])(?:[)\]][.:]?|[.:、])\s*(\S.*)", re.DOTALL)
_ANOTHER_LABEL = re.compile(r"(?<!\w)[A-Z](?:[).:、,]|$)")
_SEPARATORS = re.compile(r"([,;、/&|]|\band\b|和)")


@dataclass(frozen=True, slots=True)
class Options:
    """Labels and folded texts of a question's options; empty where the row lists none."""

    labels: tuple[str, ...]
    texts: tuple[str, ...]

    @classmethod
    def read(cls, options: Sequence[str]) -> Options:
        """Labels as in the data; by position unless every option has its own.

        >>> Options.read(["A. Red", "B. Blue"]) == Options.read(["Red", "Blue"])
        True
        """
        matches = [_LABELLED.fullmatch(tidy(option)) for option in options]
        found = [match for match in matches if match]
        labels = tuple(match.group(1).upper() for match in found)
        if len(set(labels)) == len(options):
            return cls(labels, tuple(fold(match.group(2)) for match in found))
        return cls(
            tuple(chr(ord("A") + i) for i in range(len(options))),
            tuple(fold(option) for option in options),
        )

    def label_of(self, answer: str) -> str | None:
        """The label of the one option that ``answer`` names, or ``None``.

        >>> Options.read(["A. Red", "B. Blue"]).label_of("(b)")
        'B'
        >>> Options.read(["A. Red", "B. Blue"]).label_of("A. Blue") is None
        True
        """
        text = tidy(answer)
        bare = _LABEL.fullmatch(text)
        if bare:
            return self._known(bare.group(1).upper())
        labelled = _LABELLED.fullmatch(text)
        if labelled:
            label, rest = labelled.group(1).upper(), labelled.group(2)
            if not self.labels:
                # no option texts to compare with: at least it must not name a second label
                return None if _ANOTHER_LABEL.search(rest) else label
            if label in self.labels and self._text(label) == fold(rest):
                return label
        folded = fold(text)
        same = [label for label in self.labels if self._text(label) == folded]
        return same[0] if len(same) == 1 else None

    def _known(self, label: str) -> str | None:
        return label if not self.labels or label in self.labels else None

    def _text(self, label: str) -> str:
        return self.texts[self.labels.index(label)]


def label_set(answer: str, options: Options) -> tuple[frozenset[str], frozenset[str]]:
    """Labels that a list of options names, and the folded pieces that name none.

    Order, spacing, separators and repetition do not matter; an option's text may contain commas.

    >>> label_set("E, a and xyz", Options.read(list("pqrst")))[1]
    frozenset({'xyz'})
    """
    # pieces at even indices, the separators between them at odd ones
    parts = _SEPARATORS.split(tidy(answer))
    # an option's text may contain separators: up to that many pieces may form one name
    widest = 1 + max((len(_SEPARATORS.findall(text)) for text in options.texts), default=0)
    named: set[str] = set()
    unknown: set[str] = set()
    start = 0
    while start < len(parts):
        label, end = _longest_name(parts, start, widest, options)
        piece = parts[start].strip()
        if label is not None:
            named.add(label)
        elif letters := _run_of_labels(piece, options):
            named |= letters
        elif fold(piece):
            unknown.add(fold(piece))
        start = end
    return frozenset(named), frozenset(unknown)


def _longest_name(
    parts: Sequence[str], start: int, widest: int, options: Options
) -> tuple[str | None, int]:
    """The label named by the longest run of pieces from ``start``, and where to continue."""
    for width in range(widest, 0, -1):
        end = start + 2 * width
        label = options.label_of("".join(parts[start : end - 1]))
        if label is not None:
            return label, end
    return None, start + 2


def _run_of_labels(piece: str, options: Options) -> set[str]:
    """``"A E"`` and ``"AE"``: capital labels of this question and nothing else."""
    letters = set(piece.replace(" ", ""))
    known = options.labels or tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    return letters if letters <= set(known) else set()
