"""What the loss really pushed up and down: its weight on every token, read from the gradient."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from omni_grpo_core.doctor.evidence import Case
from omni_grpo_core.doctor.rollouts import Completion, rows_of_gradient
from omni_grpo_core.report import shortened, visible
from omni_grpo_core.report.html import Decode
from omni_grpo_core.trace.calls import LossGradient

MOST_ROWS, MOST_TOKENS = 4, 300
_AROUND = 4
"""Tokens shown before the first and after the last one in the loss."""
_LEVELS = 4
_LONGEST = 40


@dataclass(frozen=True, slots=True)
class Token:
    """``kind``: ``up1`` to ``up4`` or ``down1`` to ``down4`` by the size of its weight, ``out``
    where it has none. ``aimed``: what was trained at its place if that is another token."""

    text: str
    kind: str
    title: str
    aimed: str = ""


@dataclass(frozen=True, slots=True)
class PushedRow:
    """One row of a loss. ``weight``: the sum over its tokens of what they are pushed up by; below 0
    they are pushed down. ``more``: tokens that are not shown."""

    title: str
    weight: float
    tokens: tuple[Token, ...]
    more: int


def pushed_rows(case: Case, decode: Decode | None) -> tuple[PushedRow, ...]:
    """The rows that were pushed up most and those pushed down most, in turn."""
    largest = max((float(seen.weights.abs().max()) for seen in _read(case)), default=0.0)
    rows = [row for seen in _read(case) for row in _rows(case, seen, largest, decode)]
    rows.sort(key=lambda row: row.weight)
    ends = [row for pair in zip(reversed(rows), rows, strict=True) for row in pair]
    return tuple(dict.fromkeys(ends))[:MOST_ROWS]


def pushes(case: Case) -> dict[Completion, float]:
    """How much each completion was pushed up, where it was in a loss: 0 if by nothing."""
    found: dict[Completion, float] = {}
    for seen in _read(case):
        for completion, weight in zip(
            rows_of_gradient(case, seen), (-seen.weights.sum(1)).tolist(), strict=False
        ):
            if completion is not None:
                found[completion] = found.get(completion, 0.0) + weight
    return found


def _read(case: Case) -> Iterator[LossGradient]:
    yield from (g for g in case.gradients if g.weights.numel() and g.forward < len(case.forwards))


def _rows(
    case: Case, seen: LossGradient, largest: float, decode: Decode | None
) -> Iterator[PushedRow]:
    ids = case.forwards[seen.forward].inputs.get("input_ids")
    if ids is None or ids.dim() != 2 or len(ids) != len(seen.weights):
        return
    # the last position predicts a token that no row has
    first = ids.shape[1] - seen.weights.shape[1] + 1
    for row in range(len(ids)):
        own = [float(w) for w in seen.weights[row][: ids.shape[1] - first]]
        inside = [at for at, weight in enumerate(own) if weight]
        if not inside:
            continue
        start, stop = max(inside[0] - _AROUND, 0), min(inside[-1] + 1 + _AROUND, len(own))
        tokens = tuple(
            _token(
                int(ids[row, first + at]), int(seen.tokens[row, at]), own[at], largest, decode,
                f"T {float(seen.temperature[row, at]):.3g}, "
                f"residual {float(seen.residual[row, at]):.1g}",
            )
            for at in range(start, min(stop, start + MOST_TOKENS))
        )  # fmt: skip
        weight = -sum(own)
        way = "up" if weight > 0 else "down"
        low, high = (-end(own[at] for at in inside) for end in (max, min))
        by = f"{low:+.3g} to {high:+.3g}" if low < 0 < high else _between(abs(low), abs(high))
        yield PushedRow(
            f"scoring forward {seen.forward}, row {row}: {len(inside)} tokens in the loss, pushed "
            f"{way} by {by} a token",
            weight, tokens, max(stop - start - MOST_TOKENS, 0),
        )  # fmt: skip


def _between(one: float, other: float) -> str:
    """
    >>> _between(0.5, 0.50001), _between(4, 1)
    ('0.5', '1 to 4')
    """
    low, high = (f"{value:.3g}" for value in sorted((one, other)))
    return low if low == high else f"{low} to {high}"


def _token(
    there: int, aimed: int, weight: float, largest: float, decode: Decode | None, more: str
) -> Token:
    text, kind, title = _text(there, decode), "out", f"id {there} · not in the loss"
    if weight:
        level = max(1, min(_LEVELS, round(_LEVELS * abs(weight) / largest)))
        kind = f"{'up' if weight < 0 else 'down'}{level}"
        title = f"id {there} · pushed {kind[:-1]} by {abs(weight):.3g} · {more}"
    other = _text(aimed, decode) if weight and aimed >= 0 and aimed != there else ""
    return Token(text, kind, title, other)


def _text(token: int, decode: Decode | None) -> str:
    text = f" {token}" if decode is None else decode([token])
    return shortened(visible(text), _LONGEST).replace("\n", "↵\n")


def rows_without_weight(case: Case) -> int:
    """Rows of losses in which no token has a weight: their advantage is 0."""
    return sum(int((seen.weights == 0).all(1).sum()) for seen in _read(case))
