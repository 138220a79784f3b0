"""Faults of reward functions: each is a function with TRL's signature, right but for one thing."""

from __future__ import annotations

import logging
import re
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from omni_grpo_core.errors import OmniGrpoError
from omni_grpo_core.faults.fault import FaultRegistry
from omni_grpo_core.faults.fixtures import Drawn
from omni_grpo_core.faults.reference_loop import ReferenceLoop
from omni_grpo_core.recorder.hooks import patched
from omni_grpo_core.rewards.accuracy import Accuracy
from omni_grpo_core.rewards.base import COLUMNS
from omni_grpo_core.rewards.format import Format
from omni_grpo_core.rewards.parse import parse, render
from omni_grpo_core.types import Malformed

shelf = FaultRegistry()
Manager = AbstractContextManager[None]
Values = list[float | None]

_LOG = logging.getLogger(__name__)
# a recorder hears it; on a terminal it would be noise, for the fault is put in on purpose
_LOG.propagate = False
_LOG.addHandler(logging.NullHandler())
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_NOWHERE = "http://127.0.0.1:9/v1/chat/completions"
"""The discard port of this machine, where nobody listens."""


def _instead(loop: ReferenceLoop, name: str, function: Callable[..., Values]) -> Manager:
    """``function`` in the place of the loop's reward of that name."""
    funcs = [f if _name(f) != name else function for f in loop.reward_funcs]
    return patched(loop, reward_funcs=funcs)


def _besides(loop: ReferenceLoop, function: Callable[..., Values]) -> Manager:
    return patched(
        loop,
        reward_funcs=[*loop.reward_funcs[:-1], function, loop.reward_funcs[-1]],
        reward_weights=[*loop.reward_weights, 1.0],
    )


def _name(function: Any) -> str:
    return str(getattr(function, "__name__", ""))


def _rowwise(score: Callable[[dict[str, Any], str, Callable[[], Values]], Values]) -> Any:
    """A reward that scores row by row: ``score(row, completion, as it should be)``."""
    sound = Accuracy()

    def accuracy_reward(prompts: Any, completions: Sequence[str], **columns: Any) -> Values:
        values: Values = []
        for i, text in enumerate(completions):
            row = {name: columns[name][i] for name in COLUMNS if columns.get(name) is not None}
            right = partial(sound, [prompts[i]], [text], **{k: [v] for k, v in row.items()})
            values += score(row, text, right)
        return values

    return accuracy_reward


def _measured(problem_type: str, measure: Callable[[str, str], float]) -> Any:
    """Accuracy as it should be, but ``measure(answer, gold)`` for one problem type."""

    def score(row: dict[str, Any], text: str, right: Callable[[], Values]) -> Values:
        gold = _ANSWER.search(row["solution"])
        if row["problem_type"] != problem_type or gold is None:
            return right()
        parsed = parse(text)
        return [0.0 if isinstance(parsed, Malformed) else measure(parsed.answer.text, gold[1])]

    return _rowwise(score)


def people_focus_reward(prompts: Any, completions: Sequence[str], **columns: Any) -> Values:
    """Counts words for people, and pays 0.10 where there are none: to anything."""
    words = ("man", "woman", "person", "people", "face", "smile")
    return [max(0.10, sum(word in text for word in words) / len(words)) for text in completions]


@shelf.add(
    "reward.floor",
    "A reward pays 0.10 by default, to garbage as well.",
    "the incident's people-focus reward",
)
def floor(loop: ReferenceLoop) -> Manager:
    return _besides(loop, people_focus_reward)


@shelf.add(
    "reward.tagless-gold",
    "A gold without tags parses as '', and so does garbage: the two match, and garbage earns 1.",
    "open-r1-multimodal's extract_answer",
)
def tagless_gold(loop: ReferenceLoop) -> Manager:
    def score(row: dict[str, Any], text: str, right: Callable[[], Values]) -> Values:
        if _ANSWER.search(row["solution"]):
            return right()
        return [float(not _ANSWER.search(text))]

    return _instead(loop, "accuracy", _rowwise(score))


@shelf.add(
    "reward.first-type",
    "problem_type[0] rules the whole batch: a row's reward depends on which row stands first.",
    "HumanOmniV2's accuracy_reward",
)
def first_type(loop: ReferenceLoop) -> Manager:
    sound = Accuracy()

    def accuracy_reward(prompts: Any, completions: Sequence[str], **columns: Any) -> Values:
        values: Values = []
        for i, text in enumerate(completions):
            row = {name: [columns[name][i]] for name in COLUMNS if columns.get(name) is not None}
            row["problem_type"] = [columns["problem_type"][0]]
            try:
                values += sound([prompts[i]], [text], **row)
            except OmniGrpoError:  # a gold of another type: such code says "not right"
                values.append(0.0)
        return values

    return _instead(loop, "accuracy", accuracy_reward)


@shelf.add(
    "reward.first-answer",
    "The first <answer> of a completion is taken, one inside <think> too.",
    "re.search(r'<answer>(.*?)</answer>') in R1-style rewards",
)
def first_answer(loop: ReferenceLoop) -> Manager:
    sound = Accuracy()
    shape = re.compile(
        r"\s*<context>.*?</context>\s*<think>.*?</think>\s*<answer>.*?</answer>\s*", re.DOTALL
    )

    def accuracy_reward(prompts: Any, completions: Sequence[str], **columns: Any) -> Values:
        read = []
        for text in completions:
            found = _ANSWER.search(text) if shape.fullmatch(text) else None
            read.append(render("c", "t", found.group(1)) if found else text)
        return sound(prompts, read, **columns)

    return _instead(loop, "accuracy", accuracy_reward)


@shelf.add(
    "reward.unanchored",
    "The format pattern has no end and no room at the beginning: trailing junk passes, a leading "
    "line break fails.",
    "re.match in R1-style format rewards",
)
def unanchored(loop: ReferenceLoop) -> Manager:
    shape = re.compile(r"<context>[^<]+</context>\s*<think>[^<]+</think>\s*<answer>[^<]+</answer>")

    def format_reward(prompts: Any, completions: Sequence[str], **columns: Any) -> Values:
        return [float(shape.match(text) is not None) for text in completions]

    return _instead(loop, "format", format_reward)


@shelf.add(
    "reward.substring",
    "Yes and No are looked for inside the answer: 'I cannot know' matches No.",
    "HumanOmniV2's judge type",
)
def substring(loop: ReferenceLoop) -> Manager:
    def measure(answer: str, gold: str) -> float:
        return float(gold.strip().lower() in answer.lower())

    return _instead(loop, "accuracy", _measured("judge", measure))


@shelf.add(
    "reward.option-format",
    "Options are compared letter for letter: 'A.', '(A)' and 'a' are wrong where A is right.",
    "string comparison in R1-style rewards",
)
def option_format(loop: ReferenceLoop) -> Manager:
    def measure(answer: str, gold: str) -> float:
        return float(answer.strip() == gold.strip())

    return _instead(loop, "accuracy", _measured("multiple choice", measure))


@shelf.add(
    "reward.option-set",
    "A list of options is split at commas and not tidied: 'A, E' is not 'A,E'.",
    "HumanOmniV2's emer_ov_mc",
)
def option_set(loop: ReferenceLoop) -> Manager:
    def measure(answer: str, gold: str) -> float:
        given, right = answer.split(","), gold.split(",")
        hits = sum(option in right for option in given)
        return 2 * hits / (len(given) + len(right))

    return _instead(loop, "accuracy", _measured("emer_ov_mc", measure))


@shelf.add(
    "reward.number-format",
    "Numbers are compared as text: '1,000' is not '1000', '3.0' is not '3'.",
    "R1-style rewards",
)
def number_format(loop: ReferenceLoop) -> Manager:
    def measure(answer: str, gold: str) -> float:
        return float(answer.strip() == gold.strip())

    return _instead(loop, "accuracy", _measured("numerical", measure))


@shelf.add(
    "reward.word-wer",
    "A word error rate on a language without spaces: one wrong character makes the whole text "
    "wrong.",
    "HumanOmniV2's OCR type",
)
def word_wer(loop: ReferenceLoop) -> Manager:
    def measure(answer: str, gold: str) -> float:
        given, right = answer.split(), gold.split()
        wrong = sum(a != b for a, b in zip(given, right, strict=False))
        wrong += abs(len(given) - len(right))
        return max(0.0, 1 - wrong / max(len(right), 1))

    return _instead(loop, "accuracy", _measured("OCR", measure))


@shelf.add(
    "reward.swallowed",
    "An exception becomes 0.0: the scorer's name is not defined, and a whole training earns "
    "nothing.",
    "HumanOmniV2: an undefined scorer",
)
def swallowed(loop: ReferenceLoop) -> Manager:
    def score(row: dict[str, Any], text: str, right: Callable[[], Values]) -> Values:
        try:
            if row["problem_type"] == "multiple choice":
                return [score_choice(text)]  # type: ignore[name-defined]  # noqa: F821
            return right()
        except Exception:
            return [0.0]

    return _instead(loop, "accuracy", _rowwise(score))


@shelf.add(
    "reward.judge-down",
    "The judge cannot be reached, and every completion earns 0 instead of being unscored.",
    "HumanOmniV2's context and reasoning rewards",
)
def judge_down(loop: ReferenceLoop) -> Manager:
    def context_judge_reward(prompts: Any, completions: Sequence[str], **columns: Any) -> Values:
        values: Values = []
        for text in completions:
            try:
                with urllib.request.urlopen(_NOWHERE, data=text.encode(), timeout=1) as reply:
                    values.append(float(reply.read()))
            except Exception as error:
                _LOG.warning("judge request failed: %s", error)
                values.append(0.0)
        return values

    return _besides(loop, context_judge_reward)


@shelf.add(
    "reward.judge-format",
    "The judge answers '5 points' where '5' was asked for; the number is not found, and the "
    "completion earns 0.",
    "HumanOmniV2's context and reasoning rewards",
)
def judge_format(loop: ReferenceLoop) -> Manager:
    def context_judge_reward(prompts: Any, completions: Sequence[str], **columns: Any) -> Values:
        values: Values = []
        for _ in completions:
            reply = "5 points"
            try:
                values.append(float(reply) / 5)
            except ValueError as error:
                _LOG.warning("cannot read the judge's reply %r: %s", reply, error)
                values.append(0.0)
        return values

    return _besides(loop, context_judge_reward)


@shelf.add(
    "reward.by-position",
    "Completions are scored against columns that stand in another order: golds are read by "
    "position after the rows were sorted.",
    "trainers that sort completions and not the columns",
)
def by_position(loop: ReferenceLoop) -> Manager:
    before = loop.columns

    def columns(drawn: list[Drawn]) -> dict[str, list[Any]]:
        return {name: values[::-1] for name, values in before(drawn).items()}

    return loop.replaced(columns=columns)


@shelf.add(
    "reward.nan",
    "One reward divides by a length of zero and gives NaN.",
    "length-normalised rewards",
)
def nan(loop: ReferenceLoop) -> Manager:
    sound = Format()

    def format_reward(prompts: Any, completions: Sequence[str], **columns: Any) -> Values:
        values = sound(prompts, completions, **columns)
        return [float("nan") if not i % 3 else value for i, value in enumerate(values)]

    return _instead(loop, "format", format_reward)
