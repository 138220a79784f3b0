"""Is the answer right, by the measure of each row's own problem type?"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final

from omni_grpo_core.rewards.base import Reward, Row
from omni_grpo_core.rewards.choice import Options, label_set
from omni_grpo_core.rewards.gold import Gold, bad_gold, gold
from omni_grpo_core.rewards.number import numerical, regression
from omni_grpo_core.rewards.open_words import OpenWords, yes_no
from omni_grpo_core.rewards.parse import parse
from omni_grpo_core.rewards.text_match import free_form, ocr
from omni_grpo_core.types import Malformed, ProblemType, Score

Measure = Callable[[Row, Gold, str], Score]
"""Row, its gold and the answer's text (as written) → score."""


class Accuracy(Reward):
    """Scores the ``<answer>`` of a well-formed completion against the row's gold; else 0.

    ``measures`` replaces the measure of a problem type. ``judge`` scores the rows of the types
    ``judged`` in the measure's place; see :mod:`~omni_grpo_core.rewards.judge`.

    >>> right = "<context>c</context><think>t</think><answer>(a)</answer>"
    >>> Accuracy()(
    ...     ["q"], [right], problem_type=["multiple choice"], options=[["A. Red", "B. Blue"]],
    ...     solution=["<answer>A</answer>"],
    ... )
    [1.0]
    """

    def __init__(
        self,
        measures: Mapping[ProblemType, Measure] | None = None,
        *,
        judge: Reward | None = None,
        judged: Collection[ProblemType] = ("free-form", "emer_ov"),
        name: str = "accuracy",
    ) -> None:
        super().__init__(name)
        self.measures: Final = {**MEASURES, **(measures or {})}
        self.judge: Final = judge
        self.judged: Final = frozenset(judged if judge else ())

    def score_rows(self, rows: Sequence[Row]) -> list[Score]:
        scores = [None if self._for_judge(row) else self.score(row) for row in rows]
        # all of them at once: a judge works on many rows side by side
        waiting = [row for row, score in zip(rows, scores, strict=True) if score is None]
        verdicts = iter(self.judge.score_rows(waiting) if self.judge else ())
        return [score or next(verdicts) for score in scores]

    def score(self, row: Row) -> Score:
        # the gold is read first: a broken row is an error whatever the completion
        problem_type, truth = row.problem_type, gold(row)
        parsed = parse(row.text)
        if isinstance(parsed, Malformed):
            return Score(0.0, f"malformed: {parsed.what} at {parsed.where}")
        return self.measures[problem_type](row, truth, parsed.answer.text)

    def _for_judge(self, row: Row) -> bool:
        return row.problem_type in self.judged


def multiple_choice(row: Row, truth: Gold, answer: str) -> Score:
    """1 when the answer names the gold's option, see :mod:`~omni_grpo_core.rewards.choice`."""
    options = Options.read(row.options)
    right = options.label_of(truth.answer)
    if right is None:
        raise bad_gold(row, truth.answer, f"one of the {len(row.options)} options of the row")
    given = options.label_of(answer)
    if given is None:
        return Score(0.0, f"{answer.strip()[:40]!r} names no option, the gold is {right}")
    return Score(float(given == right), f"answer {given}, gold {right}")


def emer_ov_mc(row: Row, truth: Gold, answer: str) -> Score:
    """F1 of the set of options named; a piece that names no option counts as a wrong one."""
    options = Options.read(row.options)
    right, strays = label_set(truth.answer, options)
    if not right or strays:
        raise bad_gold(row, truth.answer, "labels or texts of the row's options")
    given, unknown = label_set(answer, options)
    reason = f"answer {','.join(sorted(given)) or 'none'}, gold {','.join(sorted(right))}"
    if unknown:
        reason += f", {len(unknown)} named no option"
    return Score(f1(len(given & right), len(given) + len(unknown), len(right)), reason)


def f1(hits: int, given: int, right: int) -> float:
    """Harmonic mean of precision ``hits/given`` and recall ``hits/right``; ``right`` > 0.

    >>> f1(1, 2, 2)
    0.5
    """
    return 2 * hits / (given + right)


MEASURES: dict[ProblemType, Measure] = {
    "multiple choice": multiple_choice,
    "emer_ov_mc": emer_ov_mc,
    "numerical": numerical,
    "regression": regression,
    "OCR": ocr,
    "free-form": free_form,
    "emer_ov": OpenWords(),
    "judge": yes_no,
}
_ANY_TEXT: Collection[ProblemType] = ("OCR", "free-form")


def check_gold(problem_type: ProblemType, options: Sequence[str], solution: str) -> None:
    """Read a gold as a measure will. Raises :class:`~omni_grpo_core.errors.DataError` for one that
    its problem type cannot read, which no completion but a well-formed one would bring to light."""
    columns = {"problem_type": problem_type, "options": options, "solution": solution}
    row = Row(0, "", "", columns)
    truth = gold(row)
    if problem_type not in _ANY_TEXT:
        MEASURES[problem_type](row, truth, "")  # which is read after the gold
