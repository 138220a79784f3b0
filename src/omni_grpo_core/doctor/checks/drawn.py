"""How a loop's own sampling drew its tokens: at the temperature that they are scored at?

No call says it. Of tokens that were drawn from a policy's scores at some temperature, the
likelihood is greatest at that temperature, whatever ids were left out as long as none was drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from omni_grpo_core.doctor.checks.loss import FAR
from omni_grpo_core.doctor.evidence import Case, Evidence, Look, note_judged
from omni_grpo_core.doctor.loss_rows import trained_rows
from omni_grpo_core.doctor.rollouts import first_step, temperature_of
from omni_grpo_core.doctor.teacher_forced import Replayed, log_table, replay_rollout

_TRIED = (0.01, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.4, 1.7, 2.0)
_SURE = 9.0
"""Powers of ten by which one way to draw must be likelier than another."""


def look_at_drawing(case: Case) -> Iterable[Evidence]:
    """Tokens that a loop drew by itself, by the temperature in its loss."""
    scored = _scored_at(case)
    own = [c for c in case.generated if math.isnan(temperature_of(c))] if first_step(case) else []
    known = [found for call in own if (found := replay_rollout(case, call)) is not None]
    if scored is not None and known:
        note_judged(case, "completion")
        yield from sharper(known, scored)


def sharper(known: Sequence[Replayed], scored: float) -> Iterator[Evidence]:
    """Where tokens were drawn more sharply than at the temperature ``scored``. Less sharply, they
    may come from other scores than were replayed."""
    at = {t: sum(_likelihood(one, t) for one in known) for t in (*_TRIED, scored)}
    best = max(at, key=lambda t: at[t])
    if best > scored or at[best] - at[scored] < _SURE:
        return
    most = 1 + max(map(_lowest_rank, known))
    cut = sum(_likelihood(one, scored, most) for one in known) > at[best] - 1
    count = sum(int(one.mask.sum()) for one in known)
    said = f"at temperature {best:.2g} than at the {scored:.3g} of the loss"
    if cut:
        said = f"from the {most} likeliest tokens alone than from all"
    yield Evidence(
        "completion",
        "drawn-sharper",
        f"the {count} tokens that the loop drew by itself are 1e{at[best] - at[scored]:.0f} times "
        f"likelier {said}: the loss scores them as another policy's",
        values={"k": most} if cut else {"sampled": best, "scored": round(scored, 4)},
        severity="breaks" if not cut and scored > FAR * best else "differs",
    )


def _scored_at(case: Case) -> float | None:
    """The temperature in the loss."""
    read = [row.temperature[row.tokens >= 0] for row in trained_rows(case)]
    known = torch.cat(read) if read else torch.empty(0)
    known = known[known.isfinite()]
    return float(known.median()) if len(known) else None


def _likelihood(known: Replayed, temperature: float, most: int | None = None) -> float:
    """Of all tokens, in powers of ten; from the ``most`` likeliest ones."""
    left_out = _special(known)

    def one(scores: Tensor, ids: Tensor) -> Tensor:
        table = log_table(scores[:-1].clone(), temperature, left_out)
        if most is not None:
            table = table - table.topk(most, -1).values.logsumexp(-1, keepdim=True)
        return table.gather(1, ids[:, None])[:, 0]

    terms = torch.stack(known.each_row(one))[known.mask].double()
    return float(terms[terms.isfinite()].sum()) / math.log(10)


def _lowest_rank(known: Replayed) -> int:
    left_out = _special(known)

    def one(scores: Tensor, ids: Tensor) -> Tensor:
        table = log_table(scores[:-1].clone(), 1.0, left_out)
        return (table > table.gather(1, ids[:, None])).sum(-1)

    ranks = torch.stack(known.each_row(one))[known.mask]
    return int(ranks.max()) if len(ranks) else 0


def _special(known: Replayed) -> list[int]:
    """Ids that a sampler may leave out, but for those that end a completion."""
    policy = known.policy
    added = policy.processor.tokenizer.get_added_vocab().values()
    return sorted({*added} - {*policy.eos_token_ids})


LOOKS: tuple[Look, ...] = (look_at_drawing,)
