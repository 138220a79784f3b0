"""Which option does an answer name?

An answer names an option by its label (``B``, ``b``, ``(B)``, ``B.``, ``B)``), by label and text
(``B. red``) or by the text alone (``red``). A label with another option's text names none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from omni_grpo_core.rewards.normalise import items, plain, unlabellings
from omni_grpo_core.rewards.words import fold, tidy

_LABEL = re.compile(r"[(\[{]?([A-Za-z]|\d{1,2})(?:选项|项)?[)\]}.:,、。]*")
# after a digit a space: "1.5 m" is an option's text
_LABELLED = re.compile(
    r"[(\[]?([A-Za-z])(?:[)\]][.:]?\s*|[.:、]\s*|\s[-–—]\s)(\S.*)|[(\[]?(\d{1,2})(?:[)\]][.:]?|[.:、])\s+(\S.*)",
    re.DOTALL,
)
_ANOTHER_LABEL = re.compile(r"(?<!\w)[A-Z](?:[).:、,]|$)")
_SEPARATORS = re.compile(r"([,;、/&|+]|\band\b|以及|和|与)")


@dataclass(frozen=True, slots=True)
class Options:
    """Labels and folded texts of a question's options; empty where the row lists none."""

    labels: tuple[str, ...]
    texts: tuple[str, ...]

    @classmethod
    def read(cls, options: Sequence[str]) -> Options:
        """Labels as in the data; by position unless every option has its own. Raises
        ``ValueError`` where two options have the same.

        >>> Options.read(["A. Red", "B. Blue"]) == Options.read(["Red", "Blue"])
        True
        """
        found = [part for option in options if (part := _label_and_text(plain(option)))]
        labels = tuple(label for label, _ in found)
        if len(labels) == len(options):
            if len(set(labels)) < len(labels):
                raise ValueError("options that have the same label")
            return cls(labels, tuple(fold(text) for _, text in found))
        return cls(
            tuple(chr(ord("A") + i) for i in range(len(options))),
            tuple(fold(plain(option)) for option in options),
        )

    def label_of(self, answer: str) -> str | None:
        """The label of the one option that ``answer`` names, or ``None``.

        >>> Options.read(["A. Red", "B. Blue"]).label_of("**Option (b)**")
        'B'
        >>> Options.read(["A. Red", "B. Blue"]).label_of("A. Blue") is None
        True
        """
        for text in unlabellings(plain(answer)):
            label = self._named(tidy(text))
            if label is not None:
                return label
        return None

    def _named(self, text: str) -> str | None:
        bare = _LABEL.fullmatch(text)
        if bare and self._known(bare.group(1).upper()):
            return bare.group(1).upper()
        labelled = _label_and_text(text)
        if labelled:
            label, rest = labelled
            if not self.labels:
                # no option texts to compare with: at least it must not name a second label
                return None if _ANOTHER_LABEL.search(rest) else label
            if label in self.labels and self._text(label) == fold(rest):
                return label
        folded = fold(text)
        same = [label for label in self.labels if self._text(label) == folded]
        return same[0] if len(same) == 1 else None

    def _known(self, label: str) -> bool:
        return label in self.labels if self.labels else label.isalpha()

    def _text(self, label: str) -> str:
        return self.texts[self.labels.index(label)]


def lettered(options: Sequence[str]) -> tuple[str, ...]:
    """Options with the labels that :meth:`Options.read` gives them, where none has its own.

    >>> lettered(["Red", "Blue"]), lettered(["1. Red", "2. Blue"])
    (('A. Red', 'B. Blue'), ('1. Red', '2. Blue'))
    """
    if any(_label_and_text(plain(option)) for option in options):
        return tuple(options)
    labels = Options.read(options).labels
    return tuple(f"{label}. {text}" for label, text in zip(labels, options, strict=True))


def _label_and_text(text: str) -> tuple[str, str] | None:
    found = _LABELLED.fullmatch(text)
    return ((found[1] or found[3]).upper(), plain(found[2] or found[4])) if found else None


def label_set(answer: str, options: Options) -> tuple[frozenset[str], frozenset[str]]:
    """Labels that a list of options names, and the folded pieces that name none.

    Order, spacing, separators and repetition do not matter; an option's text may contain commas.

    >>> label_set("E, a and xyz", Options.read(list("pqrst")))[1]
    frozenset({'xyz'})
    """
    # pieces at even indices, the separators between them at odd ones
    parts = _SEPARATORS.split(items(answer))
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
