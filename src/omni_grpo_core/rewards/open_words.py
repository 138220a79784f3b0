"""Open-vocabulary answers: a set of words, or a plain yes or no."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from omni_grpo_core.rewards import RewardRow
from omni_grpo_core.rewards.normalise import items, plain, table, unlabelled
from omni_grpo_core.rewards.parse import Gold, bad_gold
from omni_grpo_core.rewards.words import fold, read_lists
from omni_grpo_core.types import Score

_PIECES = re.compile(r"[,;、/|&]|\band\b|和|以及")
_CLAUSES = re.compile(r"[,.;:!?、。]|\s[-–—]\s")


class OpenWords:
    """The ``emer_ov`` measure: F1 of two sets of words, synonyms counted as one.

    ``synonyms`` maps a head word to its synonyms; the shipped table holds emotions in English and
    Chinese. :meth:`from_file` reads another.

    >>> sorted(OpenWords({"joy": ["happiness"]}).canonical("Happiness, joyful, joy"))
    ['joy', 'joyful']
    """

    def __init__(self, synonyms: Mapping[str, Sequence[str]] | None = None) -> None:
        lists = table("synonyms") if synonyms is None else synonyms
        self._head = {
            fold(word): fold(head) for head, words in lists.items() for word in (head, *words)
        }

    @classmethod
    def from_file(cls, path: Path) -> OpenWords:
        """Synonyms from a YAML file of lists. Raises ConfigError naming the file."""
        return cls(read_lists(path))

    def canonical(self, answer: str) -> frozenset[str]:
        """Head words of the pieces of ``answer``; a word in no list is its own head word."""
        words = {fold(piece) for piece in _PIECES.split(items(answer))} - {""}
        return frozenset(self._head.get(word, word) for word in words)

    def __call__(self, row: RewardRow, truth: Gold, answer: str) -> Score:
        right = self.canonical(truth.answer)
        if not right:
            raise bad_gold(row, truth.answer, "words separated by commas")
        given = self.canonical(answer)
        hits = given & right
        value = 2 * len(hits) / (len(given) + len(right))
        return Score(value, f"{len(hits)} of {len(right)} gold words, {len(given)} given")


def yes_no(row: RewardRow, truth: Gold, answer: str) -> Score:
    """1 if the answer's yes or no (true, 是, 错误) is the gold's. It must be the whole answer or a
    clause of it ("Yes, he is"): a word inside a sentence ("I cannot know") does not count, nor do
    both ("yes. no")."""
    right = polarity(truth.answer)
    if right is None:
        raise bad_gold(row, truth.answer, "yes or no")
    given = polarity(answer)
    if given is None:
        return Score(0.0, f"{answer.strip()[:40]!r} is neither yes nor no")
    return Score(float(given == right), f"answer {_name(given)}, gold {_name(right)}")


def polarity(answer: str) -> bool | None:
    """True for yes, False for no, ``None`` for neither or both.

    >>> polarity("No, he is not."), polarity("yes and no"), polarity("I cannot know")
    (False, None, None)
    """
    known = _verdicts()
    clauses = [fold(clause) for clause in _CLAUSES.split(unlabelled(plain(answer)))]
    found = {known[clause] for clause in clauses if clause in known}
    return found.pop() if clauses[0] in known and len(found) == 1 else None


def _name(yes: bool) -> str:
    return "yes" if yes else "no"


@cache
def _verdicts() -> Mapping[str, bool]:
    return {fold(word): name == "yes" for name in ("yes", "no") for word in table("phrases")[name]}
