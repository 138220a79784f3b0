"""Which argument of a reward function holds the completions: signatures differ by trainer.

TRL calls it ``completions``; verl's ``compute_score(data_source, solution_str, ground_truth)`` gets
one text in a call, its batch managers lists. What was sampled tells, else the argument's name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omni_grpo_core.rewards import plain_text
from omni_grpo_core.rewards.call import RewardFunction

_OWN = "completions"
_NAME = re.compile(r"completion|response|solution_str|generat|predict|output", re.IGNORECASE)
_GAPS = re.compile(r"<\|[^|]*\|>|\s+")
_LEAST = 3
"""Characters of a text that others do not contain by chance."""


@dataclass(frozen=True, slots=True)
class Form:
    """``name``: of the argument with the completions, ``""`` where none is known to be. ``alone``:
    whether a call gets one of them, and its columns' values, instead of lists."""

    name: str
    alone: bool = False

    def of_rows(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments by name with the completions as the list ``completions``, and where a call gets
        one, its other arguments as lists of one.

        >>> Form("solution_str", True).of_rows({"solution_str": "a", "ground_truth": "b"})
        {'completions': ['a'], 'ground_truth': ['b']}
        """
        found = {_OWN if name == self.name else name: value for name, value in given.items()}
        return {name: [value] for name, value in found.items()} if self.alone else found

    def by_rows(self, function: RewardFunction) -> RewardFunction:
        """``function`` as it is called with lists, ``completions`` among them."""
        if self.name == _OWN and not self.alone:
            return function

        def called(completions: Sequence[Any], **columns: Any) -> Any:
            if not self.alone:
                return function(**{self.name: completions}, **columns)
            rows = [{name: value[at] for name, value in columns.items()}
                    for at in range(len(completions))]  # fmt: skip
            found = [function(**{self.name: text}, **row)
                     for text, row in zip(completions, rows, strict=True)]  # fmt: skip
            return [score_in(one) for one in found]

        return called


def score_in(value: Any) -> Any:
    """The number in what a function returned for one completion: some return a mapping with it.

    >>> score_in({"score": 1.0, "acc": True}), score_in(0.5)
    (1.0, 0.5)
    """
    return value.get("score") if isinstance(value, Mapping) else value


def form_of(given: Mapping[str, Any], sampled: Callable[[], Sequence[str]]) -> Form:
    """The form of a call with these arguments. ``sampled``: texts that were generated before it,
    asked for only where the name is not TRL's."""
    if _OWN in given:
        return Form(_OWN)
    texts = {name: found for name, value in given.items() if (found := _texts(value))}
    known = [bare for text in sampled() if len(bare := _bare(text)) >= _LEAST]
    made = {name: sum(_is_of(text, known) for text in own) / len(own)
            for name, own in texts.items()}  # fmt: skip
    best = max(made, key=lambda name: made[name], default="")
    if not best or 2 * made[best] <= 1:
        best = next((name for name in texts if _NAME.search(name)), "")
    return Form(best, bool(best) and _is_one(given[best]))


def _is_of(text: str, sampled: Sequence[str]) -> bool:
    """Whether a text is one of those that were sampled, with its prompt or more in front, or the
    most of it."""
    bare = _bare(text)
    return any(one in bare or (bare in one and 2 * len(bare) > len(one)) for one in sampled)


def _bare(text: str) -> str:
    return _GAPS.sub("", text).casefold()


def _is_one(value: Any) -> bool:
    """Whether a value is one completion: a text, or the messages of one turn."""
    if not isinstance(value, list | tuple):
        return isinstance(value, str)
    return bool(value) and all(isinstance(message, Mapping) for message in value)


def _texts(value: Any) -> list[str]:
    if _is_one(value):
        return [plain_text(value, "reward")] if _is_said(value) else []
    if not isinstance(value, list | tuple) or not all(_is_one(v) and _is_said(v) for v in value):
        return []
    return [plain_text(one, "reward") for one in value]


def _is_said(value: Any) -> bool:
    """Whether messages are such: other mappings, as of columns, have no content."""
    return isinstance(value, str) or all("content" in message for message in value)
