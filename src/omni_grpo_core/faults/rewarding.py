"""Faults of reward functions: each has TRL's signature and is right except for one thing."""

from __future__ import annotations

import logging
import re
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial, wraps
from itertools import cycle
from typing import Any

from omni_grpo_core.doctor.evidence import Severity
from omni_grpo_core.errors import OmniGrpoError
from omni_grpo_core.faults.fault import FaultRegistry, Injection, Manager, result_of
from omni_grpo_core.faults.fixtures import Drawn
from omni_grpo_core.faults.seams import Loop
from omni_grpo_core.recorder.hooks import patched
from omni_grpo_core.rewards import COLUMNS
from omni_grpo_core.rewards.accuracy import Accuracy
from omni_grpo_core.rewards.format import Format
from omni_grpo_core.rewards.parse import parse, render
from omni_grpo_core.types import Malformed

faults = FaultRegistry()
Values = list[float | None]

_LOG = logging.getLogger(__name__)
# a recorder captures it; on a terminal it would be noise, as the fault is deliberate
_LOG.propagate = False
_LOG.addHandler(logging.NullHandler())
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_NOWHERE = "http://127.0.0.1:9/v1/chat/completions"
"""The local discard port, where nothing listens."""
_ACCURACY, _FORMAT = Accuracy(), Format()
_SPELLING: Severity = "differs"
"""Of a reward that only reads spellings more strictly or more leniently than ours: nearly every
R1-style reward does, and such runs learn. One that pays for garbage, depends on the first row or
swallows its errors pays for something else than the task, and breaks the run."""


def _reward(name: str) -> Callable[[Any], Injection]:
    """Decorates a reward function that replaces the loop's own ``name`` or, if there is none, is
    inserted before the last with weight 1. A recorder reads its name and signature."""

    def decorate(function: Any) -> Injection:
        @wraps(function)
        def inject(loop: Loop) -> Manager:
            funcs = {str(getattr(f, "__name__", "")): f for f in loop.reward_funcs}
            if name in funcs:
                return patched(loop, reward_funcs=[*{**funcs, name: function}.values()])
            *first, last = loop.reward_funcs
            weights = [*loop.reward_weights, 1.0]
            return patched(loop, reward_funcs=[*first, function, last], reward_weights=weights)

        function.__name__ = function.__qualname__ = f"{name}_reward"
        return inject

    return decorate


def _rows(columns: dict[str, Any]) -> Iterator[dict[str, list[Any]]]:
    """The columns that rewards read, split into one-row columns."""
    known = [name for name in COLUMNS if columns.get(name) is not None]
    for row in zip(*(columns[name] for name in known), strict=True):
        yield {name: [value] for name, value in zip(known, row, strict=True)}


def _rowwise(score: Callable[[dict[str, Any], str, Callable[[], Values]], Values]) -> Injection:
    """Decorates how accuracy scores one row: ``score(row, completion, correct score)``."""

    def reward(prompts: Any, completions: Sequence[str], **columns: Any) -> Values:
        values: Values = []
        for prompt, text, row in zip(prompts, completions, _rows(columns), strict=True):
            right = partial(_ACCURACY, [prompt], [text], **row)
            values += score({name: value for name, (value,) in row.items()}, text, right)
        return values

    reward.__doc__ = score.__doc__
    return _reward("accuracy")(reward)


def _on(*rows: Mapping[str, Any]) -> Callable[[Injection], Injection]:
    """Decorates an injection that shows only on data of this kind: the rows of each micro-batch,
    with these columns in turn."""

    def decorate(injection: Injection) -> Injection:
        @contextmanager
        def inject(loop: Loop) -> Iterator[None]:
            draw = loop.draw

            def drawn(micro: int) -> list[Drawn]:
                return [
                    replace(one, row={**one.row, **changed})
                    for one, changed in zip(draw(micro), cycle(rows), strict=False)
                ]

            with loop.replaced(draw=drawn), injection(loop):
                yield

        inject.__doc__ = injection.__doc__
        return inject

    return decorate


def _row(problem_type: str, answer: str, *options: str) -> dict[str, Any]:
    whole = render("Two people talk.", "It follows.", answer)
    return {"problem_type": problem_type, "options": [*options], "solution": whole}


def _measured(problem_type: str) -> Callable[[Callable[[str, str], float]], Injection]:
    """Decorates ``measure(answer, gold)`` for one problem type; others are scored correctly."""

    def decorate(measure: Callable[[str, str], float]) -> Injection:
        @_rowwise
        @wraps(measure)
        def score(row: dict[str, Any], text: str, right: Callable[[], Values]) -> Values:
            gold = _ANSWER.search(row["solution"])
            if row["problem_type"] != problem_type or gold is None:
                return right()
            parsed = parse(text)
            return [0.0 if isinstance(parsed, Malformed) else measure(parsed.answer.text, gold[1])]

        return score

    return decorate


def _judging(complaint: str) -> Callable[[Callable[[str], float]], Injection]:
    """Decorates how a judge scores one completion; any failure is logged with ``complaint`` and
    becomes a 0."""

    def decorate(ask: Callable[[str], float]) -> Injection:
        def reward(prompts: Any, completions: Sequence[str], **columns: Any) -> Values:
            values: Values = []
            for text in completions:
                try:
                    values.append(ask(text))
                except Exception as error:
                    _LOG.warning("%s: %s", complaint, error)
                    values.append(0.0)
            return values

        reward.__doc__ = ask.__doc__
        return _reward("context_judge")(reward)

    return decorate


def people_focus_reward(prompts: Any, completions: Sequence[str], **columns: Any) -> Values:
    """Counts words for people and pays at least 0.10, even without any."""
    words = ("man", "woman", "person", "people", "face", "smile")
    return [max(0.10, sum(word in text for word in words) / len(words)) for text in completions]


@faults.add("reward.floor", "the incident's people-focus reward")
def floor(loop: Loop) -> Manager:
    """A reward pays 0.10 by default, even for garbage."""
    return _reward("people_focus")(people_focus_reward)(loop)


@faults.add("reward.inverted", "distances and error rates returned as rewards")
@_rowwise
def inverted(row: dict[str, Any], text: str, right: Callable[[], Values]) -> Values:
    """The error is returned in the place of the score: a wrong answer earns 1, the right one 0."""
    return [None if score is None else 1 - score for score in right()]


@faults.add("reward.tagless-gold", "open-r1-multimodal's extract_answer")
@_on({"solution": "C"})
@_rowwise
def tagless_gold(row: dict[str, Any], text: str, right: Callable[[], Values]) -> Values:
    """A gold without tags parses as '', and so does garbage: they match, and garbage earns 1."""
    if _ANSWER.search(row["solution"]):
        return right()
    return [float(not _ANSWER.search(text))]


@faults.add("reward.first-type", "HumanOmniV2's accuracy_reward")
@_on({}, _row("numerical", "1200"))
@_reward("accuracy")
def first_type(prompts: Any, completions: Sequence[str], **columns: Any) -> Values:
    """problem_type[0] decides for the whole batch: rewards depend on which row is first."""
    columns["problem_type"] = columns["problem_type"][:1] * len(completions)
    values: Values = []
    for prompt, text, row in zip(prompts, completions, _rows(columns), strict=True):
        try:
            values += _ACCURACY([prompt], [text], **row)
        except OmniGrpoError:  # a gold of another type: such code scores it as wrong
            values.append(0.0)
    return values


@faults.add(
    "reward.first-answer",
    "re.search(r'<answer>(.*?)</answer>') in R1-style rewards",
    severity=_SPELLING,
)
@_reward("accuracy")
def first_answer(prompts: Any, completions: Sequence[str], **columns: Any) -> Values:
    """The first <answer> of a completion is scored, even one inside <think>."""
    shape = r"\s*<context>.*?</context>\s*<think>.*?</think>\s*<answer>.*?</answer>\s*"
    read = []
    for text in completions:
        found = _ANSWER.search(text) if re.fullmatch(shape, text, re.DOTALL) else None
        read.append(render("c", "t", found.group(1)) if found else text)
    return _ACCURACY(prompts, read, **columns)


@faults.add("reward.unanchored", "re.match in R1-style format rewards", severity=_SPELLING)
@_reward("format")
def unanchored(prompts: Any, completions: Sequence[str], **columns: Any) -> Values:
    """The format pattern has no end anchor and allows no leading white space: trailing junk passes,
    a leading line break fails."""
    shape = r"<context>[^<]+</context>\s*<think>[^<]+</think>\s*<answer>[^<]+</answer>"
    return [float(re.match(shape, text) is not None) for text in completions]


@faults.add("reward.substring", "HumanOmniV2's judge type", severity=_SPELLING)
@_on(_row("judge", "No"))
@_measured("judge")
def substring(answer: str, gold: str) -> float:
    """Yes and No are matched as substrings of the answer: 'I cannot know' matches No."""
    return float(gold.strip().lower() in answer.lower())


@faults.add("reward.option-format", "string comparison in R1-style rewards", severity=_SPELLING)
@_measured("multiple choice")
def option_format(answer: str, gold: str) -> float:
    """Options are compared as strings: 'A.', '(A)' and 'a' are wrong where A is right."""
    return float(answer.strip() == gold.strip())


@faults.add("reward.option-set", "HumanOmniV2's emer_ov_mc", severity=_SPELLING)
@_on(_row("emer_ov_mc", "A,E", "A. calm", "B. anger", "E. joy"))
@_measured("emer_ov_mc")
def option_set(answer: str, gold: str) -> float:
    """A list of options is split at commas without stripping spaces: 'A, E' is not 'A,E'."""
    given, right = answer.split(","), gold.split(",")
    hits = sum(option in right for option in given)
    return 2 * hits / (len(given) + len(right))


@faults.add("reward.number-format", "R1-style rewards", severity=_SPELLING)
@_on(_row("numerical", "1200"))
@_measured("numerical")
def number_format(answer: str, gold: str) -> float:
    """Numbers are compared as text: '1,000' is not '1000', '3.0' is not '3'."""
    return float(answer.strip() == gold.strip())


@faults.add("reward.word-wer", "HumanOmniV2's OCR type", severity=_SPELLING)
@_on(_row("OCR", "禁止入口"))
@_measured("OCR")
def word_wer(answer: str, gold: str) -> float:
    """The word error rate is used for a language without spaces: one wrong character makes the
    whole text wrong."""
    given, right = answer.split(), gold.split()
    wrong = sum(a != b for a, b in zip(given, right, strict=False))
    wrong += abs(len(given) - len(right))
    return max(0.0, 1 - wrong / max(len(right), 1))


@faults.add("reward.swallowed", "HumanOmniV2: an undefined scorer")
@_rowwise
def swallowed(row: dict[str, Any], text: str, right: Callable[[], Values]) -> Values:
    """An exception becomes 0.0: the scorer's name is undefined, and a whole training earns
    nothing."""
    try:
        if row["problem_type"] == "multiple choice":
            return [score_choice(text)]  # type: ignore[name-defined]  # noqa: F821
        return right()
    except Exception:
        return [0.0]


@faults.add("reward.judge-down", "HumanOmniV2's context and reasoning rewards")
@_judging("judge request failed")
def judge_down(text: str) -> float:
    """The judge is unreachable, and every completion earns 0 instead of being unscored."""
    with urllib.request.urlopen(_NOWHERE, data=text.encode(), timeout=1) as reply:
        return float(reply.read())


@faults.add("reward.judge-format", "HumanOmniV2's context and reasoning rewards")
@_judging("cannot read the judge's reply '5 points'")
def judge_format(text: str) -> float:
    """The judge replies '5 points' instead of '5': the number is not parsed, and the completion
    earns 0."""
    return float("5 points") / 5


@faults.add(
    "reward.by-position",
    "trainers that sort completions and not the columns",
)
@result_of("columns")
def by_position(loop: Loop, columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Completions are scored against columns in a different order: golds are read by position
    after the rows were sorted."""
    return {name: values[::-1] for name, values in columns.items()}


@faults.add("reward.nan", "length-normalised rewards")
@_reward("format")
def nan(prompts: Any, completions: Sequence[str], **columns: Any) -> Values:
    """One reward divides by a length of zero and returns NaN."""
    values = _FORMAT(prompts, completions, **columns)
    return [float("nan") if not i % 3 else value for i, value in enumerate(values)]
