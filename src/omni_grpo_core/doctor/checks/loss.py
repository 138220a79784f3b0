"""The loss: its mask, completions, advantages and value, each compared with its inputs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from omni_grpo_core.doctor.checks.completion import generated_rollouts
from omni_grpo_core.doctor.evidence import Case, Evidence, Look, note_judged, note_missing
from omni_grpo_core.doctor.recompute_loss import (
    Parts,
    beta_of,
    hidden_beta,
    parts_of,
    policy_terms,
    right_ways,
    wrong_ways,
)
from omni_grpo_core.doctor.rollouts import (
    LossRecord,
    completion_ids,
    ids_of,
    losses_of,
    until_end,
    world_size,
)
from omni_grpo_core.tolerances import ADVANTAGE
from omni_grpo_core.trace.calls import LossSeen


def look_at_mask(case: Case) -> Iterable[Evidence]:
    """Tokens that count in the loss: those of the completion up to its first eos, and no others."""
    for at, one in enumerate(losses_of(case)):
        ids, mask = one.loss.completion_ids, one.loss.mask
        if ids is None or mask is None:
            continue
        if mask.shape != ids.shape:
            yield Evidence(
                "loss", "mask-shape",
                f"loss {at}: a mask of shape {tuple(mask.shape)} for completions of shape "
                f"{tuple(ids.shape)}",
            )  # fmt: skip
            continue
        note_judged(case, "loss")
        prompt = _prompt_inside(one)
        if prompt is not None:
            row, counted = prompt
            yield Evidence(
                "loss",
                "prompt-in-loss",
                f"loss {at}: {counted} tokens of the prompt of row {row} count in the loss: the "
                "policy is trained on the question",
                row=row,
                values={"tokens": counted},
            )
            continue
        yield from _after_eos(case, at, one, ids.long(), mask.bool())


def _prompt_inside(one: LossRecord) -> tuple[int, int] | None:
    """(row, prompt tokens that count) where the loss's completion begins in the prompt."""
    call = None if one.rollout is None else one.rollout.generated
    ids, mask = one.loss.completion_ids, one.loss.mask
    if call is None or call.sequences is None or ids is None or mask is None:
        return None
    own = completion_ids(call)
    if own is None or len(own) != len(ids) or ids.shape[1] <= own.shape[1]:
        return None
    extra = ids.shape[1] - own.shape[1]
    tail = call.sequences[:, -ids.shape[1] :].long()
    if tail.shape != ids.shape or not torch.equal(tail[:, :extra], ids[:, :extra].long()):
        return None
    counted = mask[:, :extra].bool().sum(1)
    row = int(counted.argmax())
    return (row, int(counted[row])) if int(counted[row]) else None


def _after_eos(
    case: Case, at: int, one: LossRecord, ids: Tensor, mask: Tensor
) -> Iterator[Evidence]:
    eos = _eos(case, one)
    if not eos:
        return
    allowed = until_end(ids, eos)
    extra = mask & ~allowed
    if bool(extra.any()):
        row = int(extra.sum(1).argmax())
        yield Evidence(
            "loss",
            "after-eos",
            f"loss {at}: {int(extra.sum())} tokens after the end of their completion count "
            f"({int(extra[row].sum())} in row {row}): they are padding, not sampled",
            "inherited" if _ran_on(case, one) else "added",
            row=row,
            values={"tokens": int(extra.sum()), "rows": int(extra.any(1).sum())},
        )
    missing = allowed & ~mask
    # a whole row may be left out on purpose: unscored or truncated
    missing &= mask.any(1, keepdim=True)
    if bool(missing.any()) and not bool(extra.any()):
        row = int(missing.sum(1).argmax())
        yield Evidence(
            "loss",
            "tokens-left-out",
            f"loss {at}: {int(missing.sum())} sampled tokens do not count, the first being token "
            f"{int(missing[row].nonzero()[0])} of row {row}",
            row=row,
            values={"tokens": int(missing.sum()), "rows": int(missing.any(1).sum())},
        )


def _eos(case: Case, one: LossRecord) -> Sequence[int]:
    if case.reference is not None:
        return case.reference.policy.eos_token_ids
    call = None if one.rollout is None else one.rollout.generated
    return () if call is None else ids_of(call.config.get("eos_token_id"))


def _ran_on(case: Case, one: LossRecord) -> bool:
    """Whether generate did not stop at one of the checkpoint's eos ids."""
    call = None if one.rollout is None else one.rollout.generated
    if call is None:
        return False
    return not set(_eos(case, one)) <= set(ids_of(call.config.get("eos_token_id")))


def look_at_completions(case: Case) -> Iterable[Evidence]:
    """The ids in the loss, compared with those sampled."""
    per_call = [completion_ids(call) for _, call in generated_rollouts(case)]
    sampled = [row for ids in per_call if ids is not None for row in ids]
    for at, one in enumerate(losses_of(case)):
        call = None if one.rollout is None else one.rollout.generated
        ids = one.loss.completion_ids
        own = None if call is None else completion_ids(call)
        if ids is None or own is None or one.loss.mask is None or one.loss.mask.shape != ids.shape:
            continue
        if _prompt_inside(one) is not None:
            continue
        width = min(ids.shape[1], own.shape[1])
        counted = one.loss.mask.bool()[:, :width]
        known = [tuple(row.tolist()) for row in sampled if len(row) >= width]
        strange = [
            row
            for row, kept in enumerate(counted)
            if not any(
                torch.equal(ids[row, :width].long()[kept], torch.tensor(other[:width])[kept])
                for other in known
            )
        ]
        if strange:
            yield Evidence(
                "loss",
                "ids-differ",
                f"loss {at}: {len(strange)} of {len(ids)} completions in the loss were not "
                f"sampled in this step, the first in row {strange[0]}",
                "unknown",
                row=strange[0],
                values={"rows": strange},
            )


def look_at_advantages(case: Case) -> Iterable[Evidence]:
    """Advantages in the loss, compared with those computed."""
    for at, one in enumerate(losses_of(case)):
        seen = None if one.rollout is None else one.rollout.advantage
        given = one.loss.advantages
        if seen is None or given is None:
            continue
        if given.ndim == 2 and seen.advantages.ndim == 1 and len(given) == len(seen.advantages):
            yield from _spread_wrong(at, given.double(), seen.advantages.double(), one.loss.mask)
        if given.shape != seen.advantages.shape:
            continue
        made = seen.advantages.double().nan_to_num()
        used = given.double().nan_to_num()
        size = ADVANTAGE * max(float(made.abs().max()), 1e-3)
        if bool(((used - made).abs() <= size).all()):
            continue
        if bool(((used + made).abs() <= size).all()):
            yield Evidence(
                "loss", "advantages-negated",
                f"loss {at}: its advantages have the opposite sign of the computed ones: "
                "higher-rewarded completions are made less likely",
            )  # fmt: skip
        elif not _reordered(used, made):
            yield Evidence(
                "loss", "advantages-changed",
                f"loss {at}: its advantages differ from those computed from the rewards by up to "
                f"{float((used - made).abs().max()):.3g}",
            )  # fmt: skip


def _spread_wrong(at: int, given: Tensor, made: Tensor, mask: Tensor | None) -> Iterator[Evidence]:
    """One advantage per completion, expanded over tokens: every token has its own row's."""
    counted = torch.ones_like(given, dtype=torch.bool) if mask is None else mask.bool()
    if counted.shape != given.shape or given.shape[1] == 1:
        return
    off = counted & ((given - made[:, None]).abs() > ADVANTAGE * (1 + made.abs()[:, None]))
    if not bool(off.any()):
        return
    row, token = off.nonzero()[0].tolist()
    others = (made - given[row, token]).abs() <= ADVANTAGE
    owner = int(others.nonzero()[0]) if bool(others.any()) else None
    yield Evidence(
        "advantage",
        "advantage-broadcast",
        f"loss {at}: token {token} of completion {row} has the advantage "
        f"{float(given[row, token]):.3g}"
        + ("" if owner is None else f", that of completion {owner},")
        + f" instead of its own completion's {float(made[row]):.3g}; {int(off.sum())} of "
        f"{int(counted.sum())} tokens are off",
        row=row,
        values={"tokens": int(off.sum()), "owner": owner, "shape": list(given.shape)},
    )


def _reordered(used: Tensor, made: Tensor) -> bool:
    """Whether completions were only shuffled over micro-batches."""
    if used.ndim != 1:
        return False
    return bool(torch.allclose(used.sort().values, made.sort().values, rtol=ADVANTAGE, atol=1e-6))


def look_at_value(case: Case) -> Iterable[Evidence]:
    """The loss itself, recomputed by the rule in its settings."""
    step = [one.loss for one in losses_of(case)]
    for at, loss in enumerate(step):
        if not math.isfinite(loss.loss):
            yield _not_finite(at, loss)
            continue
        parts = parts_of(loss, step)
        if parts is None or _needs_unrecorded(case, loss, parts):
            continue
        note_judged(case, "loss")
        right = right_ways(parts)
        if not right and policy_terms(parts) is None:
            pass
        elif any(made.fits(loss.loss) for made in right):
            continue
        yield from _explained(at, loss, parts)


def _needs_unrecorded(case: Case, loss: LossSeen, parts: Parts) -> bool:
    """Whether the loss depends on more than was recorded: other processes' tokens, an engine's
    logprobs, ratios of whole sequences."""
    level = loss.settings.get("importance_sampling_level")
    kind = parts.config.loss_type
    why = {
        "tokens of other processes": world_size(case) > 1 and kind in ("dapo", "cispo"),
        "a rollout engine's logprobs": bool(loss.settings.get("use_vllm")),
        "ratios of whole sequences": level == "sequence" and kind != "gspo",
    }
    for name, takes_part in why.items():
        if takes_part:
            note_missing(case, f"the loss depends on {name}: it was not recomputed")
    return any(why.values())


def _not_finite(at: int, loss: LossSeen) -> Evidence:
    given = {
        "logprobs": loss.logprobs,
        "old logprobs": loss.old_logprobs,
        "advantages": loss.advantages,
    }
    broken = [
        name for name, t in given.items() if t is not None and not bool(torch.isfinite(t).all())
    ]
    return Evidence(
        "loss",
        "not-finite",
        f"loss {at} is {loss.loss}"
        + (f": its {', '.join(broken)} were already non-finite" if broken else ""),
        "inherited" if "advantages" in broken else "added",
        values={"broken": broken},
    )


def _explained(at: int, loss: LossSeen, parts: Parts) -> Iterator[Evidence]:
    wanted = next(iter(right_ways(parts)), None)
    found = [made for made in wrong_ways(parts) if made.fits(loss.loss)]
    way = found[0].way if found else ""
    implied = hidden_beta(parts, loss.loss)
    if way == "broadcast" and wanted is None:
        found, way = [], ""
    why = {
        "sign": "it has the opposite sign: higher-rewarded completions are made less likely",
        "kl-sign": "its KL term is subtracted: drifting away is rewarded",
        "kl-left-out": "its KL term is missing",
        "normaliser": "the same sum is divided by another number of tokens or rows",
        "broadcast": "advantages are broadcast along tokens instead of completions",
    }.get(way, "")
    values = {
        "loss": loss.loss,
        "wanted": None if wanted is None else wanted.value,
        "way": way,
        "beta": beta_of(loss.settings),
        "implied_beta": implied,
        "loss_type": parts.config.loss_type,
        "losses": len(parts.whole),
    }
    stage_is_advantage = way == "broadcast"
    yield Evidence(
        "advantage" if stage_is_advantage else "loss",
        "advantage-broadcast" if stage_is_advantage else "loss-differs",
        f"loss {at} is {loss.loss:.6g}; its own logprobs, advantages and mask give "
        f"{'nothing' if wanted is None else f'{wanted.value:.6g}'} as {parts.config.loss_type}"
        + (f": {why}" if why else ""),
        values=values,
    )


LOOKS: tuple[Look, ...] = (
    look_at_mask,
    look_at_completions,
    look_at_advantages,
    look_at_value,
)
