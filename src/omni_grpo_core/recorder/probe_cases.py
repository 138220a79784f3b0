"""Completions whose right score is known, made from the rows that a reward function really got.

A reward is asked about its own data only: its columns, its problem types, golds of its shape. What
form an answer must have is not known beforehand (tags of a think-answer kind, a box, nothing), so
right and wrong answers are given in every common one, and the doctor learns which of them is paid.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from omni_grpo_core.rewards.corpus import garbage
from omni_grpo_core.rewards.parse import render

Role = Literal[
    "right",
    "wrong",
    "foreign",
    "notation",
    "evasion",
    "structure",
    "content",
    "bare words",
    "garbage",
]
"""What a case shows. ``right``: the row's own answer. ``wrong``: another one. ``foreign``: the same
completion as ``right``, on a row whose gold is another answer. ``notation``: right, in another
spelling. ``evasion``: it only contains the right answer. ``structure``: right, with something
outside its form. ``content``: as ``right``, with other thoughts. ``bare words``: as ``right``,
without any markup. ``garbage``: what a broken policy writes."""

GOLDS = (
    *("solution", "answer", "gold", "label", "target", "ground_truth", "gt", "reference"),
    *("solutions", "answers", "labels", "targets", "gold_answer", "correct_answer"),
    *("ground_truths", "golds", "references"),
)
"""Columns that hold the right answer, the likeliest first."""
TYPES = (
    *("problem_type", "question_type", "task_type", "data_type", "task"),
    *("data_source", "data_sources"),
)
_NO_GOLDS = frozenset(
    {
        *TYPES, *("prompts", "completions", "prompt", "problem", "question", "query", "options"),
        *("choices", "instruction", "image", "images", "video", "videos", "audio", "path", "id"),
    }
)  # fmt: skip
"""Columns of text that a function may read, and that hold no answer."""
_MOST_TYPES = 4
_CONTEXT, _THINK = "A man in a blue shirt sits down.", "He smiles, so the answer follows."

FORMS: Mapping[str, Callable[..., str]] = {
    "context-think-answer": lambda answer, think=_THINK: render(_CONTEXT, think, answer),
    "think-answer": lambda a, think=_THINK: f"<think>{think}</think>\n<answer>{a}</answer>",
    "think-answer-lines": lambda a, think=_THINK: (
        f"<think>\n{think}\n</think>\n<answer>\n{a}\n</answer>"
    ),
    "context-think-answer-tight": lambda answer, think=_THINK: render(
        _CONTEXT, think, answer
    ).replace("\n", ""),
    "think-answer-tight": lambda a, think=_THINK: f"<think>{think}</think><answer>{a}</answer>",
    "answer": lambda a, think="": f"<answer>{a}</answer>",
    "boxed": lambda a, think=_THINK: rf"{think} The answer is \boxed{{{a}}}",
    "bare": lambda a, think="": a,
}
"""Ways to write a completion around an answer, and what was thought before it."""
_THOUGHTS = (f"{_THINK} Yes.", "We look once more, at each one in turn.", "Nobody else is there!")
"""In other words, longer by 5 and 6 characters and shorter by 12: a form's reward does
not depend on them."""
_MARKUP = re.compile(r"</?\w+>|\\boxed|[{}]")
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
    def of(
        cls, columns: Mapping[str, Any], count: int, read: Collection[str] = frozenset()
    ) -> Asked:
        """``columns``: as the function got them; ``count``: its completions; ``read``: names that
        the function mentions, among which a column of texts is likelier its gold."""
        likely = [*(n for n in GOLDS if n in read), *(n for n in columns if n in read), *GOLDS]
        name = next((n for n in likely if _is_gold(n, columns.get(n), count)), "")
        kind = next((name for name in TYPES if _texts(columns.get(name), count)), "")
        golds = _texts(columns.get(name), count) or ("",) * count
        return cls(count, name, golds, _texts(columns.get(kind), count) or ("",) * count)

    def rows(self) -> list[int]:
        """The first row of each problem type."""
        return [self.types.index(kind) for kind in dict.fromkeys(self.types)][:_MOST_TYPES]


def _is_gold(name: str, values: Any, count: int) -> bool:
    """A number may be anything, unless its column says that it is an answer."""
    found = _texts(values, count)
    if name in GOLDS:
        return bool(found)
    return bool(found) and name not in _NO_GOLDS and all(isinstance(v, str) for v in values)


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
            verbatim: list[tuple[Role, str, str]] = [
                ("right", gold, gold), ("wrong", foreign, gold), ("foreign", gold, foreign),
            ]  # fmt: skip
            found += [
                ProbeCase(f"{label}{role} gold", role, "verbatim", row, text, own, kind)
                for role, text, own in verbatim
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
            for number, think in enumerate(_THOUGHTS, 1):
                text = made(right, think)
                yield ProbeCase(
                    f"{label}other thoughts {number}", "content", form, row, text, gold, kind
                )
            text = _MARKUP.sub("", whole)
            yield ProbeCase(f"{label}without markup", "bare words", form, row, text, gold, kind)
            yield ProbeCase(
                f"{label}leading newline", "structure", form, row, f"\n{whole}", gold, kind
            )
            yield ProbeCase(
                f"{label}trailing junk", "structure", form, row,
                f"{whole} system system <answer>", gold, kind,
            )  # fmt: skip
            text = f"{whole}<|im_end|>"
            yield ProbeCase(f"{label}special token", "structure", form, row, text, gold, kind)
        if asked.gold and form.removesuffix("-tight") in ("context-think-answer", "think-answer"):
            thought = f"<think><answer>{right}</answer> or not</think>"
            start = f"<context>{_CONTEXT}</context>" if form.startswith("context") else ""
            text = f"{start}{thought}<answer>{_other(right)}</answer>"
            yield ProbeCase(
                f"{label}gold only in the think", "evasion", form, row, text, gold, kind
            )


def _spellings(right: str) -> Iterator[tuple[str, Role, str]]:
    if right:
        # the first or the last of two may be what counts; paid in both orders, either is enough
        yield "right or wrong", "evasion", f"{right} or {_other(right)}"
        yield "wrong or right", "evasion", f"{_other(right)} or {right}"
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
