"""Text in, scores and reasons out; this module defines the interface of a reward and its rows.

A reward is called the way TRL's ``GRPOTrainer`` calls a reward function: ``prompts``,
``completions`` and every column of the data set as keyword lists, plus the trainer's own keywords
(``completion_ids``, ``trainer_state``, ``log_extra`` …), which are ignored. It returns a number in
[0, 1] or ``None`` (could not be scored) per row; ``explain`` also gives the reasons.

Each row is scored on its own and reads its columns by name, so permuting rows permutes scores,
and a batch scores the same as its rows one by one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omni_grpo_core.errors import DataError, RewardError
from omni_grpo_core.types import PROBLEM_TYPES, ProblemType, Sample, Score

Completion = str | Sequence[Mapping[str, Any]]
"""Generated text, or the messages of a conversation as TRL passes them."""


@dataclass(frozen=True, slots=True)
class RewardRow:
    """One completion and the columns of its sample. ``index`` is its position in the batch."""

    index: int
    prompt: str
    text: str
    columns: Mapping[str, Any]

    @property
    def item(self) -> str:
        """The name of this row in errors.

        >>> RewardRow(3, "q", "t", {"sample_id": "clip7"}).item
        "row 3 (sample_id 'clip7')"
        """
        name = self.columns.get("sample_id")
        return f"row {self.index}" + (f" (sample_id {name!r})" if name is not None else "")

    @property
    def problem_type(self) -> ProblemType:
        kind = self._column("problem_type")
        if kind not in PROBLEM_TYPES:
            raise DataError(
                self.item,
                got=f"problem_type {kind!r}",
                want="one of " + ", ".join(PROBLEM_TYPES),
                fix="correct the row of the data set",
            )
        known: ProblemType = kind
        return known

    @property
    def solution(self) -> str:
        solution = self._column("solution")
        if not isinstance(solution, str):
            raise DataError(
                self.item,
                got=f"solution of type {type(solution).__name__}",
                want="text with the answer inside <answer> tags",
                fix="correct the row of the data set",
            )
        return solution

    @property
    def options(self) -> tuple[str, ...]:
        options = self.columns.get("options") or ()
        if isinstance(options, str) or not all(isinstance(option, str) for option in options):
            raise DataError(
                self.item,
                got=f"options {options!r}",
                want="a list of texts",
                fix="correct the row of the data set",
            )
        return tuple(options)

    def _column(self, name: str) -> Any:
        if name not in self.columns:
            raise DataError(
                self.item,
                got=f"columns {', '.join(sorted(self.columns)) or '(none)'}",
                want=f"a column {name!r}",
                fix="add the column to the data set; rewards read columns by name",
            )
        return self.columns[name]


class Reward(ABC):
    """A named reward. Subclasses score one row; hostile text must never raise, bad data must."""

    def __init__(self, name: str) -> None:
        # TRL names a reward in its logs by this attribute
        self.__name__ = name

    @abstractmethod
    def score(self, row: RewardRow) -> Score:
        """Score one row. Raises :class:`~omni_grpo_core.errors.DataError` for a bad gold."""

    def explain(
        self, prompts: Sequence[Any], completions: Sequence[Completion], **columns: Any
    ) -> list[Score]:
        """A score with its reason for each of the ``len(completions)`` rows."""
        return self.score_rows(rows_of(prompts, completions, columns))

    def score_rows(self, rows: Sequence[RewardRow]) -> list[Score]:
        """One score per row; overridden where rows are better scored concurrently."""
        return [self.score(row) for row in rows]

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Completion], **columns: Any
    ) -> list[float | None]:
        """TRL's signature: the values of :meth:`explain`."""
        return [score.value for score in self.explain(prompts, completions, **columns)]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.__name__!r})"


COLUMNS = ("sample_id", "problem_type", "options", "solution")
"""The columns that rewards read from a data set."""


def columns_of(samples: Iterable[Sample]) -> dict[str, list[Any]]:
    """The keyword arguments of a reward function, one value per completion: ``samples`` holds the
    sample of each completion."""
    rows = [(s.sample_id, s.problem_type, list(s.options), s.solution) for s in samples]
    return {name: [row[at] for row in rows] for at, name in enumerate(COLUMNS)}


def rows_of(
    prompts: Sequence[Any], completions: Sequence[Completion], columns: Mapping[str, Any]
) -> list[RewardRow]:
    """One :class:`RewardRow` per completion.

    Raises :class:`~omni_grpo_core.errors.RewardError` unless prompts and every column that rewards
    read have one value per completion: a shorter list would match the wrong rows.
    """
    read = {name: columns[name] for name in COLUMNS if columns.get(name) is not None}
    for name, values in {"prompts": prompts, **read}.items():
        if isinstance(values, str) or len(values) != len(completions):
            raise RewardError(
                f"column {name!r}",
                got="one text" if isinstance(values, str) else f"{len(values)} values",
                want=f"a list of {len(completions)}, one for each completion",
                fix="pass the columns repeated for every generation, as TRL does",
            )
    return [
        RewardRow(
            index=i,
            prompt=plain_text(prompts[i], f"prompt {i}"),
            text=plain_text(completion, f"completion {i}"),
            columns={name: values[i] for name, values in read.items()},
        )
        for i, completion in enumerate(completions)
    ]


def plain_text(value: Any, item: str) -> str:
    """The text of a string, of messages, or of a message's parts; media parts have none.

    >>> plain_text([{"role": "assistant", "content": [{"type": "text", "text": "hi"}]}], "x")
    'hi'
    """
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return plain_text(value.get("content", value.get("text", "")), item)
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return "".join(plain_text(part, item) for part in value)
    if value is None:
        return ""
    raise RewardError(
        item,
        got=type(value).__name__,
        want="text, or a list of messages with 'content'",
        fix="pass decoded completions",
    )
