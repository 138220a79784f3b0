"""Advantages, computed again from the rewards and groups that went into them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product

import torch
from torch import Tensor

from omni_grpo_core.doctor.evidence import Case, Evidence, Look, Origin
from omni_grpo_core.doctor.turns import Turn, completion_ids, turns, until_end
from omni_grpo_core.grpo.spans import byte_pieces, token_offsets, token_span
from omni_grpo_core.observed import AdvantageSeen
from omni_grpo_core.policy import Policy
from omni_grpo_core.rewards.parse import parse
from omni_grpo_core.types import Malformed

_CLOSE = 1e-3
"""Relative: trainers add 1e-4 or 1e-6 to a deviation that may be .01 itself, in float32."""
_NO_SPREAD = 1e-6
_SECTIONS = ("context", "think", "answer")


def look_at_totals(case: Case) -> Iterable[Evidence]:
    """The sum that advantages were taken of, against what the functions gave."""
    for turn in turns(case):
        seen, table = turn.advantage, reward_table(turn)
        if seen is None or table is None or seen.rewards.ndim != 1:
            continue
        names = [call.name for call in turn.rewards]
        if len(seen.rewards) != table.shape[1] or any(name not in seen.weights for name in names):
            continue
        weights = [float(seen.weights[name]) for name in names]
        kept = [0.0 if name in seen.spans else w for name, w in zip(names, weights, strict=True)]
        sums = [_weighted(table, w) for w in (kept, weights)]
        given = seen.rewards.double().nan_to_num()
        if any(_same(given, total) for total in sums):
            continue
        row = int((given - sums[0]).abs().argmax())
        yield Evidence(
            "advantage",
            "total-differs",
            f"completion {row} went into the advantage with a reward of {float(given[row]):.4g}; "
            f"its functions gave "
            + ", ".join(f"{n} {float(v):.4g}" for n, v in zip(names, table[:, row], strict=True))
            + f", with their weights {float(sums[0][row]):.4g}",
            row=row,
            values={"given": given.tolist(), "wanted": sums[0].tolist(), "names": names},
        )


def reward_table(turn: Turn) -> Tensor | None:
    """What each function gave each completion, (functions, N), NaN where it gave nothing."""
    lengths = {len(call.values) for call in turn.rewards}
    if len(lengths) != 1 or 0 in lengths:
        return None
    return torch.tensor(
        [[math.nan if v is None else v for v in call.values] for call in turn.rewards],
        dtype=torch.float64,
    )


def _weighted(table: Tensor, weights: Sequence[float]) -> Tensor:
    return (table * torch.tensor(weights, dtype=torch.float64)[:, None]).nansum(0)


def look_at_advantages(case: Case) -> Iterable[Evidence]:
    """Each advantage, recomputed by group id for whatever scale fits."""
    for turn in turns(case):
        seen = turn.advantage
        if seen is None or seen.rewards.ndim != 1:
            continue
        count = len(seen.rewards)
        if len(seen.group_ids) != count or len(seen.advantages) != count:
            yield Evidence(
                "advantage",
                "shapes-differ",
                f"{count} rewards, {len(seen.group_ids)} group ids and advantages of shape "
                f"{tuple(seen.advantages.shape)}: a reward has no advantage of its own",
                values={"shape": list(seen.advantages.shape), "rewards": count},
            )
            continue
        rewards = seen.rewards.double().nan_to_num()
        values = seen.advantages.double()
        if not bool(torch.isfinite(values).all()):
            broken = not bool(torch.isfinite(seen.rewards).all())
            yield Evidence(
                "advantage",
                "not-finite",
                f"{int((~torch.isfinite(values)).sum())} advantages are NaN or infinite",
                "inherited" if broken else "added",
            )
            continue
        base = _base(values, seen.spans)
        if base is None or any(_fits(base, by) for by in _variants(rewards, seen)):
            continue
        wanted = next(_variants(rewards, seen))
        yield Evidence(
            "advantage",
            "advantage-differs",
            f"the advantages {_told(base)} are not those of the rewards {_told(rewards)} in the "
            f"groups {_names(seen.group_ids)}, which are {_told(wanted)}{_how(base, seen)}",
            values={
                "given": base.tolist(),
                "wanted": wanted.tolist(),
                "how": _match(base, rewards, seen),
            },
        )


def _base(values: Tensor, spans: Mapping[str, Tensor]) -> Tensor | None:
    """One advantage a completion: of token advantages what stands outside all partial spans; NaN
    for a completion that lies within them."""
    if values.ndim == 1:
        return values
    if values.ndim != 2:
        return None
    inside = torch.zeros(values.shape, dtype=torch.bool)
    for span in spans.values():
        if span.shape == values.shape:
            inside |= span.bool()
    outside = torch.where(inside, 0.0, values)
    # 0 is padding
    largest = outside.abs().argmax(1, keepdim=True)
    found = outside.gather(1, largest)[:, 0]
    unequal = (outside != 0) & ~torch.isclose(outside, found[:, None], rtol=1e-4, atol=1e-6)
    covered = (found == 0) & (values != 0).any(1)
    return None if bool(unequal.any()) else torch.where(covered, torch.nan, found)


def _variants(rewards: Tensor, seen: AdvantageSeen) -> Iterator[Tensor]:
    scales = (
        (seen.scale,) if seen.scale in ("group", "batch", "none") else ("group", "batch", "none")
    )
    for scale, unbiased in product(scales, (True, False)):
        yield _recomputed(rewards, seen.group_ids, scale, unbiased)


def _recomputed(
    rewards: Tensor, group_ids: Sequence[str], scale: str, unbiased: bool = True
) -> Tensor:
    """As :mod:`omni_grpo_core.grpo.advantage`, for either kind of deviation."""
    values = torch.zeros_like(rewards)
    whole = rewards.std(unbiased=unbiased) if len(rewards) > 1 else torch.tensor(0.0)
    for name in dict.fromkeys(group_ids):
        members = torch.tensor([group == name for group in group_ids])
        own = rewards[members]
        if len(own) < 2 or float(own.max() - own.min()) <= _NO_SPREAD:
            continue
        divisor = {"group": own.std(unbiased=unbiased), "batch": whole}.get(
            scale, torch.tensor(1.0)
        )
        values[members] = (own - own.mean()) / (divisor + (1e-4 if scale != "none" else 0))
    return values


def _fits(values: Tensor, wanted: Tensor) -> bool:
    """Equal up to the epsilon in the divisor, which trainers choose; a row of 0 fits nothing else
    than a reward at the mean of its group."""
    known = ~values.isnan()
    values, wanted = values[known], wanted[known]
    if not len(values):
        return True
    size = max(float(wanted.abs().max()), float(values.abs().max()), 1e-3)
    return bool(((values - wanted).abs() <= 0.02 * size).all())


def _how(base: Tensor, seen: AdvantageSeen) -> str:
    told = {
        "by-row-order": "; they are those of groups formed by row order",
        "by-batch": "; they are those of the whole batch as one group",
        "by-interleaving": "; they are those of groups of every other row",
        "negated": "; they have the opposite sign",
        "unnormalised": "; they are the rewards themselves",
        "zero": "; all of them are 0 although rewards differ",
    }
    return told.get(_match(base, seen.rewards.double().nan_to_num(), seen), "")


def _match(base: Tensor, rewards: Tensor, seen: AdvantageSeen) -> str:
    """Which mistake the advantages are the result of, if it is a known way to miscount."""
    count = len(rewards)
    sizes = {seen.group_ids.count(name) for name in seen.group_ids}
    wanted = list(_variants(rewards, seen))
    if any(_fits(-base, w) for w in wanted):
        return "negated"
    if float(base.nan_to_num().abs().max()) == 0:
        return "zero"
    for size in sorted({*sizes, *(d for d in range(2, count) if count % d == 0)}, reverse=True):
        rows = [str(row // size) for row in range(count)]
        every = [str(row % max(1, count // size)) for row in range(count)]
        for name, groups in (("by-row-order", rows), ("by-interleaving", every)):
            for scale, unbiased in product(("group", "batch", "none"), (True, False)):
                if _fits(base, _recomputed(rewards, groups, scale, unbiased)):
                    return name
    one = ["all"] * count
    if any(_fits(base, _recomputed(rewards, one, scale)) for scale in ("group", "none")):
        return "by-batch"
    return "unnormalised" if _fits(base, rewards) else ""


def look_at_signal(case: Case) -> Iterable[Evidence]:
    """No group with two different rewards: nothing to learn from, and nothing says so."""
    for turn in turns(case):
        seen = turn.advantage
        if seen is None or seen.rewards.ndim != 1 or len(seen.group_ids) != len(seen.rewards):
            continue
        groups: dict[str, list[float]] = {}
        for name, reward in zip(seen.group_ids, seen.rewards.double().tolist(), strict=True):
            groups.setdefault(name, []).append(reward)
        flat = [name for name, r in groups.items() if max(r) - min(r) <= _NO_SPREAD]
        # a partial reward may give a signal where the sum of the others has none
        if len(flat) < len(groups) or bool(seen.advantages.double().nan_to_num().any()):
            continue
        single = [name for name, r in groups.items() if len(r) < 2]
        yield Evidence(
            "advantage",
            "no-variance",
            f"all {len(groups)} groups have one reward each "
            f"({', '.join(f'{r[0]:.4g}' for r in list(groups.values())[:4])}): every advantage is "
            "0, and so are loss and gradient"
            + (f"; {len(single)} groups have one completion only" if single else ""),
            _signal_origin(turn, bool(single)),
            values={
                "rewards": {name: r[0] for name, r in list(groups.items())[:8]},
                "single": len(single),
                "groups": len(groups),
            },
        )


def _signal_origin(turn: Turn, single: bool) -> Origin:
    """Groups of one are this stage's doing, and so are weights that leave nothing; rewards whose
    weighted sum is the same all over a group were handed over."""
    table, seen = reward_table(turn), turn.advantage
    if single:
        return "added"
    if table is None or seen is None or table.shape[1] != len(seen.group_ids):
        return "unknown"
    names = [call.name for call in turn.rewards]
    weights = [0.0 if name in seen.spans else float(seen.weights.get(name, 1.0)) for name in names]
    counted = [w for name, w in zip(names, weights, strict=True) if name not in seen.spans]
    if counted and not any(counted):
        return "added"
    sums = _weighted(table, weights)
    for name in dict.fromkeys(seen.group_ids):
        own = sums[torch.tensor([group == name for group in seen.group_ids])]
        if float(own.max() - own.min()) > _NO_SPREAD:
            return "added"
    return "inherited"


def look_at_partials(case: Case) -> Iterable[Evidence]:
    """A partial reward that does not move the tokens it is about."""
    for turn in turns(case):
        seen, table = turn.advantage, reward_table(turn)
        if seen is None or not seen.spans or table is None or seen.rewards.ndim != 1:
            continue
        names = [call.name for call in turn.rewards]
        for name, span in seen.spans.items():
            if name not in names or table.shape[1] != len(seen.group_ids):
                continue
            own = table[names.index(name)].nan_to_num()
            wanted = [
                _recomputed(own, seen.group_ids, scale, unbiased)
                for scale, unbiased in product(("group", "batch", "none"), (True, False))
            ]
            acted = _acted(seen.advantages.double(), span)
            if acted is None:
                continue  # one advantage a completion: partial rewards join in the loss
            known = span.bool().any(1) & ~acted.isnan()
            if not bool(known.any()):
                continue
            weight = float(seen.weights.get(name, 1.0))
            if any(_fits(acted[known], w[known] * s) for w in wanted for s in {1.0, weight}):
                continue
            yield Evidence(
                "advantage",
                "partial-unused",
                f"the partial reward {name} ({_told(own)}) should add {_told(wanted[0][known])} to "
                f"the advantage of its tokens; it adds {_told(acted[known])}",
                values={
                    "name": name,
                    "added": acted[known].tolist(),
                    "wanted": wanted[0][known].tolist(),
                },
            )


def _acted(values: Tensor, span: Tensor) -> Tensor | None:
    """What tokens of the span have over the others of their completion, (N,); NaN where there are
    no others. ``None`` where advantages are one a completion or spans of another shape."""
    if values.ndim != 2 or values.shape != span.shape:
        return None
    found = []
    for row, inside in zip(values, span.bool(), strict=True):
        others = row[~inside]
        others = others[others != 0]
        if not bool(inside.any()):
            found.append(0.0)
        elif not len(others):
            # all other tokens count 0: their completion's advantage is 0, or they are padding
            found.append(float(row[inside].mean()) if len(row[~inside]) else math.nan)
        else:
            found.append(float(row[inside].mean() - others[0]))
    return torch.tensor(found, dtype=torch.float64)


def look_at_spans(case: Case) -> Iterable[Evidence]:
    """Tokens that a partial reward acts on, against the text they spell."""
    if case.reference is None:
        return
    policy = case.reference.policy
    for turn in turns(case):
        seen = turn.advantage
        ids = None if turn.generated is None else completion_ids(turn.generated)
        if seen is None or ids is None:
            continue
        for name, span in seen.spans.items():
            if tuple(span.shape) != tuple(ids.shape):
                continue
            said = _span_said(policy, ids, span.bool(), name)
            if said is not None:
                yield said


def _span_said(policy: Policy, ids: Tensor, span: Tensor, name: str) -> Evidence | None:
    """The section that most rows agree on is the one that is meant; a row that marks other tokens
    than those of the section, or of the section with both its tags, is wrong."""
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
        # without a row that has the section right, nobody knows that it is meant
        if right[row] or (not allowed and not any(right)):
            continue
        text = policy.decode(ids[row][until_end(ids[row][None], policy.eos_token_ids)[0]].tolist())
        malformed = isinstance(parse(_without_end(policy, text)), Malformed)
        # what stands for a section in a malformed completion is a matter of taste: so is a content
        # that holds the beginning of a tag
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
    """Tokens of a section's content, and of the section with its tags, by text offsets; empty where
    the completion does not have it exactly once."""
    pieces = byte_pieces([str(t) for t in policy.processor.tokenizer.convert_ids_to_tokens(ids)])
    text = b"".join(pieces).decode("utf-8", errors="replace")
    found = list(re.finditer(f"<{section}>(.*?)</{section}>", text, re.DOTALL))
    if len(found) != 1 or text.count(f"<{section}>") != 1:
        return []
    offsets = token_offsets(pieces, text)
    return [tuple(range(*token_span(offsets, *found[0].span(group)))) for group in (1, 0)]


def _same(a: Tensor, b: Tensor) -> bool:
    return bool(((a - b).abs() <= _CLOSE * (1 + b.abs())).all())


def _told(values: Tensor) -> str:
    shown = ", ".join(f"{float(v):.3g}" for v in values[:8])
    return f"[{shown}{', …' if len(values) > 8 else ''}]"


def _names(values: Sequence[str]) -> str:
    return f"[{', '.join(values[:8])}{', …' if len(values) > 8 else ''}]"


LOOKS: tuple[Look, ...] = (
    look_at_totals,
    look_at_advantages,
    look_at_signal,
    look_at_partials,
    look_at_spans,
)
