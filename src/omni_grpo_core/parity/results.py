"""The result of a comparison of two input paths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from omni_grpo_core.golden.results import PromptTokens
from omni_grpo_core.parity.ids_causes import Cause
from omni_grpo_core.trace.divergence import StageComparison

RowVerdict = Literal["equal", "within", "differs", "failed"]
"""``equal``: in value and type. ``within``: features differ by no more than the tolerance.
``failed``: a path raised."""
ROW_VERDICTS: tuple[RowVerdict, ...] = get_args(RowVerdict)
Right = Literal["a", "b", "both", "neither", ""]
"""Which side's order of audio in video is the model's own; ``""``: not in question."""


@dataclass(frozen=True, slots=True)
class FirstToken:
    """The first token at which the ids differ: its index, and what both sides have from there on,
    decoded."""

    index: int
    a: str
    b: str


@dataclass(frozen=True, slots=True)
class RowResult:
    """One row. ``stage``: the first that differs, empty if none does. ``sentence``: its first
    difference. ``a_media``, ``b_media``: the runs of media tokens in words. ``right``, ``why``: by
    the model's own definition. ``prompt``: both token sequences, where they differ."""

    sample_id: str
    verdict: RowVerdict
    stage: str
    sentence: str
    causes: tuple[Cause, ...]
    a_media: str
    b_media: str
    stages: tuple[StageComparison, ...] = ()
    token: FirstToken | None = None
    right: Right = ""
    why: str = ""
    prompt: PromptTokens | None = None


@dataclass(frozen=True, slots=True)
class ParityReport:
    """Two paths on the same rows. ``a``, ``b``: their names; ``a_header``, ``b_header``: what they
    ran with."""

    a: str
    b: str
    a_header: Mapping[str, str]
    b_header: Mapping[str, str]
    rows: tuple[RowResult, ...]

    @property
    def equal(self) -> bool:
        return all(row.verdict in ("equal", "within") for row in self.rows)

    @property
    def first(self) -> RowResult | None:
        """The first row that differs."""
        return next((row for row in self.rows if row.verdict not in ("equal", "within")), None)

    @property
    def same_ids(self) -> int:
        """Rows whose ids agree in every token."""
        return sum(row.token is None and row.verdict != "failed" for row in self.rows)

    def causes(self) -> list[tuple[str, list[RowResult]]]:
        """Rows by the causes of their difference, the most frequent first; ``unexplained`` for rows
        with none."""
        found: dict[str, list[RowResult]] = {}
        for row in self.rows:
            if row.verdict in ("differs", "failed"):
                names = dict.fromkeys(cause.name for cause in row.causes) or {"unexplained": None}
                for name in names:
                    found.setdefault(name, []).append(row)
        return sorted(found.items(), key=lambda item: -len(item[1]))

    def lines(self) -> list[str]:
        """Each cause with its number of rows, its smallest row and what happened there."""
        found = []
        for name, rows in self.causes():
            row = smallest(rows)
            said = next((c.sentence for c in row.causes if c.name == name), row.sentence)
            found.append(f"{name}: {len(rows)} of {len(self.rows)} rows, {row.sample_id}: {said}")
        return found

    def to_json(self) -> dict[str, Any]:
        """The object that ``--json`` prints."""
        counts = Counter(row.verdict for row in self.rows)
        return {
            "equal": self.equal,
            "a": {"path": self.a, **self.a_header},
            "b": {"path": self.b, **self.b_header},
            "rows": len(self.rows),
            "same_ids": self.same_ids,
            "verdicts": {verdict: counts[verdict] for verdict in ROW_VERDICTS},
            "causes": {
                name: {
                    "rows": [row.sample_id for row in rows],
                    "smallest": smallest(rows).sample_id,
                }
                for name, rows in self.causes()
            },
            "details": [_plain(row) for row in self.rows],
        }


def smallest(rows: list[RowResult]) -> RowResult:
    """The row with the fewest tokens: the one to report upstream."""
    return min(
        rows, key=lambda row: len(row.prompt.was.ids) if row.prompt and row.prompt.was else 0
    )


def _plain(row: RowResult) -> dict[str, Any]:
    token = row.token
    return {
        "sample_id": row.sample_id,
        "verdict": row.verdict,
        "stage": row.stage,
        "sentence": row.sentence,
        "causes": [{"name": cause.name, "sentence": cause.sentence} for cause in row.causes],
        "first_token": None
        if token is None
        else {"index": token.index, "a": token.a, "b": token.b},
        "a_media": row.a_media,
        "b_media": row.b_media,
        "right": row.right,
        "why": row.why,
        "stages": {
            stage.stage: {
                "verdict": stage.verdict,
                "max_abs": stage.max_abs,
                "differs": [d.sentence for d in stage.differences if d.verdict == "differs"],
            }
            for stage in row.stages
        },
    }
