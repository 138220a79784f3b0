"""Does the completion have the requested structure?"""

from __future__ import annotations

from omni_grpo_core.rewards import Reward, RewardRow
from omni_grpo_core.rewards.parse import SECTIONS, TAG, parse
from omni_grpo_core.types import Malformed, Score


class Format(Reward):
    """1 for the exact structure of :mod:`~omni_grpo_core.rewards.parse`, else 0.

    ``graded``: a third for each section that occurs once, complete, not empty and in order,
    whatever else is there, but never 1 without the exact structure.

    >>> Format()(["q"], ["<context>c</context><think>t</think><answer>A</answer>"])
    [1.0]
    >>> Format().explain(["q"], ["A"])
    [Score(value=0.0, reason="text outside the tags: 'A' at 0")]
    """

    def __init__(self, *, graded: bool = False, name: str = "format") -> None:
        super().__init__(name)
        self.graded = graded

    def score(self, row: RewardRow) -> Score:
        parsed = parse(row.text)
        if not isinstance(parsed, Malformed):
            return Score(1.0, "well formed")
        reason = f"{parsed.what} at {parsed.where}"
        if not self.graded:
            return Score(0.0, reason)
        whole = _whole_sections(row.text)
        # at most two thirds: only the exact structure earns everything
        return Score(min(len(whole), 2) / 3, f"{reason}; whole: {', '.join(whole) or 'none'}")


def _whole_sections(text: str) -> list[str]:
    """Sections that occur once, closed, not blank, each after the previous one."""
    whole = []
    end = 0
    for name in SECTIONS:
        opening, closing = f"<{name}>", f"</{name}>"
        if text.count(opening) != 1 or text.count(closing) != 1:
            continue
        start, stop = text.index(opening), text.index(closing)
        inside = text[start + len(opening) : stop]
        if end <= start < stop and inside.strip() and not TAG.search(inside):
            whole.append(name)
            end = stop + len(closing)
    return whole
