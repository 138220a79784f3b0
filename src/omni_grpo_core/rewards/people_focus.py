"""Do context and reasoning attend to the people in the clip? A rubric without a model.

Rubric
------
Six cues: **who** is there, **face**, **gaze**, **gesture**, **voice**, **relation**. The words of a
cue are in ``data/people_en.yaml`` and ``data/people_zh.yaml``; both lists always apply.

1. Malformed, or degenerate by the text rules of :mod:`~omni_grpo_core.rewards.degenerate`: 0.
2. *Hits* of a cue: the number of different list entries in ``<context>`` and ``<think>``
   together. An entry counts once, however often and in whatever inflection it occurs.
3. With a gold context, each cue in the gold requires as many hits as the gold has, at most
   ``CAP``; it pays the fraction reached, and the reward is the mean over those cues. Cues that the
   gold does not have pay nothing: naming a gaze that nobody could see is not attention. A gold
   context without people leaves the row unscored.
4. Without a gold context, a cue requires ``CAP`` hits, and ``ENOUGH`` full cues are worth 1.
5. A list of cue words is not a description: ``STUFFED_HITS`` or more entries that make up more than
   ``STUFFED_SHARE`` of the letters of a section earn 0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from omni_grpo_core.errors import ConfigError
from omni_grpo_core.rewards import Reward, RewardRow
from omni_grpo_core.rewards.degenerate import degenerate_text
from omni_grpo_core.rewards.normalise import table
from omni_grpo_core.rewards.parse import gold, parse
from omni_grpo_core.rewards.words import read_lists, tidy, unspaced
from omni_grpo_core.types import Malformed, Score

CUES = ("who", "face", "gaze", "gesture", "voice", "relation")
CAP, ENOUGH = 2, 4
STUFFED_HITS, STUFFED_SHARE = 8, 0.75

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")


class PeopleFocus(Reward):
    """The rubric above. ``words``: cue → words, instead of the shipped lists.

    >>> text = "<context>A man smiles at his friend.</context><think>He nods.</think>"
    >>> columns = {"solution": ["<context>A man smiles.</context><answer>A</answer>"]}
    >>> PeopleFocus().explain(["q"], [text + "<answer>A</answer>"], **columns)
    [Score(value=1.0, reason='who 1/1, face 1/1')]
    """

    def __init__(
        self, words: Mapping[str, Sequence[str]] | None = None, *, name: str = "people_focus"
    ) -> None:
        super().__init__(name)
        self._lists = CueLists(_shipped() if words is None else words)

    @classmethod
    def from_files(cls, *paths: Path) -> PeopleFocus:
        """Merged word lists from YAML files. Raises ConfigError naming the file."""
        return cls(_join([read_lists(path) for path in paths]))

    def score(self, row: RewardRow) -> Score:
        truth = gold(row) if "solution" in row.columns else None
        parsed = parse(row.text)
        if isinstance(parsed, Malformed):
            return Score(0.0, f"malformed: {parsed.what} at {parsed.where}")
        # one by one, so that a sound section does not hide a garbage one
        for section in (parsed.context.text, parsed.think.text):
            garbage = degenerate_text(section)
            if garbage:
                return Score(0.0, f"degenerate: {garbage[0]}")
            listed, share = self._lists.hits(section)
            if sum(listed.values()) >= STUFFED_HITS and share > STUFFED_SHARE:
                return Score(0.0, f"a list of cue words: {share:.0%} of the letters")
        hits, _ = self._lists.hits(f"{parsed.context.text}\n{parsed.think.text}")
        if truth is None or truth.context is None:
            met = {cue: min(hits[cue], CAP) for cue in CUES}
            value = min(1.0, sum(met.values()) / (CAP * ENOUGH))
            return Score(value, ", ".join(f"{cue} {met[cue]}/{CAP}" for cue in CUES))
        asked = {
            cue: min(count, CAP)
            for cue, count in self._lists.hits(truth.context)[0].items()
            if count
        }
        if not asked:
            return Score(None, "the gold context attends to no people")
        met = {cue: min(hits[cue], wanted) for cue, wanted in asked.items()}
        value = sum(met[cue] / asked[cue] for cue in asked) / len(asked)
        return Score(value, ", ".join(f"{cue} {met[cue]}/{asked[cue]}" for cue in asked))


class CueLists:
    """Word lists prepared for one pass over a text.

    Raises :class:`~omni_grpo_core.errors.ConfigError` for an unknown cue.
    """

    def __init__(self, lists: Mapping[str, Sequence[str]]) -> None:
        unknown = sorted(set(lists) - set(CUES))
        if unknown:
            raise ConfigError(
                "people_focus word lists",
                got=f"cue {unknown[0]!r}",
                want="cues among " + ", ".join(CUES),
                fix="rename the cue, or score it with your own reward",
            )
        self._words: dict[str, str] = {}
        self._stems: dict[str, str] = {}
        self._inside: dict[str, str] = {}
        for cue, entries in lists.items():
            for entry in entries:
                word = tidy(entry).casefold()
                if unspaced(word):
                    self._inside[word] = cue
                elif word.endswith("*"):
                    self._stems[word[:-1]] = cue
                else:
                    self._words[word] = cue
        # the longest entry first, so that 他们 is not read as 他
        longest_first = sorted(self._inside, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._stem_lengths = sorted({len(stem) for stem in self._stems})

    def hits(self, text: str) -> tuple[dict[str, int], float]:
        """Number of different entries found per cue, and the share of letters they cover."""
        folded = tidy(text).casefold()
        found: dict[str, str] = {}
        covered = total = 0
        for word in _WORD.findall(folded):
            total += len(word)
            entry = self._entry(word)
            if entry:
                covered += len(word)
                found[entry[0]] = entry[1]
        for match in self._pattern.finditer(folded):
            covered += len(match.group())
            found[match.group()] = self._inside[match.group()]
        counts = dict.fromkeys(CUES, 0)
        for cue in found.values():
            counts[cue] += 1
        return counts, covered / max(total, 1)

    def _entry(self, word: str) -> tuple[str, str] | None:
        if word in self._words:
            return word, self._words[word]
        for length in self._stem_lengths:
            if word[:length] in self._stems:
                return word[:length] + "*", self._stems[word[:length]]
        return None


def _join(many: Sequence[Mapping[str, Sequence[str]]]) -> dict[str, list[str]]:
    joined: dict[str, list[str]] = {}
    for lists in many:
        for cue, entries in lists.items():
            joined.setdefault(cue, []).extend(entries)
    return joined


@cache
def _shipped() -> Mapping[str, Sequence[str]]:
    return _join([table("people_en"), table("people_zh")])
