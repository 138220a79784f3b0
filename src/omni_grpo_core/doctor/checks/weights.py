"""The weights of completions in the loss, accounted for by the recorded rewards: how they were
compared and scaled, whose they are, and what the sum was divided by."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from omni_grpo_core.doctor.checks.conversation import look_copies
from omni_grpo_core.doctor.checks.policies import later_update
from omni_grpo_core.doctor.checks.sections import repeated
from omni_grpo_core.doctor.continuity import misplaced
from omni_grpo_core.doctor.evidence import Case, Evidence, Look, note_judged, note_missing
from omni_grpo_core.doctor.loss_accounts import (
    LEAST_CHANCE,
    Account,
    advantages,
    enough,
    is_whole,
    mistakes,
    multiples,
    orders,
    recipes,
    sound_accounts,
    sound_values,
    weighted_accounts,
)
from omni_grpo_core.doctor.loss_reading import (
    EXACT,
    Reading,
    against_rewards,
    blind_to_rewards,
    consistent,
    reading,
)
from omni_grpo_core.doctor.loss_rows import has_parts, offset_of, trained_rows
from omni_grpo_core.doctor.ratios import known_of
from omni_grpo_core.doctor.rollouts import settings_of, world_size
from omni_grpo_core.losses import LossConfig
from omni_grpo_core.losses.objectives import gamma
from omni_grpo_core.trace.calls import AdvantageSeen

_WHOLE = 2e-4
"""That of a divisor from a whole multiple of a known one: six are tried on average, and one of them
is as near some number of micro-batches once in a hundred runs."""
_ALONG = 0.5
"""Cosine of weights and the advantages of the recorded rewards from which a loss mostly follows
them: half of what is learnt, at least, is theirs."""
_MOST_PARTS = 16
"""Micro-batches that a loss may have been averaged over: far more, and any number is near some."""


def look_at_weights(case: Case) -> Iterable[Evidence]:
    """The weights of completions, accounted for by the recorded rewards."""
    known = reading(case)
    if known is None:
        if trained_rows(case):
            note_missing(case, "no reward is known of the completions in the loss", "advantage")
        return
    if not bool(known.term.weights.any()):
        yield from _silent(case, known)
        return
    if known.term.varies:
        note_judged(case, "loss")
        vary = [*_broadcast(known)] or [*repeated(known, lambda one: _settled(case, one))]
        if not vary:
            note_missing(
                case,
                "the loss's weights vary along completions in a way that nothing recorded explains",
                "advantage",
            )
        yield from vary or [_varying(known)]
        return
    one, found = sound_reading(case, known)
    if found:
        note_judged(case, "advantage", "loss")
        yield from _recipe(case, one, found)
        yield from _divisor(case, one, found)
    else:
        yield from _unsound(case, known)


def sound_reading(case: Case, known: Reading) -> tuple[Reading, list[Account]]:
    """The rows whose weights sound advantages explain, and how; of a later update those that are
    not clipped as a whole."""
    ways = [known, without_masked(known)]
    if later_update(case):
        ways.append(known.of_rows(known.term.weights != 0))
    for one in ways:
        if found := sound_accounts(one) or _of_sequences(case, one):
            return one, found
    return known, []


def without_masked(known: Reading) -> Reading:
    """The same without rows that are out of the loss because they were cut off at the cap."""
    live = known.term.weights != 0
    cut = ~live & torch.tensor([not row.ended for row in known.rows])
    ended = live & torch.tensor([row.ended for row in known.rows])
    return known.of_rows(~cut) if bool(cut.any()) and bool(ended.any()) else known


def _unsound(case: Case, known: Reading) -> Iterator[Evidence]:
    # what is wrong with the rows before shows in all that is made of them
    if misplaced(case) or any(look_copies(case)):
        note_missing(case, "completions are in others' places: advantages follow", "advantage")
        return
    if not later_update(case) and (out := _left_out(known)):
        note_judged(case, "advantage", "loss")
        yield Evidence(
            "loss",
            "rows-left-out",
            f"{len(out)} of {len(known.rows)} scored completions have no weight in the loss, the "
            f"first being row {known.rows[out[0]].at}, although their rewards differ from their "
            "group's mean: the rewards give the weights of all others",
            row=known.rows[out[0]].at,
            values={"rows": [known.rows[n].at for n in out]},
        )
        return
    if mild := recipes(known):
        note_judged(case, "advantage", "loss")
        yield _differs(known, mild[0], bool(mistakes(known)))
        return
    # a later update may be clipped as a whole
    tried = () if later_update(case) else (mistakes, weighted_accounts, orders)
    told = bool(tried) and (is_whole(known) or (enough(known) and world_size(case) < 2))
    # of equal rewards, what is left of a mean by rounding may be divided by itself
    told &= bool(advantages(known.rewarded.total, known.rewarded.groups)[list(known.at)].any())
    by_chance = False
    for explain in tried:
        found = explain(known)
        by_chance |= bool(found)
        if found and found[0].by.chance <= LEAST_CHANCE:
            note_judged(case, "advantage", "loss")
            if explain is not weighted_accounts:
                yield _wrong(case, known, found)
            if found[0].by.kind == "sound" and found[0].factor < 0:
                turned = [replace(one, factor=-one.factor) for one in found if one.factor < 0]
                yield from _recipe(case, known, turned)
            return
    pair = against_rewards(known)
    if pair is None:
        if told:
            note_judged(case, "advantage")
            yield _of_no_kind(known, by_chance)
            return
        why = "how rewards became the loss's weights could not be told"
        note_missing(case, why, "advantage")
        return
    note_judged(case, "advantage")
    # a penalty or noise that was added after the functions returned
    added = _follows_rewards(known)
    one, other = (known.at[at] for at in pair)
    rewards = known.rewarded.total
    yield Evidence(
        "advantage",
        "weights-against-rewards",
        f"of two completions of one prompt with rewards {float(rewards[one]):.4g} and "
        f"{float(rewards[other]):.4g} the loss raises the second more than the first, or lowers it "
        "less: its weights do not come from the recorded rewards",
        row=known.rows[pair[0]].at,
        values={"rewards": rewards.tolist(), "weights": known.term.weights.tolist()},
        severity="differs" if added else "breaks",
    )


def _of_no_kind(known: Reading, by_chance: bool) -> Evidence:
    """Weights that no sound way to compare rewards gives: what can be said of them.
    ``by_chance``: a mistake gives them that so few numbers may fit."""
    divisor = consistent(known)
    raised = known.divided(divisor or "uniform")
    raised = raised / raised.abs().max()
    live = raised[raised != 0]
    blind = not by_chance and blind_to_rewards(known)
    said = [
        f"the rewards {_listed(known.rewarded.total[list(known.at)])} have, up to a factor, the "
        f"advantages {_listed(raised)} in the loss, which no sound way to compare them gives"
    ]
    if len(live) < len(raised):
        said.append(f"{len(raised) - len(live)} of {len(raised)} completions have none")
    if bool((live > 0).all() or (live < 0).all()):
        said.append(f"all are made {'more' if live[0] > 0 else 'less'} likely")
    if divisor is None:
        said.append("of one prompt's completions, equal rewards have different ones")
    if blind:
        said.append("what earns more than its group's mean is raised like what earns less")
    return Evidence(
        "advantage",
        "advantages-unknown",
        "; ".join(said),
        values={"rewards": known.rewarded.total.tolist(), "raised": raised.tolist()},
        severity="breaks" if blind else "differs",
    )


def _left_out(known: Reading) -> list[int]:
    """Rows without a weight beside others that sound advantages explain; none where it is those of
    one sign, as only a group's better completions may count."""
    wanted = advantages(known.rewarded.total, known.rewarded.groups)[list(known.at)].sign()
    live = known.term.weights != 0
    ended = torch.tensor([row.ended for row in known.rows])
    out = ~live & ended & (wanted != 0)
    both = {*wanted[out].tolist()} & {*wanted[live].tolist()}
    # a reward that is not in the loss, as a partial one, may be all that tells them apart
    unused = any(
        not bool(advantages(rest, known.rewarded.groups)[list(known.at)][out].any())
        for rest in known.rewarded.total[:, None].sub(known.rewarded.rewards).unbind(1)
        if bool(rest.any())
    )
    if not both or unused or int(live.sum()) < 3 or not sound_accounts(known.of_rows(live)):
        return []
    return out.nonzero().flatten().tolist()


def _follows_rewards(known: Reading) -> bool:
    """Whether the weights as a whole do what the rewards ask for, or these ask for nothing."""
    wanted = advantages(known.rewarded.total, known.rewarded.groups)[list(known.at)]
    if not bool(wanted.any()):
        return True
    cosines = [
        torch.cosine_similarity(wanted, known.divided(divisor), 0) for divisor in known.divisors
    ]
    return max(map(float, cosines)) > _ALONG


def _of_sequences(case: Case, known: Reading) -> list[Account]:
    """Accounts of weights that are each multiplied by its sequence's ratio, where not clipped, or
    by vespo's weight of it."""
    live = known.term.weights != 0
    olds = [known_of(case, row).old for row, on in zip(known.rows, live, strict=True) if on]
    if not later_update(case) or int(live.sum()) < 2 or not all(olds):
        return []
    for name in ("logprobs", "sampling_logprobs"):
        gaps = [-old[name] for old in olds if name in old]
        if len(gaps) < len(olds):
            continue
        one = known.of_rows(live)
        whole = torch.stack([gap.sum() for gap in gaps])
        means = torch.stack([gap.mean() for gap in gaps])
        for by in (means.exp(), gamma(LossConfig(), whole, one.term.weights < 0)):
            term = replace(one.term, weights=one.term.weights / by)
            if found := sound_accounts(replace(one, term=term)):
                return found
    return []


def _silent(case: Case, known: Reading) -> Iterator[Evidence]:
    """No weight at all, although rewards differ."""
    total, groups, at = known.rewarded.total, known.rewarded.groups, list(known.at)
    # a later update may be clipped as a whole
    if later_update(case) or not bool(advantages(total, groups)[at].any()):
        return
    if any(bool(row.outside.any()) for row in known.rows):
        note_missing(case, "the loss's weights are on other tokens than sampled ones", "advantage")
        return
    if any(step.ratio_to_itself for step in case.steps):
        note_judged(case, "loss")
        yield Evidence(
            "loss",
            "ratio-to-itself",
            f"the rewards of one prompt's completions differ ({_listed(total[_varied(known)])}), "
            "and no completion has a weight in the loss: it holds exp(x - x), whose gradient is 0; "
            "the old log-probabilities are the policy's own and not detached",
        )
        return
    note_judged(case, "advantage")
    # a KL reaches the model by itself, rows of a part may have got those of others, and weights
    # that are not quite 0 are of advantages that are none
    scored = any(known_of(case, row).reference for row in known.rows)
    scored |= any(bool(seen.weights.any()) for seen in case.gradients)
    apart = advantages(known.rewarded.rewards.T, groups).any(1).tolist()
    # a reward that is not in the loss, as a partial one, may be all that tells them apart
    only = [n for n, tells in zip(known.rewarded.names, apart, strict=True) if tells]
    only = [] if all(apart) else only
    by = f" by {' and '.join(only)} alone" if only else ""
    yield Evidence(
        "advantage",
        "no-signal",
        f"the rewards of one prompt's completions differ{by} ({_listed(total[_varied(known)])}), "
        "and no completion has a weight in the loss: nothing is learnt from them",
        values={
            "rewards": total.tolist(), "only": " and ".join(only),
            "alone": is_whole(known) and not scored and not only,
        },
    )  # fmt: skip


def _varied(known: Reading) -> Tensor:
    """bool (P,): the completions of the first prompt whose rewards differ."""
    groups = torch.tensor(known.rewarded.groups)
    live = advantages(known.rewarded.total, known.rewarded.groups) != 0
    return groups == groups[live][0]


def _listed(values: Tensor) -> str:
    shown = ", ".join(f"{float(v):.3g}" for v in values[:8])
    return f"[{shown}{', …' if len(values) > 8 else ''}]"


# --------------------------------------------------------------------------- advantages


def _recipe(case: Case, known: Reading, found: Sequence[Account]) -> Iterator[Evidence]:
    """A scale that is not the reference's, where no other gives the weights. Scales that differ by
    one factor are told apart by what sound losses divide by, which a factor may be by chance."""
    settled = [
        one
        for one in found
        if any(_is(1, n, known) for n in (*_shares(case, known, one), *_summed(known, one)))
    ]
    live = advantages(known.rewarded.total, known.rewarded.groups)[list(known.at)] != 0
    groups = {known.rewarded.groups[at] for at, on in zip(known.at, live, strict=True) if on}
    # the deviation of a single group is a factor, which any divisor may be
    sure = len(groups) > 1 and known.limit == EXACT
    scales = {account.scale for account in settled or found}
    if "group" in scales or len(scales) != 1:
        return
    [scale] = scales
    set_to = str(settings_of(case).get("scale_rewards", "")).lower()
    if {"true": "group", "false": "none"}.get(set_to, set_to) == scale:
        return
    how = {
        "batch": "divided by one standard deviation of the whole batch instead of each group's",
        "none": "not divided by a standard deviation",
    }[scale]
    yield Evidence(
        "advantage",
        "scale-differs",
        f"the advantages in the loss are reward - mean of the group, {how}: so divided the rewards "
        f"{_listed(known.rewarded.total)} give every completion's weight"
        + ("" if sure else ", up to a factor that another divisor may be as well"),
        values={"scale": scale, "alone": sure},
        severity="differs",
    )


def _differs(known: Reading, account: Account, or_wrong: bool) -> Evidence:
    bare = account.by.kind == "bare"
    verb = "compared with" if bare else "replaced by"
    return Evidence(
        "advantage",
        "advantage-differs",
        f"the weights in the loss are those of rewards {_listed(known.rewarded.total)} {verb} "
        f"{account.by.said}",
        values={
            "how": "unnormalised" if bare else "best-of-n",
            "scale": account.scale,
            "alone": is_whole(known) and not or_wrong,
        },
        severity="differs",
    )


def _against(seen: AdvantageSeen) -> bool:
    """Whether advantages that were noted fall where their rewards rise."""
    if seen.advantages.shape != seen.rewards.shape:
        return False
    groups = torch.tensor([seen.group_ids.index(name) for name in seen.group_ids])
    means = {at: seen.rewards[groups == at].mean() for at in groups.tolist()}
    centred = seen.rewards - torch.stack([means[at] for at in groups.tolist()])
    return float((centred * seen.advantages).sum()) < 0


def _wrong(case: Case, known: Reading, wrong: Sequence[Account]) -> Evidence:
    listed = _listed(known.rewarded.total)
    first = wrong[0]
    # all that explain the weights as well as the first does
    others = dict.fromkeys(one.by.said for one in wrong if one.by.said != first.by.said)
    or_else = f" (or {' or '.join([*others][:3])})" if others else ""
    alone = len({(one.by.kind, one.by.name) for one in wrong}) == 1
    # of groups, a part of a rollout tells nothing
    alone &= first.by.kind in ("sound", "better") or is_whole(known)
    if first.by.kind == "sound":
        # both make one product: whose the sign is can be told where the advantages were noted
        return Evidence(
            "loss" if case.advantages and not any(map(_against, case.advantages)) else "advantage",
            "advantages-negated",
            f"the weights in the loss are the advantages of the rewards {listed} with the opposite "
            "sign: higher-rewarded completions are made less likely",
            values={"factor": first.factor, "alone": alone},
        )
    if first.by.kind == "order":
        return Evidence(
            "advantage",
            "advantages-of-other-rows",
            f"the weights in the loss are the advantages of the rewards {listed} "
            f"{first.by.said}: completions are trained by other completions' rewards{or_else}",
            values={"reproduced": [first.by.name] if alone else []},
        )
    said = "compared with" if first.by.kind != "better" else "replaced by"
    how = {"batch-mean": "by-batch", "other-groups": "by-row-order", "better": "better-only"}
    # a baseline of REINFORCE, where no settings are GRPO's
    meant = first.by.kind == "batch-mean" and "scale_rewards" not in settings_of(case)
    return Evidence(
        "advantage",
        "advantage-differs",
        f"the weights in the loss are those of rewards {listed} {said} {first.by.said}{or_else}",
        values={"how": how[first.by.kind], "scale": first.scale, "alone": alone},
        severity="differs" if meant else "breaks",
    )


def _varying(known: Reading) -> Evidence:
    """Values per token, as a critic's, are a recipe; so may what made these be."""
    rows = [row.own_weights[row.own_weights != 0] for row in known.rows]
    least, most = max(
        ((w.min(), w.max()) for w in rows if len(w)), key=lambda ends: ends[1] - ends[0]
    )
    return Evidence(
        "loss",
        "weights-vary",
        f"the tokens of one completion have weights from {float(-most):.3g} to {float(-least):.3g} "
        "in the loss, which neither a reference, nor a ratio, nor clipping that was recorded "
        "explains",
        values={"least": float(-most), "most": float(-least)},
        severity="differs",
    )


def _broadcast(known: Reading) -> Iterator[Evidence]:
    """Token ``t`` has the advantage of another completion: (N,) met (N, C) without a new axis."""
    values = torch.stack(sound_values(known.rewarded))
    # of a loss that is off by a column
    off = offset_of(known.rows) or 0
    known = replace(known, rows=tuple(row.moved(off) for row in known.rows)) if off else known
    for divisor in known.divisors[:2]:
        # a token that has another completion's advantage of 0 counts
        whole = [float(row.end - known.term.eos_left_out) for row in known.rows]
        by = whole if divisor == "sequence" else [1.0] * len(known.rows)
        for blocks in _blocks(known):
            got = torch.cat([-known.rows[n].own_weights * by[n] for block in blocks for n in block])
            for along in (False, True):
                made = [_laid(known, values, block, along) for block in blocks]
                if any(multiples(got, torch.cat(made, 1), known.limit)):
                    yield Evidence(
                        "advantage",
                        "advantage-broadcast",
                        "the advantages lie along the tokens instead of the completions: the "
                        "tokens of every completion have those of all completions, one after the "
                        f"other ({_listed(-known.term.weights)})",
                        values={"rows": [len(block) for block in blocks]},
                    )
                    return


def _blocks(known: Reading) -> Iterator[list[list[int]]]:
    """Rows of one tensor of the loss, in order: those of a step, a micro-batch, a forward."""
    seen: set[tuple[int, ...]] = set()
    for key in (
        [0 for _ in known.rows],
        [row.part for row in known.rows],
        [known.rewarded.groups[at] for at in known.at],
        [id(row.forward) for row in known.rows],
    ):
        blocks: dict[int, list[int]] = {}
        for n, one in enumerate(key):
            blocks.setdefault(one, []).append(n)
        sizes = tuple(map(len, blocks.values()))
        if min(sizes) > 1 and sizes not in seen:
            seen.add(sizes)
            yield list(blocks.values())


def _laid(known: Reading, values: Tensor, block: Sequence[int], along: bool) -> Tensor:
    """(H, tokens): advantages (H, P) as they lie along the tokens of the block's rows: those of
    each row from the first on, or ``along`` all rows."""
    own = values[:, [known.at[n] for n in block]]
    found = []
    for number, n in enumerate(block):
        row = known.rows[n]
        start = number * row.width if along else 0
        found.append(own[:, (start + torch.arange(row.end)) % len(block)])
    return torch.cat(found, 1)


# --------------------------------------------------------------------------- divisor


@dataclass(frozen=True, slots=True)
class _Share:
    """What a sound loss divides by, ``name``, and how many times the weights of such a loss the
    account's are. ``padded``: it counts the width to which a batch is padded, ``"always"`` or, as
    that is the longest allowed, ``"maybe"``."""

    name: str
    times: float
    padded: Literal["", "maybe", "always"] = ""


def _shares(case: Case, known: Reading, account: Account) -> list[_Share]:
    rows, ranks = float(len(known.rows)), _ranks(case)
    if account.divisor == "sequence":
        return [_Share(f"{rows:.0f} completions", account.factor * rows / ranks)]
    if account.divisor == "part":
        return [_Share("each micro-batch's own tokens", account.factor * len(known.parts) / ranks)]
    if account.divisor == "places":
        name = "each micro-batch's own places, padding included"
        return [_Share(name, account.factor * len(known.parts) / ranks, "always")]
    tokens = float(known.lengths.sum())
    longest = max(row.width for row in known.rows)
    limit = settings_of(case).get("max_completion_length") or known.rows[
        0
    ].completion.call.config.get("max_new_tokens")
    counts = dict.fromkeys((tokens, float(sum(row.end for row in known.rows))))
    shares = [_Share(f"{n:.0f} tokens", account.factor * n / ranks) for n in counts]
    if isinstance(limit, int) and limit:
        name = f"{rows:.0f} completions and the longest allowed, {limit}"
        padded: Literal["", "maybe"] = "maybe" if limit == longest else ""
        shares.append(_Share(name, account.factor * rows * limit / ranks, padded))
    if longest != limit and rows * longest > tokens:
        name = f"{rows:.0f} completions and the width to which they are padded, {longest}"
        shares.append(_Share(name, account.factor * rows * longest / ranks, "always"))
    return shares


def _summed(known: Reading, account: Account) -> list[_Share]:
    """A mean over completions of the sums of their tokens."""
    rows = len(known.rows)
    return [_Share(f"{rows} completions", account.factor * rows)] * (account.divisor == "uniform")


def _is(times: float, share: _Share, known: Reading) -> bool:
    return math.isclose(share.times, times, rel_tol=known.limit)


def _settled(case: Case, known: Reading) -> bool:
    """Whether sound advantages of the rewards give the weights by more than a free factor."""
    return any(
        enough(known) or any(_is(1, share, known) for share in _shares(case, known, one))
        for one in sound_accounts(known)
    )


def _ranks(case: Case) -> int:
    number = case.trace.header.get("ranks", "1")
    return int(number) if number.isdigit() else 1


def _divisor(case: Case, known: Reading, found: Sequence[Account]) -> Iterator[Evidence]:
    """What the sum over tokens was divided by: the weights depend on how a step is split, on
    padding, or are several times those of a step."""
    of_step = ("sequence", "uniform")
    whole = [one for one in found if one.divisor in of_step] or list(found)
    shares = [(one, share) for one in whole for share in _shares(case, known, one)]
    sums = [share for one in whole for share in _summed(known, one)]
    right = [share for share in (*(s for _, s in shares), *sums) if _is(1, share, known)]
    asked = str(settings_of(case).get("loss_type", "")).lower()
    # a factor may be near another one by chance where 16 bits are left of it
    sure = known.limit == EXACT
    if right:
        if whole[0].divisor == "part":
            yield from _by_parts(known, asked, all(one.divisor == "part" for one in whole))
        elif all(share.padded for share in right):
            yield from _padded(known, right, asked, sure)
        return
    parts = len(known.parts)
    stepped = all(step.outcome == "stepped" for step in case.steps)
    if parts < 2 or not has_parts(case) or not stepped:
        return
    for _, share in shares:
        if _is(parts, share, known):
            yield Evidence(
                "loss",
                "accumulation-undivided",
                f"the weights of the step's {parts} micro-batches are {parts} times those of one "
                f"batch divided by {share.name}: each micro-batch's loss was averaged by itself, "
                "and their sum was not divided by their number",
                values={"parts": parts, "told": 1, "losses": parts, "alone": sure},
            )
            return
    scaled = any(one.scale == "group" for one, _ in shares)
    tried = [
        s.times for one, s in shares if (one.scale == "group") == scaled and s.padded != "always"
    ]
    for times in tried:
        told = parts / times
        if 1.5 < told <= _MOST_PARTS and abs(told - round(told)) <= _WHOLE * told:
            yield Evidence(
                "gradient",
                "accumulation-differs",
                f"the loss is averaged over {round(told)} micro-batches, by its weights on tokens, "
                f"and {parts} were added up before the optimizer's step",
                values={"told": round(told), "losses": parts, "alone": sure},
            )
            return


def _by_parts(known: Reading, asked: str, alone: bool) -> Iterator[Evidence]:
    """A mean over each micro-batch's own tokens; not ``alone`` where one over its places gives the
    weights as well."""
    if asked == "bnpo":
        return
    yield Evidence(
        "loss",
        "normaliser-of-parts",
        "each micro-batch's loss is a mean over its own tokens "
        f"({_listed(torch.tensor([*known.parts.values()]))}): so divided, and not by those of the "
        "step, the rewards give every completion's weight",
        values={"loss_type": asked, "alone": alone},
        severity="breaks" if asked else "differs",
    )


def _padded(known: Reading, right: Sequence[_Share], asked: str, sure: bool) -> Iterator[Evidence]:
    """A divisor that counts padding, or may: with completions that were cut off at the longest
    allowed it is a constant as well."""
    always = next((share for share in right if share.padded == "always"), None)
    if always is None and (asked == "dr_grpo" or all(row.end == row.width for row in known.rows)):
        return
    said = "tokens after the end of a completion count in its mean, without a gradient of their own"
    if always is None:
        said = f"a constant, as Dr. GRPO's, or the width to which they are padded, where {said}"
    yield Evidence(
        "loss",
        "padding-in-divisor",
        f"the loss is divided by {(always or right[0]).name}: {said}",
        values={"loss_type": asked, "alone": sure and always is not None},
        severity="breaks" if asked else "differs",
    )


LOOKS: tuple[Look, ...] = (look_at_weights,)
