"""The loss, read from its gradient: nothing of it is handed over by the loop."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from omni_grpo_core.doctor.checks import policies, weights
from omni_grpo_core.doctor.checks.policies import later_update
from omni_grpo_core.doctor.evidence import Case, Evidence, Look, note_judged, note_missing
from omni_grpo_core.doctor.loss_accounts import Account, sound_accounts
from omni_grpo_core.doctor.loss_reading import reading
from omni_grpo_core.doctor.loss_rows import (
    CLEAN,
    SHARE,
    TrainedRow,
    offset_of,
    share_of,
    trained_rows,
)
from omni_grpo_core.doctor.policy_term import CONSTANT, PolicyTerm, policy_term
from omni_grpo_core.doctor.rollouts import ids_of, temperature_of

_WARM = 0.01
"""Relative difference of two temperatures: a clean reading of bfloat16 is good to 1e-3. An entropy
bonus reads as one that is off by its share of the weights, so that ten times as much is allowed."""
_LONG = 8
"""Tokens of a completion of which a mask that keeps one was not meant."""
_OF_ENTROPY = 0.1
"""Of the positions of a step, how many an entropy acts on: half of what is common where that is of
the least certain tokens alone."""
FAR = 1.6
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
    rows = _trained(case)
    known = torch.cat([row.tokens for row in rows]) if rows else torch.empty(0)
    count = int((known >= 0).sum())
    if not count:
        return
    note_judged(case, "loss")
    share = {by: share_of(rows, by) for by in (0, 1, -1)}
    if share[0] >= SHARE:
        return
    if share[1] >= SHARE or share[-1] >= SHARE:
        early = share[1] >= SHARE
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


def look_at_mask(case: Case) -> Iterable[Evidence]:
    """Which tokens have a weight: those of the completion up to its eos, and no others."""
    by = offset_of(_trained(case))
    rows = [row.moved(by) for row in _trained(case)] if by is not None else []
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
    if any(after) and all(map(_goes_on, (row for row, n in zip(rows, after, strict=True) if n))):
        count = sum(map(bool, after))
        yield Evidence(
            "completion",
            "end-ignored",
            f"sampling did not stop at the end of {count} of {len(rows)} completions: the "
            f"{sum(after)} tokens that it drew after it have a weight in the loss",
            values={"tokens": sum(after), "rows": count},
        )
        return
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
    # a loss that is off by a column leaves out the last one
    if not by:
        yield from _left_out(case, rows)


def _goes_on(row: TrainedRow) -> bool:
    """Whether other tokens than padding, which may be an end token, follow a completion's end."""
    ends = ids_of(row.completion.call.config.get("eos_token_id"))
    return len({*row.completion.ids[row.end :]} - {*ends}) > 1


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
    if term is None or term.varies or term.ratio != "none":
        return
    # a row of no advantage has no weight where its KL has none
    live = {
        id(row.completion)
        for row, weight in zip(term.rows, term.weights, strict=True)
        if _counts(weight, term)
    }
    rows = [row for row in rows if id(row.completion) in live]
    missing = [int((~row.counted[: row.end]).sum()) for row in rows]
    if any(missing):
        if all(_is_section(row) for row, left in zip(rows, missing, strict=True) if left):
            note_missing(case, "a section of completions alone has a weight: it may be rewarded")
            return
        at = max(range(len(rows)), key=lambda i: missing[i])
        first = int((~rows[at].counted[: rows[at].end]).nonzero()[0])
        one_each = all(
            row.end - left == 1 < _LONG <= row.end for row, left in zip(rows, missing, strict=True)
        )
        yield Evidence(
            "loss",
            "tokens-left-out",
            f"{sum(missing)} sampled tokens have no weight in the loss, the first being token "
            f"{first} of row {rows[at].at}, although "
            + (
                "one of each completion has one"
                if one_each
                else "others of their completions have one"
            ),
            row=rows[at].at,
            values={"tokens": sum(missing), "rows": sum(map(bool, missing))},
            # sections, or the tokens that are least sure, are trained alone on purpose
            severity="breaks" if one_each else "differs",
        )


def _is_section(row: TrainedRow) -> bool:
    """Whether the tokens that count are one run, without the first and the last: what a reward of a
    section acts on where the completions' own advantages are 0."""
    places = row.counted[: row.end].nonzero().flatten()
    first, last = int(places[0]), int(places[-1])
    return first > 0 and last < row.end - 1 and last - first == len(places) - 1


def _counts(weight: Tensor, term: PolicyTerm) -> bool:
    return bool(weight.abs() > CONSTANT * term.weights.abs().max())


def _trained(case: Case) -> list[TrainedRow]:
    """Rows that have a weight."""
    return [row for row in trained_rows(case) if bool((row.tokens >= 0).any())]


def look_at_temperature(case: Case) -> Iterable[Evidence]:
    """The temperature in the loss, compared with that of sampling."""
    rows = _trained(case)
    read = torch.cat([row.temperature[row.tokens >= 0] for row in rows]) if rows else torch.empty(0)
    read = read[read.isfinite()]
    sampled = {temperature_of(row.completion.call) for row in rows}
    if not len(read) or len(sampled) != 1 or not all(map(math.isfinite, sampled)):
        return
    term = policy_term(case)
    if term is not None and term.varies and any(map(_is_scattered, rows)):
        # as of a softmax of a softmax, whose slope is that of one at temperature 1
        note_missing(
            case, "the temperature in the loss is not known: its weights are not explained"
        )
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
            severity="breaks" if abs(math.log(found / wanted)) > math.log(FAR) else "differs",
        )


def _is_scattered(row: TrainedRow) -> bool:
    """Whether a token of a completion has less than half of another's weight."""
    own = row.own_weights[row.counted[: row.end]].abs()
    return len(own) > 1 and bool(2 * own.min() < own.max())


def look_at_terms(case: Case) -> Iterable[Evidence]:
    """What is no function of the chosen tokens' logprobs: an entropy, a KL over the whole
    vocabulary."""
    rows = [row for row in trained_rows(case) if row.is_float32]
    with_entropy = [row for row in rows if bool(row.entropy.any())]
    # rounding is near to one at some positions
    explained = sum(int((row.entropy != 0).sum()) for row in rows)
    trained = sum(int((row.tokens >= 0).sum()) for row in rows)
    misfits = sum(int((row.residual > CLEAN).sum()) for row in rows)
    if explained > max(misfits, _OF_ENTROPY * trained):
        yield _entropy(case, with_entropy)
    left = max((row.unexplained for row in rows), default=0.0)
    if left > CLEAN:
        yield Evidence(
            "loss",
            "another-term",
            f"{left:.2g} of the loss's gradient is no function of the sampled tokens' "
            "log-probabilities, nor of an entropy: a term over the whole vocabulary is in",
            values={"residual": left},
            severity="differs",
        )


def _entropy(case: Case, rows: Sequence[TrainedRow]) -> Evidence:
    every = torch.cat([row.entropy[row.entropy != 0] for row in rows])
    kind = "bonus" if float(every.median()) < 0 else "penalty"
    known = reading(case)
    weights = [
        abs(float(torch.stack([_of_entropy(row, account) for row in rows]).median()))
        for account in (sound_accounts(known) if known is not None else ())
    ]
    said = f" of {weights[0]:.3g} beside the advantages" if weights else ""
    return Evidence(
        "loss",
        "entropy-in-loss",
        f"an entropy {kind}{said} is in the loss: a weight for the sampled token and one for the "
        f"entropy at each of {len(every)} positions give the whole gradient",
        values={"kind": kind, "weight": weights[0] if weights else None},
        severity="differs",
    )


def _of_entropy(row: TrainedRow, account: Account) -> Tensor:
    """The entropy's weight where that of the advantages is 1."""
    by = row.end if account.divisor == "sequence" else 1
    return row.entropy[row.entropy != 0].median() * by / account.factor


LOOKS: tuple[Look, ...] = (
    look_at_backward,
    look_at_targets,
    look_at_mask,
    look_at_temperature,
    look_at_terms,
    *weights.LOOKS,
    *policies.LOOKS,
)
