"""Completions whose right score is known: one for each known way for a reward to go wrong.

What a case should earn depends on what a reward measures, so each case gives both: the score of a
format reward and of an accuracy reward. Any other reward must still pay garbage nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from omni_grpo_core.rewards.corpus import garbage
from omni_grpo_core.rewards.parse import render
from omni_grpo_core.types import ProblemType

_CONTEXT, _THINK = "A man in a blue shirt sits down.", "He smiles, so the answer follows."


@dataclass(frozen=True, slots=True)
class ProbeCase:
    """``format``, ``accuracy``: what a reward of that kind should pay. ``gold``: the sample's
    solution as in the data set."""

    name: str
    problem_type: ProblemType
    question: str
    options: tuple[str, ...]
    gold: str
    completion: str
    format: float
    accuracy: float

    @property
    def columns(self) -> dict[str, object]:
        return {
            "problem": self.question,
            "problem_type": self.problem_type,
            "options": list(self.options),
            "solution": self.gold,
        }


def _whole(answer: str) -> str:
    return render(_CONTEXT, _THINK, answer)


_CHOICE: tuple[ProblemType, str, tuple[str, ...]] = (
    "multiple choice",
    "How does he feel?",
    ("A. Calm", "B. Angry", "C. Sad"),
)
_MANY: tuple[ProblemType, str, tuple[str, ...]] = (
    "emer_ov_mc",
    "What do they feel?",
    ("A. Calm", "B. Angry", "E. Joy"),
)
_NUMBER: tuple[ProblemType, str, tuple[str, ...]] = ("numerical", "How many steps?", ())
_YES_NO: tuple[ProblemType, str, tuple[str, ...]] = ("judge", "Is he calm?", ())

_ANSWERS: tuple[tuple[str, tuple[ProblemType, str, tuple[str, ...]], str, str, float], ...] = (
    # name, sample, gold answer, given answer, accuracy
    ("gold choice", _CHOICE, "A", "A", 1.0),
    ("wrong choice", _CHOICE, "A", "C", 0.0),
    ("option with a dot", _CHOICE, "A", "A.", 1.0),
    ("option in brackets", _CHOICE, "A", "(A)", 1.0),
    ("option in lower case", _CHOICE, "A", "a", 1.0),
    ("option with its text", _CHOICE, "A", "A. Calm", 1.0),
    ("gold set", _MANY, "A,E", "A,E", 1.0),
    ("set with a space", _MANY, "A,E", "A, E", 1.0),
    ("set in another order", _MANY, "A,E", "E,A", 1.0),
    ("gold number", _NUMBER, "1200", "1200", 1.0),
    ("number with a comma", _NUMBER, "1200", "1,200", 1.0),
    ("number with a point", _NUMBER, "3", "3.0", 1.0),
    ("no number", _NUMBER, "3", "None", 0.0),
    ("wrong number", _NUMBER, "1200", "7", 0.0),
    ("gold yes", _YES_NO, "Yes", "Yes", 1.0),
    ("no inside cannot", _YES_NO, "No", "I cannot know", 0.0),
    ("yes and no", _YES_NO, "Yes", "yes and no", 0.0),
    ("gold regression", ("regression", "How long, in seconds?", ()), "12.5", "12.5", 1.0),
    (
        "gold text",
        ("free-form", "Why does she laugh?", ()),
        "because he tells an old joke",
        "because he tells an old joke",
        1.0,
    ),
    ("gold sign", ("OCR", "What does the sign say?", ()), "no entry", "no entry", 1.0),
    # three of four characters are right; a script without spaces has no words to compare
    ("sign without spaces", ("OCR", "What does the sign say?", ()), "禁止入内", "禁止入口", 0.75),
)

_RIGHT = _whole("A")
_TEXTS: tuple[tuple[str, str, float, float], ...] = (
    # name, completion for the choice sample, format, accuracy
    *(
        (name, garbage("A", _RIGHT)[name], 0.0, 0.0)
        for name in ("empty", "repeated token", "the incident", "token salad", "tags without end")
    ),
    ("leading newline", f"\n{_RIGHT}", 1.0, 1.0),
    ("trailing junk", f"{_RIGHT} system system <answer>", 0.0, 0.0),
    (
        "gold only in the think",
        f"<context>{_CONTEXT}</context><think><answer>A</answer> or not</think><answer>C</answer>",
        0.0,
        0.0,
    ),
)


def probe_cases() -> tuple[ProbeCase, ...]:
    """Every case; names are unique, and every call returns the same.

    >>> cases = {case.name: case for case in probe_cases()}
    >>> cases["option in brackets"].completion[-20:], cases["option in brackets"].accuracy
    ('<answer>(A)</answer>', 1.0)
    """
    answers = [
        ProbeCase(name, *sample, _whole(gold), _whole(given), 1.0, accuracy)
        for name, sample, gold, given, accuracy in _ANSWERS
    ]
    texts = [
        ProbeCase(name, *_CHOICE, _RIGHT, text, wellformed, accuracy)
        for name, text, wellformed, accuracy in _TEXTS
    ]
    # a gold without tags must not match a completion without tags
    bare = ProbeCase("garbage against a gold without tags", *_CHOICE, "A", "system" * 50, 0.0, 0.0)
    return (*answers, *texts, bare)
