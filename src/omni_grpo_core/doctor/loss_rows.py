"""The loss's weights by completion: what every backward of a step did to every token, in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from omni_grpo_core.doctor.bundles import FedRow, ids_in, rows_in
from omni_grpo_core.doctor.evidence import Case
from omni_grpo_core.doctor.rollouts import Completion, ids_of, joined
from omni_grpo_core.trace.calls import ForwardCall, LossGradient

UNREAD = 0.3
"""Residual above which a gradient is not that of the token it was read as."""
SHARE = 0.9
"""Of the positions of a step, how many must agree on a trained token that is not the next."""
CLEAN = 3e-5
"""Residual below which nothing else is in a float32 gradient: 1e-6 is what a clean one has, and an
entropy bonus of a thousandth of the advantages 4e-5."""


_NOISE = 8 * torch.finfo(torch.float32).eps
"""Of an advantage of 1: what rounding of log-probabilities (a few spacings of numbers up to 10)
leaves of a KL whose reference is the policy, at a beta of up to 0.1."""


@dataclass(frozen=True, slots=True, eq=False)
class TrainedRow:
    """One scored row whose loss was read. K: the positions of its forward that have logits.

    ``lead``: positions before the one that predicts the completion's first token. ``following``,
    ``tokens``: int64 (K,), the next token of the row and the one that was trained, -1 where there
    is none. ``weights``, ``temperature``, ``residual``, ``entropy``: float64 (K,), as in
    ``LossGradient``, weights summed over the step's backwards. ``part``: number of its backward.
    """

    completion: Completion
    forward: ForwardCall
    at: int
    lead: int
    following: Tensor
    tokens: Tensor
    weights: Tensor
    temperature: Tensor
    residual: Tensor
    entropy: Tensor
    part: int

    @property
    def is_float32(self) -> bool:
        """Whether nothing rounded its gradient to 16 bits."""
        modes = self.forward.modes
        return "16" not in self.forward.logits_dtype + modes.dtype + (modes.autocast or "")

    @property
    def unexplained(self) -> float:
        """The part of its gradient that is no function of the tokens' logprobs."""
        left = self.residual[self.tokens >= 0]
        return float(left.nanmedian()) if len(left) else 0.0

    @property
    def exact(self) -> bool:
        """Whether its weights are good to float32."""
        return self.is_float32 and self.unexplained <= CLEAN

    @property
    def ended(self) -> bool:
        """Whether the completion ends with one of generate's eos ids."""
        one = self.completion
        return bool(one.end) and one.ids[one.end - 1] in ids_of(one.call.config.get("eos_token_id"))

    @property
    def end(self) -> int:
        """Tokens of the completion up to and including its first eos."""
        return self.completion.end

    @property
    def width(self) -> int:
        """Tokens of the completion as it was scored, padding included."""
        return len(self.tokens) - self.lead - 1

    def moved(self, by: int) -> TrainedRow:
        """With weights placed ``by`` columns later: of a loss whose positions are off by that."""
        return replace(
            self, tokens=torch.roll(self.tokens, by), weights=torch.roll(self.weights, by)
        )

    @property
    def counted(self) -> Tensor:
        """bool: which tokens after the prompt count, padding included."""
        return self.tokens[self.lead :] >= 0

    @property
    def own_weights(self) -> Tensor:
        """float64 (length,): of the completion's tokens up to their end, 0 where none counts."""
        return self.weights[self.lead : self.lead + self.end]

    @property
    def counting(self) -> Tensor:
        """float64: weights of the completion's tokens that count."""
        return self.own_weights[self.counted[: self.end]]

    @property
    def level(self) -> Tensor:
        """Their median, 0 where none counts."""
        own = self.counting
        return own.median() if len(own) else own.new_zeros(())

    @property
    def outside(self) -> Tensor:
        """float64: weights of the prompt's tokens and of those after the end."""
        return torch.cat([self.weights[: self.lead], self.weights[self.lead + self.end :]])

    def scores(self, given: Tensor | None) -> Tensor | None:
        """Those of the completion's tokens among all of its forward's, (N, L - 1)."""
        return None if given is None else _own(given[self.at], self.start, self.end)

    @property
    def start(self) -> int:
        """Column of the completion's first token."""
        ids = ids_in(self.forward)
        return 0 if ids is None else ids.shape[1] - len(self.tokens) + self.lead + 1


def _own(scores: Tensor, start: int, length: int) -> Tensor:
    return scores[start - 1 : start - 1 + length].double()


def trained_rows(case: Case) -> tuple[TrainedRow, ...]:
    """Every row of the step with a finite gradient that could be read, and a known completion, in
    the order in which they were scored."""
    return case.once(_trained_rows)


def _trained_rows(case: Case) -> tuple[TrainedRow, ...]:
    found: dict[tuple[int, int], TrainedRow] = {}
    for seen, part in zip(case.gradients, backwards(case), strict=True):
        if seen.forward >= len(case.forwards):
            continue
        forward = case.forwards[seen.forward]
        owners = joined(case).scored[forward]
        for row, owner in zip(rows_in(case, forward), owners, strict=False):
            if owner is None or row.at >= len(seen.tokens):
                continue
            one = _row(row, owner, forward, seen, part)
            key = (seen.forward, row.at)
            if one is not None:
                found[key] = _added(found[key], one) if key in found else one
    rows = [found[key] for key in sorted(found)]
    floor = _NOISE / max(sum(row.end for row in rows), 1)
    return tuple(_silenced(row) if float(row.weights.abs().max()) <= floor else row for row in rows)


def _silenced(row: TrainedRow) -> TrainedRow:
    """A row whose weights are rounding has none."""
    none = torch.full_like(row.temperature, torch.nan)
    return replace(
        row, tokens=torch.full_like(row.tokens, -1), weights=torch.zeros_like(row.weights),
        temperature=none, residual=none,
    )  # fmt: skip


def share_of(rows: Sequence[TrainedRow], by: int) -> float:
    """Of trained positions, how many are trained on the token ``by`` columns after the next."""
    right = total = 0
    for row in rows:
        wanted = torch.roll(row.following, -by)
        kept = row.tokens >= 0
        right += int((row.tokens == wanted)[kept].sum())
        total += int(kept.sum())
    return right / max(total, 1)


def offset_of(rows: Sequence[TrainedRow]) -> int | None:
    """Columns by which weights are to be moved to the tokens that they were read as."""
    return next((by for by in (0, 1, -1) if share_of(rows, by) >= SHARE), None)


def backwards(case: Case) -> list[int]:
    """Number of the backward that each gradient was seen in: it reaches the forwards of its graph
    from the latest to the earliest, so that one which is no earlier belongs to the next."""
    found: list[int] = []
    last = -1
    for seen in case.gradients:
        found.append((found[-1] if found else -1) + (not found or seen.forward >= last))
        last = seen.forward
    return found


def has_parts(case: Case) -> bool:
    """Whether every backward of the step was about completions: these are its micro-batches."""
    return sum(len(step.losses) for step in case.steps) == len({*backwards(case)})


def _row(
    row: FedRow, owner: Completion, forward: ForwardCall, seen: LossGradient, part: int
) -> TrainedRow | None:
    width = seen.tokens.shape[1]
    lead = start_of(row, owner) - 1 - (len(row.raw) - width)
    if lead < 0 or lead + owner.end > width or not bool(seen.weights[row.at].isfinite().all()):
        return None
    following = torch.tensor([*row.raw[len(row.raw) - width + 1 :], -1])
    return TrainedRow(
        completion=owner,
        forward=forward,
        at=row.at,
        lead=lead,
        following=following,
        tokens=seen.tokens[row.at],
        weights=seen.weights[row.at].double(),
        temperature=seen.temperature[row.at].double(),
        residual=seen.residual[row.at].double(),
        entropy=seen.entropy[row.at].double(),
        part=part,
    )


def _added(one: TrainedRow, other: TrainedRow) -> TrainedRow:
    """Several backwards through one forward."""
    return replace(
        one,
        tokens=torch.maximum(one.tokens, other.tokens),
        weights=one.weights + other.weights,
        temperature=torch.where(one.temperature.isnan(), other.temperature, one.temperature),
        residual=torch.fmax(one.residual, other.residual),
        entropy=one.entropy + other.entropy,
    )


def start_of(row: FedRow, owner: Completion) -> int:
    """Column of the completion's first token in a scored row."""
    kept = row.kept.nonzero()[:, 0].tolist()
    prompt = len(owner.prompt.ids)
    return int(kept[prompt] if len(kept) > prompt else kept[-1] + 1)


def scored_without_gradient(
    case: Case, completion: Completion
) -> Iterator[tuple[ForwardCall, Mapping[str, Tensor]]]:
    """Forwards of this step, and of the rollout before it, that scored a completion without a
    gradient, with its tokens' logprobs, (length,), by the field they come from."""
    for held in (case.before, case):
        for forward, owners in joined(held).scored.items() if held is not None else ():
            if forward.modes.grad_enabled or completion not in owners:
                continue
            row = rows_in(held, forward)[owners.index(completion)] if held is not None else None
            if row is not None:
                yield forward, logprobs_of(forward, row, completion)


def logprobs_of(forward: ForwardCall, row: FedRow, completion: Completion) -> dict[str, Tensor]:
    """The completion's logprobs in a forward, by field; those that are known of every token."""
    start = start_of(row, completion)
    found = {}
    for name in ("logprobs", "sampling_logprobs"):
        given = getattr(forward, name)
        own = None if given is None else _own(given[row.at], start, completion.end)
        if own is not None and len(own) == completion.end and bool(own.isfinite().all()):
            found[name] = own
    return found
