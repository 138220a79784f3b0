"""Partial rewards: whether they act on tokens, and on which."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from omni_grpo_core.core.policy import Policy
from omni_grpo_core.doctor.checks.advantage import (
    fits,
    listed,
    recomputed,
    reward_table,
    whole_rollouts,
)
from omni_grpo_core.doctor.evidence import Case, Evidence, Look
from omni_grpo_core.doctor.rollouts import completion_ids, rollouts, until_end
from omni_grpo_core.losses.spans import byte_pieces, token_offsets, token_span
from omni_grpo_core.rewards.parse import parse
from omni_grpo_core.types import Malformed

_SECTIONS = ("context", "think", "answer")


def look_at_partials(case: Case) -> Iterable[Evidence]:
    """A partial reward that does not act on its section's tokens."""
    for rollout in whole_rollouts(case):
        seen, table = rollout.advantage, reward_table(rollout)
        if seen is None or not seen.spans or table is None or seen.rewards.ndim != 1:
            continue
        names = [call.name for call in rollout.rewards]
        for name, span in seen.spans.items():
            if name not in names or table.shape[1] != len(seen.group_ids):
                continue
            own = table[names.index(name)].nan_to_num()
            wanted = [
                recomputed(own, seen.group_ids, scale, unbiased)
                for scale, unbiased in product(("group", "batch", "none"), (True, False))
            ]
            acted = _acted(seen.advantages.double(), span)
            if acted is None:
                continue  # one advantage per completion: partial rewards are added in the loss
            known = span.bool().any(1) & ~acted.isnan()
            if not bool(known.any()):
                continue
            weight = float(seen.weights.get(name, 1.0))
            if any(fits(acted[known], w[known] * s) for w in wanted for s in {1.0, weight}):
                continue
            yield Evidence(
                "advantage",
                "partial-unused",
                f"the partial reward {name} ({listed(own)}) should add {listed(wanted[0][known])} "
                f"to the advantage of its tokens; it adds {listed(acted[known])}",
                values={
                    "name": name,
                    "added": acted[known].tolist(),
                    "wanted": wanted[0][known].tolist(),
                    "alone": not bool(acted[known].any()),
                },
            )


def _acted(values: Tensor, span: Tensor) -> Tensor | None:
    """The advantage of the span's tokens minus that of their completion's others, (N,); NaN without
    others. ``None`` with one advantage per completion, or spans of another shape."""
    if values.ndim != 2 or values.shape != span.shape:
        return None
    found = []
    for row, inside in zip(values, span.bool(), strict=True):
        others = row[~inside]
        others = others[others != 0]
        if not bool(inside.any()):
            found.append(0.0)
        elif not len(others):
            # all other tokens have 0: their completion's advantage is 0, or they are padding
            found.append(float(row[inside].mean()) if len(row[~inside]) else math.nan)
        else:
            found.append(float(row[inside].mean() - others[0]))
    return torch.tensor(found, dtype=torch.float64)


def look_at_spans(case: Case) -> Iterable[Evidence]:
    """Tokens that a partial reward acts on, compared with the text they spell."""
    if case.reference is None:
        return
    policy = case.reference.policy
    for rollout in rollouts(case):
        seen = rollout.advantage
        made = [ids for call in rollout.generates if (ids := completion_ids(call)) is not None]
        if seen is None or not made:
            continue
        for name, span in seen.spans.items():
            ids = _of_width(made, span.shape[-1], policy.pad_token_id)
            if tuple(span.shape) != tuple(ids.shape):
                continue
            wrong = _span_differs(policy, ids, span.bool(), name)
            if wrong is not None:
                yield wrong


def _of_width(made: Sequence[Tensor], width: int, pad: int) -> Tensor:
    """The ids of several calls, padded on the right as a loop does that puts them together."""
    longest = max(width, *(ids.shape[1] for ids in made))
    return torch.cat([F.pad(ids, (0, longest - ids.shape[1]), value=pad) for ids in made])


def _span_differs(policy: Policy, ids: Tensor, span: Tensor, name: str) -> Evidence | None:
    """The intended section is the one that most rows agree on; a row that marks tokens other than
    those of the section, with or without both its tags, is wrong."""
    wanted = {
        section: [
            section_tokens(policy, row.tolist(), section)
            for row in torch.where(until_end(ids, policy.eos_token_ids), ids, policy.pad_token_id)
        ]
        for section in _SECTIONS
    }
    marked = [tuple(row.nonzero()[:, 0].tolist()) for row in span]

    def overlap(section: str) -> float:
        return sum(
            len({*tokens} & {*allowed[0]}) / max(len({*tokens} | {*allowed[0]}), 1)
            for tokens, allowed in zip(marked, wanted[section], strict=True)
            if allowed
        )

    meant = max(_SECTIONS, key=overlap)
    right = [tokens in allowed for tokens, allowed in zip(marked, wanted[meant], strict=True)]
    for row, (tokens, allowed) in enumerate(zip(marked, wanted[meant], strict=True)):
        # unless some row has the section right, it is not certain that it is the intended one
        if right[row] or (not allowed and not any(right)):
            continue
        text = policy.decode(ids[row][until_end(ids[row][None], policy.eos_token_ids)[0]].tolist())
        malformed = isinstance(parse(_without_end(policy, text)), Malformed)
        # what counts as a section of a malformed completion is ambiguous; so is a content that
        # contains the beginning of a tag
        frayed = bool(allowed) and "<" in policy.decode(
            [int(ids[row, t]) for t in allowed[0]][1:-1]
        )
        if frayed and not tokens:
            continue
        if malformed and (not tokens or (not allowed and f"<{meant}>" in text)):
            continue
        spelled = policy.decode([int(ids[row, t]) for t in tokens])
        should = policy.decode([int(ids[row, t]) for t in allowed[0]]) if allowed else ""
        return Evidence(
            "advantage",
            "span-differs",
            f"partial reward {name} acts on {len(tokens)} tokens of completion {row}, "
            f"{spelled[:60]!r}; its {meant} is {should[:60]!r}",
            row=row,
            values={"name": name, "section": meant, "marked": list(tokens)[:50]},
        )
    return None


def _without_end(policy: Policy, text: str) -> str:
    for token in policy.eos_token_ids:
        text = text.removesuffix(policy.decode([token]))
    return text


def section_tokens(policy: Policy, ids: Sequence[int], section: str) -> list[tuple[int, ...]]:
    """Tokens of a section's content, and of the section with its tags, by text offsets; empty
    unless the completion has it exactly once."""
    pieces = byte_pieces([str(t) for t in policy.processor.tokenizer.convert_ids_to_tokens(ids)])
    text = b"".join(pieces).decode("utf-8", errors="replace")
    found = list(re.finditer(f"<{section}>(.*?)</{section}>", text, re.DOTALL))
    if len(found) != 1 or text.count(f"<{section}>") != 1:
        return []
    offsets = token_offsets(pieces, text)
    return [tuple(range(*token_span(offsets, *found[0].span(group)))) for group in (1, 0)]


LOOKS: tuple[Look, ...] = (look_at_partials, look_at_spans)
