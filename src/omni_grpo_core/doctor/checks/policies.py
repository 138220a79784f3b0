"""The loss's terms between two policies, read from its gradient: the KL to a reference, and the
ratio to the policy that sampled."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from omni_grpo_core.doctor.evidence import Case, Evidence, Look, note_judged, note_missing
from omni_grpo_core.doctor.loss_accounts import (
    mistakes,
    recipes,
    sound_accounts,
    weighted_accounts,
)
from omni_grpo_core.doctor.loss_reading import reading
from omni_grpo_core.doctor.loss_rows import trained_rows
from omni_grpo_core.doctor.policy_term import (
    PolicyTerm,
    most_beta,
    policy_term,
)
from omni_grpo_core.doctor.ratios import KINDS, Factors, is_reference, known_of, ratios_of
from omni_grpo_core.doctor.recompute_loss import beta_of
from omni_grpo_core.doctor.rollouts import first_step, joined, settings_of

_SMALL_BETA = 3e-4
"""A third of the smallest that is common."""
_ALIKE = 1e-4
"""Of two log-probabilities of one policy: rounding of batches of other sizes."""
_MOVED = 64 * torch.finfo(torch.float32).eps
"""Of a layer's weights: by how much a step moves them so that no log-probability is still equal to
the last bit; Adam at a rate of 1e-6 moves them by 5e-5, its weight decay by 1e-8."""
_CUT = 3
"""Tokens without a weight: any fewer may be on one side of a ratio by chance."""
_NARROW = 1e-3
"""A clipping range that stops a token at its first step; those in use for tokens are 0.1 and more.
"""


def later_update(case: Case) -> bool:
    """Whether the step trains on a rollout on which an earlier step trained already."""
    own = set(joined(case).completions)
    return not any(row.completion in own for row in trained_rows(case))


def look_at_the_kl_s_reference(case: Case) -> Iterable[Evidence]:
    """A KL that is in the loss and compares the policy with itself."""
    gaps = [gap for step in case.steps for gap in step.kl_gaps]
    if not gaps or first_step(case):
        return
    note_judged(case, "loss")
    # exactly: of other weights even a slight update leaves more than nothing
    if not any(gaps) and _has_learnt(case):
        yield Evidence(
            "loss",
            "reference-is-policy",
            "the loss holds a KL whose reference gives every token the policy's own "
            "log-probability, although the policy has been updated: it shares its weights, and the "
            "KL is 0 by construction",
        )


def look_at_kl(case: Case) -> Iterable[Evidence]:
    """The KL term: its sign, and whether the reference's logprobs enter the loss at all."""
    term = policy_term(case)
    if term is None:
        return
    beta = beta_of(settings_of(case))
    if term.kl is not None and _may_be_a_ratio(case, term):
        note_missing(case, "whether a KL or a ratio varies the loss's weights could not be told")
        return
    if term.kl is not None:
        note_judged(case, "loss")
        found = beta_read(case, term)
        if term.kl < 0:
            yield Evidence(
                "loss",
                "kl-subtracted",
                "along every completion the loss's weights vary as the gradient of the KL to the "
                "reference does, with the opposite sign: drifting away is rewarded",
                values={"beta": found},
            )
        elif term.estimator == "k3 turned":
            yield Evidence(
                "loss",
                "kl-turned",
                f"the KL in the loss, of weight {found:.3g}, compares the policy with the "
                "reference the other way round: along every completion the weights vary as the "
                "gradient of exp(d) - d - 1 with d = policy - reference does",
                values={"beta": found},
                severity="differs",
            )
        elif beta == 0:
            yield Evidence(
                "loss",
                "kl-hidden",
                f"a KL term of weight {found:.3g} is in the loss: with it the reference's logprobs "
                "give the weight of every token; beta is 0 in the settings",
                values={"beta": beta, "implied_beta": found},
            )
        return
    if term.varies or term.ratio in _MISTAKEN:
        return
    yield from _without_kl(case, term, beta)


def beta_read(case: Case, term: PolicyTerm) -> float:
    """beta: by the factor that makes the rows' weights advantages, else by a mean over the step."""
    known = reading(case)
    for account in sound_accounts(known) if known is not None else ():
        if account.divisor == term.divisor and account.scale == "group":
            return float(term.kl or 0.0) / account.factor
    tokens = sum(int(row.counted.sum()) for row in term.rows)
    return float(term.kl or 0.0) * (len(term.rows) if term.divisor == "sequence" else tokens)


def _without_kl(case: Case, term: PolicyTerm, beta: float | None) -> Iterator[Evidence]:
    gaps = [g for row in term.rows for g in known_of(case, row).reference.values()]
    # what scored them is in the loss, in the place of the old policy
    if not gaps or term.ratio == "reference":
        return
    largest = max(float(gap.abs().max()) for gap in gaps if len(gap))
    if not all(row.exact for row in term.rows) or first_step(case):
        return
    note_judged(case, "loss")
    if not largest and _has_learnt(case):
        yield Evidence(
            "loss",
            "reference-is-policy",
            "the reference gives every token the policy's own log-probability, although the policy "
            "has been updated: it shares its weights, and the KL is 0 by construction",
        )
    elif largest and beta != 0:
        limit = most_beta(case, term)
        slight = limit > (beta / 3 if beta else _SMALL_BETA)
        if slight or not _are_advantages(case):
            why = "it would be slight" if slight else "rewards do not give the weights"
            note_missing(case, f"whether a KL is in the loss could not be told: {why}")
            return
        along = "are all equal" if term.ratio == "none" else "follow the ratios to the old policy"
        yield Evidence(
            "loss",
            "kl-left-out",
            "a reference scored the completions, its log-probabilities differ from the policy's by "
            f"up to {largest:.2g}, and the loss's weights along every completion {along}, where a "
            f"KL of weight {limit:.1g} would show: it is computed and not in the loss",
            values={"beta": beta, "limit": limit},
        )


def _are_advantages(case: Case) -> bool:
    """Whether rewards alone give the weights of completions: a KL that was taken from them, or one
    whose slope is the same on every token, leaves none that vary along a completion."""
    known = reading(case)
    if known is None:
        return False
    ways = (known, known.of_rows(known.term.weights != 0)) if later_update(case) else (known,)
    explain = (sound_accounts, recipes, mistakes, weighted_accounts)
    return any(find(one) for one in ways for find in explain)


def _has_learnt(case: Case) -> bool:
    """Whether the step before moved the policy by more than rounding, by a loss that asked for it,
    and nothing put the weights back since: the policy's log-probabilities are others then."""
    before = case.before
    if before is None or not any(bool((row.tokens >= 0).any()) for row in trained_rows(before)):
        return False
    moved = {one.name for step in before.steps for one in step.layers if one.change > _MOVED}
    # put back, or changed by what was not recorded
    kept = {one.name for step in case.steps for one in step.layers if one.between == 0}
    return bool(moved & kept)


def look_at_passes(case: Case) -> Iterable[Evidence]:
    """Passes of the policy by itself: sound as old logprobs, and not as a reference."""
    term = policy_term(case)
    if term is None:
        return
    if later_update(case):
        yield from _later(case, term)
        return
    beta, first = beta_of(settings_of(case)), term.rows[0]
    passes = [
        forward
        for forward, owners in joined(case).scored.items()
        if first.completion in owners and not forward.modes.grad_enabled
    ]
    alone = [forward for forward in passes if not is_reference(forward)]
    if any(map(is_reference, passes)) or not alone or term.kl is not None or term.varies:
        return
    if beta or len(alone) > 1:
        yield Evidence(
            "loss",
            "reference-is-policy",
            f"{_times(len(alone))} the policy itself scored the completions without a gradient, "
            "and no other model did: as a reference it makes the KL 0 by construction"
            + (f", although beta is {beta:g}" if beta else ""),
            severity="breaks" if beta else "differs",
        )


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def _later(case: Case, term: PolicyTerm) -> Iterator[Evidence]:
    """A later update on a rollout: its ratios."""
    if _may_be_a_ratio(case, term):
        return
    olds = [known_of(case, row).old for row in term.rows if bool(row.own_weights.any())]
    gaps = [gap for old in olds for gap in old.values() if len(gap)]
    if not gaps or term.varies or not all(row.exact for row in term.rows):
        return
    note_judged(case, "loss")
    moved = min(float(gap.abs().max()) for gap in gaps)
    if term.ratio != "none" or moved < 0.02:
        return
    known = reading(case)
    if known is None or not sound_accounts(known):
        return
    yield Evidence(
        "loss",
        "old-recomputed",
        "this is a later update on a rollout; the policy's log-probabilities have moved by up to "
        f"{moved:.2g} since it was sampled, and the weights in the loss are those of a ratio of 1 "
        "on every token: the old log-probabilities are the current ones; nothing is ever clipped",
        values={"moved": moved},
    )


def _may_be_a_ratio(case: Case, term: PolicyTerm) -> bool:
    """Whether what was read as a KL beside a ratio of 1 may be a ratio: in the first rollout the
    reference is the policy that sampled it."""
    if term.kl is None or term.ratio != "none" or not later_update(case):
        return False
    known = [known_of(case, row) for row in term.rows if bool(row.own_weights.any())]
    pairs = [(one.reference[n], one.old[n]) for one in known
             for n in one.reference.keys() & one.old.keys()]  # fmt: skip
    return any(torch.allclose(new, old, rtol=0, atol=_ALIKE) for new, old in pairs)


_MISTAKEN = {
    "inverted": "exp(old - new), the ratio turned over: what became likelier counts less",
    "probability": "its own probability, which no old one divides: exp of a log-probability "
    "instead of exp of a difference",
    "logarithms": "1 by its old log-probability: log-probabilities divided by each other instead "
    "of probabilities",
    "late": "a ratio to the old log-probability of the token before it",
    "early": "a ratio to the old log-probability of the token after it",
    "other-rows": "a ratio to the old log-probability of another row's token at its place",
}


def look_at_ratios(case: Case) -> Iterable[Evidence]:
    """What tokens of one completion are weighted by, and which of them clipping leaves out."""
    term = policy_term(case)
    if term is None or term.varies:
        return
    if said := _MISTAKEN.get(term.ratio):
        note_judged(case, "loss")
        yield Evidence(
            "loss",
            "ratio-mistaken",
            f"along every completion the weight of a token is its advantage times {said}",
            values={"how": term.ratio},
        )
    elif term.ratio == "token" and term.kl is None:
        known = [known_of(case, row) for row in term.rows]
        ratios = [found for kind in KINDS if (found := ratios_of(known, kind)) is not None]
        yield from _sides(term, ratios[0])


def _sides(term: PolicyTerm, ratios: Factors) -> Iterator[Evidence]:
    """By how much the ratio of each token is on the side where its advantage pushes it: clipping
    leaves out the tokens that are far on it."""
    cut, kept = [], []
    for weight, row, ratio in zip(term.weights, term.rows, ratios, strict=True):
        further = (1 - ratio) if weight > 0 else ratio - 1
        counted = row.counted[: row.end]
        if bool(counted.any()):
            cut.append(further[~counted])
            kept.append(further[counted])
    out, left = torch.cat(cut), torch.cat(kept)
    if len(out) < _CUT or not len(left):
        return
    least, most = float(out.min()), float(out.max())
    if most < 0 and most < float(left.min()):
        yield Evidence(
            "loss",
            "clip-exchanged",
            f"{len(out)} tokens have no weight because their ratio to the old policy went against "
            f"their advantage (by {-most:.2g} or more), and none because it went along with it (by "
            f"up to {float(left.max()):.2g}): max and min are exchanged in the clipped loss",
            values={"tokens": len(out)},
        )
    elif 0 < least < _NARROW and float(left.max()) <= least:
        yield Evidence(
            "loss",
            "clip-nothing-left",
            f"{len(out)} tokens whose ratio to the old policy went along with their advantage by "
            f"as little as {least:.1g} have no weight: the range of the clipped loss is 0",
            values={"tokens": len(out), "range": least},
        )


LOOKS: tuple[Look, ...] = (look_at_the_kl_s_reference, look_at_kl, look_at_passes, look_at_ratios)
