"""The loss, read from its gradient: nothing of it is handed over by the loop."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from omni_grpo_core.doctor.checks import policies
from omni_grpo_core.doctor.checks.logits import temperature_of
from omni_grpo_core.doctor.checks.policies import later_update
from omni_grpo_core.doctor.continuity import misplaced
from omni_grpo_core.doctor.evidence import Case, Evidence, Look, note_judged, note_missing
from omni_grpo_core.doctor.loss_reading import (
    Account,
    Reading,
    advantages,
    against_rewards,
    multiple,
    reading,
    sound_accounts,
    weighted_accounts,
    wrong_accounts,
)
from omni_grpo_core.doctor.loss_rows import CLEAN, TrainedRow, has_parts, trained_rows
from omni_grpo_core.doctor.policy_term import known_of, policy_term
from omni_grpo_core.doctor.rollouts import settings_of

_SHARE = 0.9
"""Of the positions of a step, how many must agree on a trained token that is not the next."""
_WARM = 0.01
"""Relative difference of two temperatures: a clean reading of bfloat16 is good to 1e-3. An entropy
bonus reads as one that is off by its share of the weights, so that ten times as much is allowed."""
_FAR = 1.6
"""Factor between two temperatures beyond which the policy that is trained is not nearly the one
that sampled; many trainers sample at 0.7 to 1.5 and score at 1."""


# --------------------------------------------------------------------------- tokens


def look_at_backward(case: Case) -> Iterable[Evidence]:
    """A backward that reaches no scoring forward: the loss was cut off from the model."""
    scored = [f for f in case.forwards if f.modes.grad_enabled and f.own and f.error is None]
    losses = [loss for step in case.steps for loss in step.losses]
    if not losses or not scored or case.gradients:
        return
    if "loss gradient" in case.trace.header.get("not_recorded", ""):
        return
    if any(norm for step in case.steps for norm in step.grad_norms.values()):
        note_missing(
            case, "the gradient of the loss was not seen at logits or hidden state", "loss"
        )
        return
    cut = any(
        "requires_grad=True" in text for step in case.steps for text in step.warnings
    ) and any(forward.modes.checkpointing for forward in scored)
    yield Evidence(
        "gradient",
        "loss-detached",
        f"backward was called on {len(losses)} losses ({losses[0]:.4g}), and nothing of them "
        f"reached the logits of the {len(scored)} scoring forwards: the loss is detached from the "
        "model" + ("; checkpointed blocks had no input that requires a gradient" if cut else ""),
        values={"at_checkpoints": cut},
    )


def look_at_targets(case: Case) -> Iterable[Evidence]:
    """The trained token of every position: the next one of its row."""
    rows = [row for row in trained_rows(case) if bool((row.tokens >= 0).any())]
    known = torch.cat([row.tokens for row in rows]) if rows else torch.empty(0)
    count = int((known >= 0).sum())
    if not count:
        return
    note_judged(case, "loss")
    share = {by: _share(rows, by) for by in (0, 1, -1)}
    if share[0] >= _SHARE:
        return
    if share[1] >= _SHARE or share[-1] >= _SHARE:
        early = share[1] >= _SHARE
        yield Evidence(
            "loss",
            "shifted",
            f"of {count} positions in the loss {share[0]:.0%} are trained on the next token and "
            f"{share[1 if early else -1]:.0%} on the one {'after' if early else 'before'} it: "
            "logits and labels are one column apart",
            values={"by": 1 if early else -1, "share": share[1 if early else -1]},
        )
        return
    unread = torch.cat([row.residual[row.tokens >= 0] for row in rows])
    if float(unread.median()) > 0.1:
        note_missing(case, "the gradient at the logits is not that of chosen tokens", "loss")
        return
    yield Evidence(
        "loss",
        "other-targets",
        f"only {share[0]:.0%} of the {count} positions in the loss are trained on their row's next "
        "token: logits and labels are of different rows or columns",
        values={"share": share[0]},
    )


def _share(rows: Sequence[TrainedRow], by: int) -> float:
    """Of trained positions, how many are trained on the token ``by`` columns after the next."""
    right = total = 0
    for row in rows:
        wanted = torch.roll(row.following, -by)
        kept = row.tokens >= 0
        right += int((row.tokens == wanted)[kept].sum())
        total += int(kept.sum())
    return right / total


def look_at_mask(case: Case) -> Iterable[Evidence]:
    """Which tokens have a weight: those of the completion up to its eos, and no others."""
    rows = _aligned(case)
    if not rows:
        return
    note_judged(case, "loss")
    prompt = [int((row.tokens[: row.lead] >= 0).sum()) for row in rows]
    if any(prompt):
        at = max(range(len(rows)), key=lambda i: prompt[i])
        yield Evidence(
            "loss",
            "prompt-in-loss",
            f"{sum(prompt)} tokens of prompts have a weight in the loss ({prompt[at]} of row "
            f"{rows[at].at}'s): the policy is trained on the question",
            row=rows[at].at,
            values={"tokens": sum(prompt)},
        )
    after = [int(row.counted[row.end :].sum()) for row in rows]
    if any(after):
        at = max(range(len(rows)), key=lambda i: after[i])
        yield Evidence(
            "loss",
            "after-eos",
            f"{sum(after)} tokens after the end of their completion have a weight in the loss "
            f"({after[at]} in row {rows[at].at}): they are padding, not sampled",
            row=rows[at].at,
            values={"tokens": sum(after), "rows": sum(map(bool, after))},
        )
        return
    yield from _left_out(case, rows)


def _left_out(case: Case, rows: Sequence[TrainedRow]) -> Iterator[Evidence]:
    term = policy_term(case)
    if term is not None and term.eos_left_out:
        ended = sum(row.ended for row in rows)
        yield Evidence(
            "loss",
            "tokens-left-out",
            f"the end-of-text token of none of the {ended} completions that ended counts: the "
            "policy never learns to stop",
            values={"tokens": ended, "rows": ended, "eos": True},
            severity="differs",
        )
        return
    if later_update(case):
        return  # clipping removes tokens as well
    missing = [int((~row.counted[: row.end]).sum()) for row in rows]
    if any(missing):
        at = max(range(len(rows)), key=lambda i: missing[i])
        first = int((~rows[at].counted[: rows[at].end]).nonzero()[0])
        yield Evidence(
            "loss",
            "tokens-left-out",
            f"{sum(missing)} sampled tokens have no weight in the loss, the first being token "
            f"{first} of row {rows[at].at}, although others of their completions have one",
            row=rows[at].at,
            values={"tokens": sum(missing), "rows": sum(map(bool, missing))},
            severity="differs",
        )


def _aligned(case: Case) -> list[TrainedRow]:
    """Rows that have a weight, with each weight at the token it was read as."""
    rows = [row for row in trained_rows(case) if bool((row.tokens >= 0).any())]
    if not rows or _share(rows, 0) >= _SHARE:
        return rows
    by = next((by for by in (1, -1) if _share(rows, by) >= _SHARE), None)
    return [] if by is None else [row.moved(by) for row in rows]


def look_at_temperature(case: Case) -> Iterable[Evidence]:
    """The temperature in the loss, compared with that of sampling."""
    rows = [row for row in trained_rows(case) if bool((row.tokens >= 0).any())]
    read = torch.cat([row.temperature[row.tokens >= 0] for row in rows]) if rows else torch.empty(0)
    read = read[read.isfinite()]
    sampled = {temperature_of(row.completion.call) for row in rows}
    if not len(read) or len(sampled) != 1:
        return
    note_judged(case, "completion")
    [wanted] = sampled
    found = float(read.median())
    call = rows[0].completion.call
    allowed = _WARM if all(row.unexplained <= CLEAN for row in rows) else 10 * _WARM
    if call.config.get("do_sample", False) and not math.isclose(found, wanted, rel_tol=allowed):
        yield Evidence(
            "completion",
            "temperature-differs",
            f"completions were sampled at temperature {wanted:g} and are scored at {found:.3g} in "
            "the loss: the ratio is not 1 on the policy's own samples",
            values={"sampled": wanted, "scored": round(found, 4)},
            severity="breaks" if abs(math.log(found / wanted)) > math.log(_FAR) else "differs",
        )


def look_at_terms(case: Case) -> Iterable[Evidence]:
    """What is no function of the chosen tokens' logprobs: an entropy bonus, a KL over the whole
    vocabulary."""
    rows = [row for row in trained_rows(case) if row.is_float32]
    if not rows or all(row.unexplained <= CLEAN for row in rows):
        return
    left = max(row.unexplained for row in rows)
    yield Evidence(
        "loss",
        "another-term",
        f"{left:.2g} of the loss's gradient is no function of the sampled tokens' "
        "log-probabilities: an entropy bonus, or a term over the whole vocabulary, is in",
        values={"residual": left},
        severity="differs",
    )


# --------------------------------------------------------------------------- advantages


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
        yield from _broadcast(known)
        note_missing(
            case,
            "the loss's weights vary along completions in a way that nothing recorded explains",
            "advantage",
        )
        return
    found = sound_accounts(known) or _of_sequences(case, known)
    if found:
        note_judged(case, "advantage", "loss")
        yield from _recipe(case, known, found)
        yield from _divided(case, known, found)
        return
    wrong = list(wrong_accounts(known))
    if wrong or weighted_accounts(known):
        note_judged(case, "advantage", "loss")
        if wrong and not (wrong[0].base == "other groups" and misplaced(case)):
            yield _wrong(known, wrong)
        return
    pair = None if misplaced(case) else against_rewards(known)
    if pair is None:
        note_missing(case, "how rewards became the loss's weights could not be told", "advantage")
        return
    note_judged(case, "advantage")
    one, other = (known.at[at] for at in pair)
    rewards = known.rewarded.total
    yield Evidence(
        "advantage",
        "weights-against-rewards",
        f"of two completions of one prompt with rewards {float(rewards[one]):.4g} and "
        f"{float(rewards[other]):.4g} the loss makes the first less likely and the second more: "
        "its weights do not come from the recorded rewards",
        row=known.rows[pair[0]].at,
        values={"rewards": rewards.tolist(), "weights": known.term.weights.tolist()},
    )


def _of_sequences(case: Case, known: Reading) -> list[Account]:
    """Accounts of weights that are each multiplied by its sequence's ratio, where not clipped."""
    live = [at for at, weight in enumerate(known.term.weights) if float(weight)]
    olds = [known_of(case, known.rows[at]).old for at in live]
    if not later_update(case) or len(live) < 2 or not all(olds):
        return []
    for name in ("logprobs", "sampling_logprobs"):
        ratios = torch.stack([(-old[name]).mean().exp() for old in olds if name in old])
        if len(ratios) == len(live):
            term = replace(known.term, weights=known.term.weights[live] / ratios)
            rows = tuple(known.rows[at] for at in live)
            at = tuple(known.at[one] for one in live)
            if found := sound_accounts(replace(known, rows=rows, at=at, term=term)):
                return found
    return []


def _silent(case: Case, known: Reading) -> Iterator[Evidence]:
    """No weight at all, although rewards differ."""
    total, groups = known.rewarded.total, known.rewarded.groups
    values = advantages(total, groups, "group", "none", True, 0.0)
    # a later update may be clipped as a whole
    if later_update(case) or not bool(values[list(known.at)].any()):
        return
    note_judged(case, "advantage")
    yield Evidence(
        "advantage",
        "no-signal",
        f"the rewards of one prompt's completions differ ({_listed(total)}), and every weight in "
        "the loss is exactly 0: nothing is learnt from them",
        values={"rewards": total.tolist()},
    )


def _listed(values: Tensor) -> str:
    shown = ", ".join(f"{float(v):.3g}" for v in values[:8])
    return f"[{shown}{', …' if len(values) > 8 else ''}]"


def _recipe(case: Case, known: Reading, found: Sequence[Account]) -> Iterator[Evidence]:
    """A scale that is not the reference's, where no other gives the weights."""
    scales = {account.scale for account in found}
    settled = _settled(case, known, found)
    told = {account.scale for account in settled} if settled else scales
    if "group" in told or len(told) != 1:
        return
    [scale] = told
    set_to = str(settings_of(case).get("scale_rewards", "")).lower()
    if {"true": "group", "false": "none"}.get(set_to, set_to) == scale:
        return
    how = {
        "batch": "divided by the standard deviation of the whole batch's rewards instead of their "
        "group's",
        "none": "not divided by a standard deviation",
    }[scale]
    yield Evidence(
        "advantage",
        "scale-differs",
        f"the advantages in the loss are reward - mean of the group, {how}: so divided the rewards "
        f"{_listed(known.rewarded.total)} give every completion's weight",
        values={"scale": scale},
        severity="differs",
    )


def _settled(case: Case, known: Reading, found: Sequence[Account]) -> list[Account]:
    """The accounts whose factor is that of a known normaliser, and not any number."""
    exact = [a for a in found if any(math.isclose(a.factor * n, 1, rel_tol=0.01)
             for n in _normalisers(case, known, a.divisor).values())]  # fmt: skip
    return exact


def _normalisers(case: Case, known: Reading, divisor: str) -> dict[str, float]:
    """What a sound loss divides by, beside the length where that is the divisor."""
    rows, ranks = len(known.rows), _ranks(case)
    parts = len({row.part for row in known.rows})
    tokens = float(known.lengths.sum())
    if divisor == "sequence":
        return {"rows": rows / ranks}
    widths = [row.end for row in known.rows]
    longest = max((len(row.completion.ids) for row in known.rows), default=max(widths))
    limit = settings_of(case).get("max_completion_length") or known.rows[
        0
    ].completion.call.config.get("max_new_tokens")
    found = {"tokens": tokens / ranks, "padded tokens": rows * longest / ranks}
    if isinstance(limit, int) and limit:
        found["rows times the longest allowed"] = rows * limit / ranks
    if parts > 1 and len(set(_of_parts(known))) == 1:
        found["tokens of each micro-batch"] = _of_parts(known)[0] * parts / ranks
    return found


def _of_parts(known: Reading) -> list[float]:
    """Tokens of each micro-batch."""
    found: dict[int, float] = {}
    for row, length in zip(known.rows, known.lengths.tolist(), strict=True):
        found[row.part] = found.get(row.part, 0.0) + length
    return list(found.values())


def _ranks(case: Case) -> int:
    number = case.trace.header.get("ranks", "1")
    return int(number) if number.isdigit() else 1


def _divided(case: Case, known: Reading, found: Sequence[Account]) -> Iterator[Evidence]:
    """Micro-batches that were added up without being divided by their number."""
    parts = len({row.part for row in known.rows})
    if parts < 2 or not has_parts(case) or _settled(case, known, found):
        return
    for account in found:
        for name, divisor in _normalisers(case, known, account.divisor).items():
            if math.isclose(account.factor * divisor, parts, rel_tol=0.01):
                yield _undivided(parts, f"of {len(known.rows)} completions divided by its {name}")
                return
    told = {(account.divisor, account.scale) for account in found}
    # one number for all rows may be any
    if told == {("sequence", "group")}:
        times = [1 / (a.factor * len(known.rows) / _ranks(case)) for a in found]
        whole = next((t for t in times if 1.5 < t < 8.5 and abs(t - round(t)) < 0.01 * t), None)
        if whole is not None:
            yield Evidence(
                "gradient",
                "accumulation-differs",
                f"the loss is averaged over {round(whole) * parts} micro-batches, by its weights "
                f"on tokens, and {parts} were added up before the optimizer's step",
                values={"told": round(whole) * parts, "losses": parts},
            )


def _undivided(parts: int, how: str) -> Evidence:
    return Evidence(
        "loss",
        "accumulation-undivided",
        f"the weights of the step's {parts} micro-batches are {parts} times those of one batch "
        f"{how}: each micro-batch's loss was averaged by itself, and their sum was not divided by "
        "their number",
        values={"parts": parts, "told": 1, "losses": parts},
    )


def _wrong(known: Reading, wrong: Sequence[Account]) -> Evidence:
    account = wrong[0]
    listed = _listed(known.rewarded.total)
    if account.order is None:
        how, said = {
            "batch": ("by-batch", "the mean of the whole batch instead of their group's"),
            "nothing": ("unnormalised", "nothing: no mean is subtracted"),
            "other groups": ("by-row-order", "the mean of other groups than their prompt's"),
        }[account.base]
        return Evidence(
            "advantage",
            "advantage-differs",
            f"the weights in the loss are those of rewards {listed} compared with {said}",
            values={"how": how, "scale": account.scale},
            severity="differs" if how == "unnormalised" else "breaks",
        )
    if account.order.name == "negated":
        return Evidence(
            "loss",
            "advantages-negated",
            f"the weights in the loss are the advantages of the rewards {listed} with the opposite "
            "sign: higher-rewarded completions are made less likely",
            values={"factor": account.factor},
        )
    others = {a.order.name for a in wrong if a.order is not None} - {account.order.name}
    return Evidence(
        "advantage",
        "advantages-of-other-rows",
        f"the weights in the loss are the advantages of the rewards {listed} "
        f"{account.order.sentence}: completions are trained by other completions' rewards"
        + (f" (or {' or '.join(sorted(others))})" if others else ""),
        values={"reproduced": [account.order.name], **account.order.values},
    )


def _broadcast(known: Reading) -> Iterator[Evidence]:
    """Token ``t`` has the advantage of another completion: (N,) met (N, C) without a new axis."""
    total, rows = known.rewarded.total, known.rows
    if len(rows) < 3 or sorted(known.at) != list(range(len(total))):
        return
    values = advantages(total, known.rewarded.groups, "group", "group", True, 1e-4)
    for divisor in ("sequence", "uniform"):
        got, along, across = [], [], []
        for row, at, length in zip(rows, known.at, known.lengths.tolist(), strict=True):
            place = torch.arange(row.end)
            width = len(row.completion.ids)
            got.append(-row.own_weights * (length if divisor == "sequence" else 1))
            along.append(values[place % len(values)])
            across.append(values[(at * width + place) % len(values)])
        for made in (along, across):
            if multiple(torch.cat(got), torch.cat(made), known.limit) is not None:
                yield Evidence(
                    "advantage",
                    "advantage-broadcast",
                    "the advantages lie along the tokens instead of the completions: token t of "
                    f"every completion has completion t's, one after the other ({_listed(values)})",
                    values={"shape": [len(rows), max(row.end for row in rows)]},
                )
                return


# --------------------------------------------------------------------------- normaliser


def look_at_normaliser(case: Case) -> Iterable[Evidence]:
    """A mean over each micro-batch's own tokens: the loss depends on how a step is split."""
    known = reading(case)
    if known is None or known.term.varies or not has_parts(case):
        return
    parts = [row.part for row in known.rows]
    own = dict(zip(dict.fromkeys(parts), _of_parts(known), strict=True))
    if len(own) < 2 or len(set(own.values())) < 2 or sound_accounts(known):
        return
    scaled = _rescaled(known, torch.tensor([own[part] for part in parts]))
    accounts = sound_accounts(scaled)
    if not accounts:
        return
    note_judged(case, "loss")
    if any(math.isclose(account.factor, 1, rel_tol=0.01) for account in accounts):
        yield _undivided(len(own), "whose micro-batches are each divided by their own tokens")
        return
    asked = str(settings_of(case).get("loss_type", "")).lower()
    if asked == "bnpo":
        return
    counts = _listed(torch.tensor(list(own.values())))
    yield Evidence(
        "loss",
        "normaliser-of-parts",
        f"each micro-batch's loss is a mean over its own tokens ({counts}): "
        "so divided, and not by those of the step, the rewards give every completion's weight",
        values={"loss_type": asked},
        severity="breaks" if asked else "differs",
    )


def _rescaled(known: Reading, by: Tensor) -> Reading:
    return replace(known, term=replace(known.term, weights=known.term.weights * by))


LOOKS: tuple[Look, ...] = (
    look_at_backward,
    look_at_targets,
    look_at_mask,
    look_at_temperature,
    look_at_terms,
    look_at_weights,
    look_at_normaliser,
    *policies.LOOKS,
)
