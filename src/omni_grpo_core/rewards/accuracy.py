"""Is the answer right, by the measure of each row's problem type?"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final

from omni_grpo_core.errors import DataError
from omni_grpo_core.io.extras import extra, require
from omni_grpo_core.rewards import Reward, RewardRow
from omni_grpo_core.rewards.choice import Options, label_set
from omni_grpo_core.rewards.normalise import readings
from omni_grpo_core.rewards.number import numerical, regression
from omni_grpo_core.rewards.open_words import OpenWords, yes_no
from omni_grpo_core.rewards.parse import Gold, bad_gold, gold, parse
from omni_grpo_core.rewards.words import apart, tidy, tokens, unspaced
from omni_grpo_core.types import Malformed, ProblemType, Score

PACKAGES = ("jiwer", "math_verify", "rouge_score")
"""What the extra ``rewards`` installs: for words, formulas and sentences."""

TIMES_TOO_LONG = 10
"""A free-form answer with more than this many times the gold's tokens earns nothing."""


def _best(measure: Callable[[str, str], Score], truth: Gold, answer: str) -> Score:
    """The highest score over the ways to read gold and answer as texts."""
    scores = [measure(want, got) for want, got in readings(truth.answer, answer)]
    return max(scores, key=lambda score: score.value or 0.0)


def ocr(row: RewardRow, truth: Gold, answer: str) -> Score:
    """``max(0, 1 - error rate)``: character error rate for scripts without spaces, else word error
    rate, in which a character of such a script is a word. Case and punctuation count; character
    width, markup around the answer and amount of white space do not."""
    return _best(_read, truth, answer)


def _read(want: str, got: str) -> Score:
    with extra("rewards"):
        import jiwer

    by_character = unspaced(want)
    if by_character:
        want, got = want.replace(" ", ""), got.replace(" ", "")
    else:
        want, got = apart(want), apart(got)
    unit = "character" if by_character else "word"
    size, given = (len(text) if by_character else len(text.split()) for text in (want, got))
    if given >= 2 * size:
        # at least as many insertions as the gold has units: no need to align long texts
        return Score(0.0, f"{unit} error rate at least 1: {given} {unit}s for {size}")
    rate = jiwer.cer(want, got) if by_character else jiwer.wer(want, got)
    return Score(max(0.0, 1.0 - float(rate)), f"{unit} error rate {rate:.3f}")


def free_form(row: RewardRow, truth: Gold, answer: str) -> Score:
    """Mean F of ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004); a gold of one token has no ROUGE-2."""
    return _best(_alike, truth, answer)


def _alike(gold: str, answer: str) -> Score:
    with extra("rewards"):
        from rouge_score.rouge_scorer import RougeScorer

    want, got = _units(gold), _units(answer)
    if len(got) > TIMES_TOO_LONG * len(want):
        return Score(0.0, f"{len(got)} tokens for the gold's {len(want)}")
    kinds = ["rouge1", "rouge2", "rougeL"] if len(want) > 1 else ["rouge1", "rougeL"]
    scores = RougeScorer(kinds, tokenizer=_Joined()).score("\0".join(want), "\0".join(got))
    values = [scores[kind].fmeasure for kind in kinds]
    reason = ", ".join(f"{kind} {value:.2f}" for kind, value in zip(kinds, values, strict=True))
    return Score(float(sum(values) / len(values)), reason)


def _units(text: str) -> list[str]:
    """Tokens; for a text without any (symbols, emoji) its characters."""
    return tokens(text) or list(tidy(text).replace(" ", ""))


class _Joined:
    """Splits tokens joined by NUL: rouge-score's own tokenizer drops all but ASCII."""

    def tokenize(self, text: str) -> list[str]:
        return text.split("\0") if text else []


Measure = Callable[[RewardRow, Gold, str], Score]
"""A row, its gold and the answer's text (as written) → score."""


class Accuracy(Reward):
    """Scores the ``<answer>`` of a well-formed completion against the row's gold; else 0.

    ``measures`` replaces the measures of problem types. ``judge`` scores the rows of the types
    ``judged`` instead of a measure; see :mod:`~omni_grpo_core.rewards.judge`.

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

    def score_rows(self, rows: Sequence[RewardRow]) -> list[Score]:
        scores = [None if self._for_judge(row) else self.score(row) for row in rows]
        # all at once: a judge handles many rows concurrently
        waiting = [row for row, score in zip(rows, scores, strict=True) if score is None]
        verdicts = iter(self.judge.score_rows(waiting) if self.judge else ())
        return [score or next(verdicts) for score in scores]

    def score(self, row: RewardRow) -> Score:
        # the gold is read first: a bad row is an error whatever the completion
        problem_type, truth = row.problem_type, gold(row)
        parsed = parse(row.text)
        if isinstance(parsed, Malformed):
            return Score(0.0, f"malformed: {parsed.what} at {parsed.where}")
        return self.measures[problem_type](row, truth, parsed.answer.text)

    def _for_judge(self, row: RewardRow) -> bool:
        return row.problem_type in self.judged


def multiple_choice(row: RewardRow, truth: Gold, answer: str) -> Score:
    """1 when the answer names the gold's option, see :mod:`~omni_grpo_core.rewards.choice`."""
    options = _options(row)
    right = options.label_of(truth.answer)
    if right is None:
        raise bad_gold(row, truth.answer, f"one of the {len(row.options)} options of the row")
    given = options.label_of(answer)
    if given is None:
        return Score(0.0, f"{answer.strip()[:40]!r} names no option, the gold is {right}")
    return Score(float(given == right), f"answer {given}, gold {right}")


def emer_ov_mc(row: RewardRow, truth: Gold, answer: str) -> Score:
    """F1 of the set of named options; a piece that names none counts as a wrong option."""
    options = _options(row)
    right, strays = label_set(truth.answer, options)
    if not right or strays:
        raise bad_gold(row, truth.answer, "labels or texts of the row's options")
    given, unknown = label_set(answer, options)
    reason = f"answer {','.join(sorted(given)) or 'none'}, gold {','.join(sorted(right))}"
    if unknown:
        reason += f", {len(unknown)} named no option"
    return Score(f1(len(given & right), len(given) + len(unknown), len(right)), reason)


def _options(row: RewardRow) -> Options:
    try:
        return Options.read(row.options)
    except ValueError as error:
        raise DataError(
            row.item,
            got=f"{error}: {', '.join(row.options)[:60]!r}",
            want="options that begin with different letters, or with none",
            fix="correct the options of the row",
        ) from None


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
_ANY_TEXT: Mapping[ProblemType, str] = {"OCR": "jiwer", "free-form": "rouge_score"}
"""Golds that may be any text, and the package of the extra that scores against them."""


def check_gold(problem_type: ProblemType, options: Sequence[str], solution: str) -> None:
    """Read a gold as its measure will. Raises :class:`~omni_grpo_core.errors.DataError` if its
    problem type cannot read it, which otherwise only a well-formed completion would reveal, and
    :class:`~omni_grpo_core.errors.MissingExtra` if a package of the measure is missing."""
    columns = {"problem_type": problem_type, "options": options, "solution": solution}
    row = RewardRow(0, "", "", columns)
    truth = gold(row)
    if problem_type in _ANY_TEXT:
        require("rewards", _ANY_TEXT[problem_type])
    else:
        MEASURES[problem_type](row, truth, "")  # the answer is read after the gold
