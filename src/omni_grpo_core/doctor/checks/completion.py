"""What a rollout's settings, ids and texts show without a forward."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from omni_grpo_core.core.policy import Policy
from omni_grpo_core.doctor.asked import asked, golds_of
from omni_grpo_core.doctor.continuity import look_at_edges
from omni_grpo_core.doctor.evidence import (
    Case,
    Evidence,
    Look,
    note_judged,
    note_missing,
    quoted,
)
from omni_grpo_core.doctor.rollouts import (
    Completion,
    RolloutRecord,
    cached_twice,
    completion_ids,
    ids_of,
    joined,
    prompt_length,
    rollouts,
    until_end,
)
from omni_grpo_core.trace.calls import GenerateCall

_HOT = 1.2
"""Temperature of sampling by that of scoring, from which tokens are drawn that the policy would
not."""
_MILD = 1.1
"""A repetition penalty up to which published generation configs go."""
_PIXELS = {"pixel_values": "image_grid_thw", "pixel_values_videos": "video_grid_thw"}


def generated_rollouts(case: Case) -> Iterator[tuple[RolloutRecord, GenerateCall]]:
    """Every rollout that generated, and the call."""
    for rollout in rollouts(case):
        for call in rollout.generates:
            yield rollout, call


def look_at_error(case: Case) -> Iterable[Evidence]:
    """A generate that raised. Its input may be the reason, so the origin is unknown."""
    for _, call in generated_rollouts(case):
        if call.error is not None:
            yield Evidence(
                "completion", "generate-raised", f"generate raised {call.error}",
                "inherited" if _poisoned(case) else "unknown",
                values={"error": call.error},
            )  # fmt: skip


def look_at_history(case: Case) -> Iterable[Evidence]:
    """Later decoding steps that saw neither the prompt nor the tokens before them, or the prompt
    more than once."""
    for _, call in generated_rollouts(case):
        if None in call.cached:
            note_missing(
                case,
                "whether generate saw prompt and history is unknown: its model's key-value cache "
                "has an unknown name",
            )
        if any(held is not None for held in call.cached):
            note_judged(case, "completion")
        if cached_twice(call):
            yield Evidence(
                "completion",
                "history-twice",
                f"at the second of {len(call.cached) + 1} decoding steps the model saw "
                f"{call.cached[0]} tokens before the newest one, where the prompt has "
                f"{prompt_length(call)}: every step adds all tokens to the cache again "
                f"(use_cache={call.config.get('use_cache')})",
                values={"seen": call.cached[0], "prompt": prompt_length(call)},
            )
        blind = [step for step, held in enumerate(call.cached, 1) if held == 0]
        if not blind:
            continue
        mode = "train mode" if call.modes.training else "eval mode"
        with_checkpointing = "on" if call.modes.checkpointing else "off"
        yield Evidence(
            "completion",
            "history-lost",
            f"in {len(blind)} of {len(call.cached)} decoding steps after the first, from token "
            f"{blind[0] + 1} on, the model saw only the newest token: no prompt, no history "
            f"({mode}, gradient checkpointing {with_checkpointing})",
            values={
                "blind_steps": len(blind),
                "steps": len(call.cached),
                "training": call.modes.training,
                "checkpointing": call.modes.checkpointing,
                "use_cache": call.config.get("use_cache", True),
            },
        )


def look_at_eos(case: Case) -> Iterable[Evidence]:
    """Completions that go on after a token with which the checkpoint ends one.

    A setting that leaves out an eos is no fault where none is sampled.
    """
    for _, call in generated_rollouts(case):
        given = ids_of(call.config.get("eos_token_id"))
        note_judged(case, "completion")
        ids = completion_ids(call)
        known = given if case.reference is None else case.reference.policy.eos_token_ids
        left_out = [i for i in known if i not in given]
        stops = {"stopping_criteria", "stop_strings"} & call.keywords.keys()
        if not given and not known and not stops:
            yield _no_eos(call, "nothing ends a completion before the cap")
        if ids is None or not left_out:
            continue
        ended = torch.isin(ids, torch.tensor(given, dtype=ids.dtype)).any(1)
        passed = torch.isin(ids, torch.tensor(left_out, dtype=ids.dtype)) & until_end(ids, given)
        # one in the last place may be where something else stopped it
        on = passed[:, :-1].any(1)
        if not on.any() or case.reference is None:
            continue
        policy = case.reference.policy
        many = 2 * int(on.sum()) >= int((on | ended).sum())
        how = f"{int(on.sum())} of {len(ids)} completions go on after {_named(policy, left_out)}"
        if not given:
            yield _no_eos(call, f"{how}, to the cap")
            continue
        yield Evidence(
            "completion",
            "eos-left-out",
            f"{how}, with which the checkpoint ends one: generate ends it only at "
            f"{_named(policy, given)}",
            values={"eos": list(given), "left_out": left_out},
            severity="breaks" if many else "differs",
        )


def _no_eos(call: GenerateCall, what: str) -> Evidence:
    cap = call.config.get("max_new_tokens")
    return Evidence(
        "completion",
        "eos-unset",
        f"generate has no eos_token_id: {what} of {cap} tokens",
        values={"eos": [], "cap": cap},
    )


def look_at_tokens(case: Case) -> Iterable[Evidence]:
    """Special and media tokens among the sampled ids: a run works with a few of them, unless the
    scoring forward fails on one."""
    if case.reference is None:
        return
    policy = case.reference.policy
    tokenizer = policy.processor.tokenizer
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special -= set(policy.eos_token_ids)
    media = set(_media_ids(policy))
    raised = [call.error for call in case.forwards if call.error is not None]
    named = {int(number) for error in raised for number in re.findall(r"\d+", error)}
    broken = bool(named & (special | media))  # such as one that closes another
    for _, call in generated_rollouts(case):
        ids = completion_ids(call)
        if ids is None:
            continue
        eos = ids_of(call.config.get("eos_token_id"))
        sampled = until_end(ids, eos)
        # tokens after the first eos of any kind are another fault
        sampled &= until_end(ids, policy.eos_token_ids)
        for fact, what, wanted in (
            ("media-token", "a media placeholder", media),
            ("special-token", "a special token", special - media),
        ):
            found = [
                (row, at, int(ids[row, at]))
                for row, at in sampled.nonzero().tolist()
                if int(ids[row, at]) in wanted
            ]
            if not found:
                continue
            row, at, token = found[0]
            yield Evidence(
                "completion",
                fact,
                f"{len({r for r, _, _ in found})} of {len(ids)} completions contain {what}; the "
                f"first is {_named(policy, [token])} at token {at} of completion {row}",
                row=row,
                values={
                    "found": [list(f) for f in found[:20]],
                    "suppressed": token in ids_of(call.config.get("suppress_tokens")),
                },
                severity="breaks" if (raised and token in media) or broken else "differs",
            )


def look_at_texts(case: Case) -> Iterable[Evidence]:
    """Special tokens that were sampled are in the texts that rewards get."""
    ends = r"<\|im_end\|>|<\|endoftext\|>"
    if case.reference is not None:
        policy = case.reference.policy
        ends = "|".join(re.escape(policy.decode([i])) for i in policy.eos_token_ids)
    for call, entries in zip(case.rewards, joined(case).entries, strict=True):
        for text, completion in zip(call.completions, entries, strict=False):
            if completion is None or len(completion.texts) < 2:
                continue
            kept, skipped = (one.strip() for one in completion.texts[:2])
            # what follows an eos is another fault
            stray = re.search(r"<\|[^|>]+\|>", re.split(ends, kept)[0])
            if stray and text.strip() == skipped:
                yield Evidence(
                    "completion",
                    "specials-stripped",
                    f"completion {completion.at} was sampled as {quoted(kept)} and passed to "
                    f"rewards as {quoted(text)}: special tokens were stripped before any reward "
                    "saw them",
                    row=completion.at,
                    values={"sampled": kept, "handed_on": text},
                    severity="differs",
                )
                return


def look_at_identical(case: Case) -> Iterable[Evidence]:
    """Groups of identical completions, which should have been sampled. A greedy completion that is
    only a baseline is not trained on."""
    step = joined(case)
    trained = {
        completion
        for forward, rows in step.scored.items()
        if forward.modes.grad_enabled
        for completion in rows
        if completion is not None
    }
    groups: dict[int, list[Completion]] = {}
    for completion in step.completions:
        unclear = any(held is None for held in completion.prompt.media.values())
        if not unclear and (not trained or completion in trained):
            groups.setdefault(completion.group, []).append(completion)
    many = [members for members in groups.values() if len(members) > 1]
    if not many or any(len({one.sampled for one in members}) > 1 for members in many):
        return
    repeated = [one for members in many for one in members[1:]]
    sampling = any(one.call.config.get("do_sample", False) for one in repeated)
    chance = _chance(repeated)
    if sampling and (chance is None or chance > 1e-6):
        return
    reason = (
        f"by chance this happens once in {1 / max(chance or 0, 1e-300):.0e} rollouts"
        if sampling
        else "do_sample is off: greedy decoding gives the same text every time"
    )
    yield Evidence(
        "completion",
        "identical",
        f"in each of the {len(many)} groups all {len(many[0])} completions are identical; {reason}",
        values={"do_sample": sampling, "groups": len(many), "size": len(many[0])},
    )


def _chance(repeated: Sequence[Completion]) -> float | None:
    """Probability that all of these are sampled again, from their tokens' own logprobs."""
    total = 0.0
    for one in repeated:
        logprobs = one.call.logprobs
        if logprobs is None or one.at >= len(logprobs):
            return None
        total += float(logprobs[one.at, : one.end].sum())
    return math.exp(total)


def _poisoned(case: Case) -> bool:
    """Whether the step before was made with a loss or gradient that is no number: its weights are
    none either."""
    steps = () if case.before is None else case.before.steps
    return any(
        not math.isfinite(value)
        for step in steps
        for value in (*step.losses, *step.grad_norms.values())
    )


def look_at_cap(case: Case) -> Iterable[Evidence]:
    """Every completion is stopped by the cap. Where rewards of a group differ all the same, that
    may be meant so."""
    step = joined(case)
    groups: dict[int, set[str]] = {}
    for completion in step.completions:
        paid = str(sorted(step.rewards_of(completion).items()))
        groups.setdefault(completion.group, set()).add(paid)
    taught = any(len(paid) > 1 for paid in groups.values()) or not step.rewards
    shortest = _shortest_gold(case)
    for _, call in generated_rollouts(case):
        ids = completion_ids(call)
        eos = ids_of(call.config.get("eos_token_id"))
        cap = call.config.get("max_new_tokens")
        if ids is None or len(ids) < 2 or not eos or (cap is not None and ids.shape[1] < int(cap)):
            continue
        ended = torch.isin(ids, torch.tensor(eos, dtype=ids.dtype)).any(1)
        if ended.any():
            continue
        if banned := _never_ends(call.config, eos, ids.shape[1]):
            yield Evidence(
                "completion",
                "end-banned",
                f"all {len(ids)} completions reached the cap of {ids.shape[1]} tokens: {banned}",
                values={"why": banned, "cap": ids.shape[1]},
            )
        else:
            yield Evidence(
                "completion",
                "all-capped",
                f"all {len(ids)} completions reached the cap of {ids.shape[1]} tokens; none ended "
                "before it"
                + (f"; the shortest gold completion has {shortest}" if shortest else "")
                + ("" if taught else "; no reward tells those of one prompt apart"),
                # a broken prompt can be the reason too, unless no gold is so short
                "added" if shortest > ids.shape[1] else "unknown",
                values={
                    "cap": ids.shape[1],
                    "completions": len(ids),
                    "shortest": shortest,
                    "bent": _is_bent(case, call.config),
                },
                severity="differs" if taught else "breaks",
            )


def _never_ends(config: Mapping[str, Any], eos: Sequence[int], cap: int) -> str:
    """How generate's own settings forbid every end before the cap; ``""`` where they do not."""
    banned = {*ids_of(config.get("suppress_tokens"))}
    banned |= {words[0] for words in config.get("bad_words_ids") or () if len(words) == 1}
    if {*eos} <= banned:
        where = "suppress_tokens" if {*eos} <= {*ids_of(config.get("suppress_tokens"))} else (
            "bad_words_ids")  # fmt: skip
        return f"{where} forbids every eos ({', '.join(map(str, eos))})"
    least = config.get("min_new_tokens") or 0
    return f"min_new_tokens={least} forbids an end before it" if int(least) >= cap else ""


def _is_bent(case: Case, config: Mapping[str, Any]) -> bool:
    """Whether sampling is so unlike the policy that its completions say nothing of the cap: no
    sequence of tokens may repeat, or it is much hotter than the scoring."""
    told = [one.temperature[one.temperature.isfinite()] for one in case.gradients]
    scored = [float(values.median()) for values in told if len(values)]
    heat = float(config.get("temperature") or 1.0) if config.get("do_sample") else 1.0
    return bool(config.get("no_repeat_ngram_size")) or any(heat > _HOT * one for one in scored)


def _shortest_gold(case: Case) -> int:
    """Tokens of the shortest gold completion of the step; 0 where unknown."""
    golds = [gold for one in asked(case) for gold in golds_of(one.row)]
    if case.reference is None or not golds:
        return 0
    tokenizer = case.reference.policy.processor.tokenizer
    return min(len(tokenizer(gold, add_special_tokens=False)["input_ids"]) for gold in golds)


def look_at_sampling(case: Case) -> Iterable[Evidence]:
    """Settings that make the sampled distribution differ from the one that the loss scores."""
    for _, call in generated_rollouts(case):
        if not call.config.get("do_sample", False):
            continue
        note_judged(case, "completion")
        cut = truncation(call.config, _vocabulary(case))
        if cut:
            settings = ", ".join(f"{name}={value:g}" for name, value in cut.items())
            strong = cut.get("repetition_penalty", 1.0) > _MILD
            yield Evidence(
                "completion",
                "truncated-sampling",
                f"completions were sampled with {settings}, which changes the distribution; the "
                "loss scores the unchanged one",
                values=cut,
                severity="breaks" if strong else "differs",
            )


def truncation(config: Mapping[str, Any], vocabulary: int | None) -> dict[str, float]:
    """Settings in effect that change the distribution beyond its temperature.

    >>> truncation({"top_k": 50, "top_p": 1.0, "min_p": None}, 151_936)
    {'top_k': 50.0}
    """
    neutral = {
        "top_p": 1.0, "typical_p": 1.0, "repetition_penalty": 1.0, "min_p": 0.0,
        "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "no_repeat_ngram_size": 0, "top_h": 1.0,
    }  # fmt: skip
    found = {
        name: float(config[name])
        for name, nothing in neutral.items()
        if config.get(name) is not None and float(config[name]) != nothing
    }
    top_k = config.get("top_k")
    if top_k and (vocabulary is None or int(top_k) < vocabulary):
        found = {"top_k": float(top_k), **found}
    return found


def look_at_pixels(case: Case) -> Iterable[Evidence]:
    """Pixel rows repeated one by one for the group, which scrambles every picture's patches."""
    if any(e.fact == "edge-media-changed" for e in look_at_edges(case)):
        return  # other values in all patches may make neighbours equal
    for rollout, call in generated_rollouts(case):
        copies = int(call.config.get("num_return_sequences") or 1)
        for pixels, grids in _PIXELS.items():
            grid = call.inputs.get(grids)
            given = pixels in call.inputs or pixels in call.large
            if copies > 1 and given and _copies_differ(call, copies):
                yield Evidence(
                    "completion",
                    "pixels-scrambled",
                    f"num_return_sequences={copies} with {pixels}: the copies of a prompt entered "
                    "the text model with different embeddings. generate repeated each patch "
                    f"{copies} times in a row instead of each picture, so every copy is made of "
                    "other pictures' patches",
                    values={"copies": copies, "tensor": pixels, "by": "num_return_sequences"},
                )
            elif pixels in call.inputs and grid is not None:
                repeated = _repeated_patches(rollout, call.inputs[pixels], pixels)
                if repeated > 1:
                    yield Evidence(
                        "completion",
                        "pixels-scrambled",
                        f"{pixels} reached generate with each patch repeated {repeated} times in a "
                        f"row ({len(call.inputs[pixels])} rows, {len(grid)} grids): every picture "
                        "is made of a few of its own and its neighbours' patches",
                        values={
                            "copies": repeated, "tensor": pixels, "by": "repeat_interleave",
                        },
                    )  # fmt: skip


def _copies_differ(call: GenerateCall, copies: int) -> bool:
    """Whether generate's own copies of a prompt have different embeddings; some families repeat
    pictures rightly. Copies of an item differ at most by rounding that depends on its place."""
    rounding = 1e-3 if (call.modes.autocast or call.modes.dtype) == "float32" else 0.02
    embeds = call.inputs_embeds
    if embeds is None or len(embeds) % copies:
        return False
    own = embeds.float().view(-1, copies, *embeds.shape[1:])
    return bool((own - own[:, :1]).abs().max() > rounding * own.abs().max())


def _repeated_patches(rollout: RolloutRecord, given: Tensor, name: str) -> int:
    """How many times in a row generate got each patch of the processor's output; 1 where patches
    are unchanged."""
    for call in rollout.processed:
        made = call.outputs.get(name)
        if made is None or not len(made) or len(given) % len(made) or len(given) == len(made):
            continue
        times = len(given) // len(made)
        made = made.to(given.dtype)
        if not torch.equal(given, made.repeat(times, 1)) and torch.equal(
            given, made.repeat_interleave(times, 0)
        ):
            return times
    for times in (2, 3, 4, 6, 8, 16):
        if len(given) % times or len(given) <= times:
            continue
        blocks = given.view(-1, times, given.shape[1])
        # pictures of one colour have equal patches, which prove nothing
        if torch.equal(blocks, blocks[:, :1].expand_as(blocks)) and _mostly_distinct(blocks[:, 0]):
            return times
    return 1


def _mostly_distinct(patches: Tensor) -> bool:
    """Whether neighbouring patches differ almost everywhere."""
    if len(patches) < 4:
        return False
    same = (patches[1:] == patches[:-1]).all(1).float().mean()
    return bool(same < 0.1)


def _vocabulary(case: Case) -> int | None:
    return None if case.reference is None else len(case.reference.policy.suppressed)


def _media_ids(policy: Policy) -> list[int]:
    config = policy.model.config
    names = ("image_token_id", "video_token_id", "audio_token_id")
    own = [getattr(config, name, None) for name in names]
    return [int(i) for i in own if i is not None]


def _named(policy: Policy, ids: Sequence[int]) -> str:
    return ", ".join(f"{policy.decode([i])} ({i})" for i in ids)


LOOKS: tuple[Look, ...] = (
    look_at_error,
    look_at_history,
    look_at_eos,
    look_at_tokens,
    look_at_texts,
    look_at_identical,
    look_at_cap,
    look_at_sampling,
    look_at_pixels,
)
