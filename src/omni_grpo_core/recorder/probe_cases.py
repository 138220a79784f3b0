"""Completions whose right score is known, made from the rows that a reward function really got.

A reward is asked about its own data only: its columns, its problem types, golds of its shape. What
form an answer must have is not known beforehand (tags of a think-answer kind, a box, nothing), so
right and wrong answers are given in every common one, and the doctor learns which of them is paid.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from omni_grpo_core.rewards.corpus import garbage
from omni_grpo_core.rewards.parse import render

Role = Literal["right", "wrong", "foreign", "notation", "evasion", "structure", "garbage"]
"""What a case shows. ``right``: the row's own answer. ``wrong``: another one. ``foreign``: the same
completion as ``right``, on a row whose gold is another answer. ``notation``: right, in another
spelling. ``evasion``: it only contains the right answer. ``structure``: right, with something
outside its form. ``garbage``: what a broken policy writes."""

GOLDS = (
    *("solution", "answer", "gold", "label", "target", "ground_truth", "gt", "reference"),
    *("solutions", "answers", "labels", "targets", "gold_answer", "correct_answer"),
)
"""Columns that hold the right answer, the likeliest first."""
TYPES = ("problem_type", "question_type", "task_type", "data_type", "task")
_MOST_TYPES = 4
_CONTEXT, _THINK = "A man in a blue shirt sits down.", "He smiles, so the answer follows."

FORMS: Mapping[str, Callable[[str], str]] = {
    "context-think-answer": lambda answer: render(_CONTEXT, _THINK, answer),
    "think-answer": lambda answer: f"<think>{_THINK}</think>\n<answer>{answer}</answer>",
    "think-answer-lines": lambda a: f"<think>\n{_THINK}\n</think>\n<answer>\n{a}\n</answer>",
    "answer": lambda answer: f"<answer>{answer}</answer>",
    "boxed": lambda answer: rf"{_THINK} The answer is \boxed{{{answer}}}",
    "bare": lambda answer: answer,
}
"""Ways to write a completion around an answer."""
_TAGGED = re.compile(r"<answer>\s*(.*?)\s*</answer>", re.DOTALL)
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")


@dataclass(frozen=True, slots=True)
class ProbeCase:
    """``row``: number of the recorded row whose prompt and columns it takes, with ``gold`` in the
    place of its own. ``form``: one of ``FORMS``, ``"verbatim"`` for the gold itself, ``""`` for
    none."""

    name: str
    role: Role
    form: str
    row: int
    completion: str
    gold: str
    problem_type: str


@dataclass(frozen=True, slots=True)
class Asked:
    """The rows of a recorded call. ``gold``: name of the column with the right answers, ``""``
    where there is none."""

    count: int
    gold: str
    golds: tuple[str, ...]
    types: tuple[str, ...]

    @classmethod
    def of(cls, columns: Mapping[str, Any], count: int) -> Asked:
        """``columns``: as the function got them; ``count``: its completions."""
        name = next((name for name in GOLDS if _texts(columns.get(name), count)), "")
        kind = next((name for name in TYPES if _texts(columns.get(name), count)), "")
        golds = _texts(columns.get(name), count) or ("",) * count
        return cls(count, name, golds, _texts(columns.get(kind), count) or ("",) * count)

    def rows(self) -> list[int]:
        """The first row of each problem type."""
        return [self.types.index(kind) for kind in dict.fromkeys(self.types)][:_MOST_TYPES]


def _texts(values: Any, count: int) -> tuple[str, ...]:
    if not isinstance(values, list | tuple) or len(values) != count or not count:
        return ()
    usable = all(isinstance(v, str | int | float) and not isinstance(v, bool) for v in values)
    return tuple(map(str, values)) if usable else ()


def answer_in(gold: str) -> str:
    """The answer inside a gold of any shape.

    >>> answer_in("<think>x</think><answer> B </answer>"), answer_in("B")
    ('B', 'B')
    """
    tagged, boxed = _TAGGED.findall(gold), _BOXED.findall(gold)
    return str(tagged[-1] if tagged else boxed[-1] if boxed else gold.strip())


def with_answer(gold: str, answer: str) -> str:
    """A gold of the same shape with another answer; all else of it stays.

    >>> with_answer("<think>B or C</think><answer>B</answer>", "C"), with_answer("B", "C")
    ('<think>B or C</think><answer>C</answer>', 'C')
    """
    found = [*_TAGGED.finditer(gold)] or [*_BOXED.finditer(gold)]
    if not found:
        return answer
    start, end = found[-1].span(1)
    return gold[:start] + answer + gold[end:]


def shape_of(gold: str) -> str:
    """``"tagged"``, ``"boxed"`` or ``"bare"``."""
    return "tagged" if _TAGGED.search(gold) else "boxed" if _BOXED.search(gold) else "bare"


def first_cases(asked: Asked) -> list[ProbeCase]:
    """Right, wrong and foreign answers in every form, and garbage. Names are unique."""
    found = []
    for row in asked.rows():
        gold, kind = asked.golds[row], asked.types[row]
        right = answer_in(gold) if asked.gold else "A"
        wrong = _other(right)
        label = f"{kind}: " if kind else ""
        foreign = with_answer(gold, wrong)
        for form, made in FORMS.items():
            roles: list[tuple[Role, str, str]] = [("right", made(right), gold)]
            if asked.gold:
                roles += [("wrong", made(wrong), gold), ("foreign", made(right), foreign)]
            found += [
                ProbeCase(f"{label}{role} answer, {form}", role, form, row, text, own, kind)
                for role, text, own in roles
            ]
        if shape_of(gold) != "bare":
            verbatim: list[tuple[Role, str]] = [("right", gold), ("foreign", foreign)]
            found += [
                ProbeCase(f"{label}{role} gold", role, "verbatim", row, gold, own, kind)
                for role, own in verbatim
            ]
    row = asked.rows()[0]
    texts = garbage("A", render(_CONTEXT, _THINK, "A"))
    for name in ("empty", "repeated token", "the incident", "token salad", "tags without end"):
        gold, kind = asked.golds[row], asked.types[row]
        found.append(ProbeCase(name, "garbage", "", row, texts[name], gold, kind))
    return found


def later_cases(asked: Asked, form: str) -> Iterator[ProbeCase]:
    """Other spellings, evasions and structures, in the ``form`` in which a function pays right
    answers most."""
    made = FORMS.get(form, FORMS["context-think-answer"])
    for row in asked.rows():
        gold, kind = asked.golds[row], asked.types[row]
        right = answer_in(gold) if asked.gold else "A"
        label = f"{kind}: " if kind else ""
        if asked.gold:
            for name, role, text in _spellings(right):
                yield ProbeCase(label + name, role, form, row, made(text), gold, kind)
        whole = made(right)
        if form != "bare":
            yield ProbeCase(
                f"{label}leading newline", "structure", form, row, f"\n{whole}", gold, kind
            )
            yield ProbeCase(
                f"{label}trailing junk", "structure", form, row,
                f"{whole} system system <answer>", gold, kind,
            )  # fmt: skip
        if asked.gold and form in ("context-think-answer", "think-answer"):
            thought = f"<think><answer>{right}</answer> or not</think>"
            start = f"<context>{_CONTEXT}</context>" if form.startswith("context") else ""
            text = f"{start}{thought}<answer>{_other(right)}</answer>"
            yield ProbeCase(
                f"{label}gold only in the think", "evasion", form, row, text, gold, kind
            )


def _spellings(right: str) -> Iterator[tuple[str, Role, str]]:
    letters = [part.strip() for part in right.split(",")]
    if re.fullmatch(r"[A-Z]", right):
        yield "option with a dot", "notation", f"{right}."
        yield "option in brackets", "notation", f"({right})"
        yield "option in lower case", "notation", right.lower()
    elif len(letters) > 1 and all(re.fullmatch(r"[A-Z]", one) for one in letters):
        yield "set with a space", "notation", ", ".join(letters)
        yield "set in another order", "notation", ",".join(reversed(letters))
    elif re.fullmatch(r"\d{1,9}", right):
        yield "number with a comma", "notation", f"{int(right):,}"
        yield "number with a point", "notation", f"{right}.0"
        yield "no number", "evasion", "None"
    elif right.lower() == "no":
        yield "no inside cannot", "evasion", "I cannot know"
    elif right.lower() == "yes":
        yield "yes and no", "evasion", "yes and no"
    elif len(right) > 3 and not right.isascii() and not any(map(str.isspace, right)):
        # all but one character is right; a script without spaces has no words to compare
        yield "sign without spaces", "notation", right[:-1] + ("内" if right[-1] == "口" else "口")


def _other(right: str) -> str:
    """Another answer of the same kind and, where possible, length."""
    if re.fullmatch(r"[A-Z]", right):
        return "A" if right != "A" else "C"
    if re.fullmatch(r"[A-Z](,\s*[A-Z])+", right):
        return "Z"
    if re.fullmatch(r"-?\d+", right):
        return str(int(right) + 1)
    if re.fullmatch(r"-?\d+\.\d+", right):
        return f"{float(right) + 7}"
    known = {"yes": "No", "no": "Yes", "true": "False", "false": "True"}
    return known.get(right.lower(), "quite another thing" if right else "")


def types_in(arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """The problem types of the rows of a call with these arguments."""
    count = len(arguments.get("completions") or ())
    return tuple(dict.fromkeys(Asked.of(arguments, count).types))
