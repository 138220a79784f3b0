"""What the gold solution of a row says. A gold that says nothing is a data error, never a match."""

from __future__ import annotations

from dataclasses import dataclass

from omni_grpo_core.errors import DataError
from omni_grpo_core.rewards.base import Row
from omni_grpo_core.rewards.parse import SECTIONS, sections
from omni_grpo_core.types import Malformed, Section


@dataclass(frozen=True, slots=True)
class Gold:
    """The sections of a gold solution, stripped; data sets may leave context and think out."""

    answer: str
    context: str | None
    think: str | None


def gold(row: Row) -> Gold:
    """Read the gold of a row: any of the three sections in order, with an answer among them.

    Raises :class:`~omni_grpo_core.errors.DataError` naming the row when the answer is not inside
    ``<answer>`` tags, is blank, or the tags are not in order.

    >>> gold(Row(0, "q", "t", {"solution": "<answer> B </answer>"}))
    Gold(answer='B', context=None, think=None)
    """
    solution = row.solution
    found = gold_sections(solution)
    if isinstance(found, Malformed):
        raise DataError(
            row.item,
            got=f"gold {solution[:60]!r}: {found.what} at {found.where}",
            want="a gold of the form <answer>…</answer>, <context> and <think> before it if any",
            fix="mend the row; a gold without an answer would match garbage",
        )
    context, think = (found[name].text.strip() if name in found else None for name in SECTIONS[:2])
    return Gold(answer=found["answer"].text.strip(), context=context, think=think)


def gold_sections(solution: str) -> dict[str, Section] | Malformed:
    """The answer, and of context and think what is there, or what is wrong with the tags."""
    wanted = tuple(name for name in SECTIONS if name == "answer" or f"<{name}>" in solution)
    return sections(solution, wanted)


def bad_gold(row: Row, answer: str, want: str) -> DataError:
    """The error for a gold answer that its own problem type cannot read."""
    return DataError(
        row.item,
        got=f"gold answer {answer[:60]!r} for problem_type {row.problem_type!r}",
        want=want,
        fix="mend the gold or the problem_type of the row",
    )
