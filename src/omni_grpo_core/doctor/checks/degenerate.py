"""Garbage and its origin: likely under the recorded prompt, or impossible."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from omni_grpo_core.doctor.checks.completion import generated_rollouts
from omni_grpo_core.doctor.evidence import Case, Evidence, Look, Origin, note_judged
from omni_grpo_core.doctor.rollouts import (
    completion_ids,
    first_step,
    ids_of,
    temperature_of,
    until_end,
)
from omni_grpo_core.doctor.teacher_forced import Replayed, log_table, replay_rollout
from omni_grpo_core.rewards.degenerate import degenerate
from omni_grpo_core.trace.calls import GenerateCall

IMPOSSIBLE = 9.0
"""Powers of ten. Tokens sampled from the reference's distribution give this much evidence against
it at most once in a thousand million rollouts."""


def look_at_garbage(case: Case) -> Iterable[Evidence]:
    """Degenerate completions, by raw ids."""
    if case.reference is None:
        return
    policy = case.reference.policy
    for _, call in generated_rollouts(case):
        ids = completion_ids(call)
        if ids is None:
            continue
        eos = ids_of(call.config.get("eos_token_id")) or policy.eos_token_ids
        kept = until_end(ids, eos)
        note_judged(case, "completion")
        reasons = []
        for row, mask in zip(ids.tolist(), kept.tolist(), strict=True):
            tokens = [token for token, own in zip(row, mask, strict=True) if own]
            ended = bool(tokens) and tokens[-1] in eos
            found = degenerate(
                tokens,
                policy.decode(tokens[:-1] if ended else tokens),
                finish_reason="stop" if ended else "length",
                eos_ids=eos,
            )
            reasons.append(found[0] if found else "")
        bad = [row for row, reason in enumerate(reasons) if reason]
        if 2 * len(bad) < len(ids):
            continue
        yield Evidence(
            "completion",
            "degenerate",
            f"{len(bad)} of {len(ids)} completions are degenerate; completion {bad[0]}: "
            f"{reasons[bad[0]]}",
            _origin(case, call),
            row=bad[0],
            values={"rows": bad, "reasons": [reason for reason in reasons if reason]},
        )


def _origin(case: Case, call: GenerateCall) -> Origin:
    """``inherited`` where the checkpoint itself is likely to give such garbage on this prompt."""
    if not first_step(case):
        return "unknown"
    against = against_reference(case, call)
    if against is None:
        return "unknown"
    return "added" if against > IMPOSSIBLE else "inherited"


def look_at_likelihood(case: Case) -> Iterable[Evidence]:
    """Without generate's own logprobs: whether the checkpoint could have sampled these tokens."""
    if not first_step(case):
        return
    for _, call in generated_rollouts(case):
        if call.logprobs is not None or not call.config.get("do_sample", False):
            continue
        against = against_reference(case, call)
        if against is None or against <= IMPOSSIBLE:
            continue
        yield Evidence(
            "completion",
            "tokens-impossible",
            "the checkpoint would sample these completions of the recorded prompt once in "
            f"1e{against:.0f} rollouts: they came from other weights, or without their context",
            values={"powers_of_ten": against},
        )


def against_reference(case: Case, call: GenerateCall) -> float | None:
    """Evidence of the sampled tokens against the reference's distribution, in powers of ten.

    An e-value: for tokens drawn from p, the product over tokens of p(x)^-1/2 / sum_v p(v)^1/2 has
    mean 1, so it exceeds 10^k with probability at most 10^-k, however long the completions are and
    wherever they end (Ville's inequality).
    """
    known = replay_rollout(case, call)
    temperature = temperature_of(call)
    if known is None or not math.isfinite(temperature):
        return None
    return evidence_against(known, temperature, ids_of(call.config.get("suppress_tokens")))


def evidence_against(known: Replayed, temperature: float, suppressed: Sequence[int]) -> float:
    """As :func:`against_reference`, over all rows."""

    def one(scores: Tensor, ids: Tensor) -> Tensor:
        table = log_table(scores[:-1], temperature, suppressed)
        chosen = table.gather(1, ids[:, None])[:, 0]
        return -0.5 * chosen - (0.5 * table).logsumexp(-1)

    terms = torch.stack(known.each_row(one)).double()
    # a single id of probability 0 is enough
    terms = torch.nan_to_num(terms, posinf=1e3)
    return float(terms[known.mask].sum()) / math.log(10)


LOOKS: tuple[Look, ...] = (look_at_garbage, look_at_likelihood)
