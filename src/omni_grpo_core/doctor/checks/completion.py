"""What a rollout's settings, ids and texts show without a forward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from omni_grpo_core.core.policy import Policy
from omni_grpo_core.doctor.evidence import Case, Evidence, Look, note_judged, note_missing
from omni_grpo_core.doctor.rollouts import (
    RolloutRecord,
    completion_ids,
    ids_of,
    prompts_of,
    rollouts,
    until_end,
)
from omni_grpo_core.trace.calls import GenerateCall

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
                "completion", "generate-raised", f"generate raised {call.error}", "unknown",
                values={"error": call.error},
            )  # fmt: skip


def look_at_history(case: Case) -> Iterable[Evidence]:
    """Later decoding steps that saw neither the prompt nor the tokens before them."""
    for _, call in generated_rollouts(case):
        if None in call.cached:
            note_missing(
                case,
                "whether generate saw prompt and history is unknown: its model's key-value cache "
                "has an unknown name",
            )
        if any(held is not None for held in call.cached):
            note_judged(case, "completion")
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
    """The ids that end a completion, compared with the checkpoint's."""
    for _, call in generated_rollouts(case):
        given = ids_of(call.config.get("eos_token_id"))
        note_judged(case, "completion")
        if not given:
            yield Evidence(
                "completion",
                "eos-unset",
                "generate has no eos_token_id: nothing ends a completion before the cap of "
                f"{call.config.get('max_new_tokens')} tokens",
                values={"eos": [], "cap": call.config.get("max_new_tokens")},
            )
        elif case.reference is not None:
            policy = case.reference.policy
            left_out = [i for i in policy.eos_token_ids if i not in given]
            if left_out:
                yield Evidence(
                    "completion",
                    "eos-left-out",
                    f"generate ends a completion only at {_named(policy, given)}; the checkpoint "
                    f"also ends one with {_named(policy, left_out)}",
                    values={"eos": list(given), "left_out": left_out},
                )


def look_at_tokens(case: Case) -> Iterable[Evidence]:
    """Special and media tokens among the sampled ids."""
    if case.reference is None:
        return
    policy = case.reference.policy
    tokenizer = policy.processor.tokenizer
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special -= set(policy.eos_token_ids)
    media = set(_media_ids(policy))
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
            )


def look_at_texts(case: Case) -> Iterable[Evidence]:
    """The texts passed to rewards, compared with the sampled ids."""
    if case.reference is None:
        return
    policy = case.reference.policy
    tokenizer = policy.processor.tokenizer
    for rollout, call in generated_rollouts(case):
        ids = completion_ids(call)
        if ids is None or not rollout.rewards or len(rollout.rewards[0].completions) != len(ids):
            continue
        texts = rollout.rewards[0].completions
        kept = until_end(ids, policy.eos_token_ids)
        for row, text in enumerate(texts):
            tokens = ids[row][kept[row]].tolist()
            inner = tokens[:-1] if tokens and tokens[-1] in policy.eos_token_ids else tokens
            whole = policy.decode(inner)
            bare = tokenizer.decode(
                inner, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            if whole != bare and text.strip() == bare.strip():
                yield Evidence(
                    "completion",
                    "specials-stripped",
                    f"completion {row} was sampled as {_short(whole)} and passed to rewards as "
                    f"{_short(text)}: special tokens were stripped before any reward saw them",
                    row=row,
                    values={"sampled": whole, "handed_on": text},
                )
                break


def look_at_identical(case: Case) -> Iterable[Evidence]:
    """Groups of identical completions, which should have been sampled."""
    for rollout, call in generated_rollouts(case):
        ids = completion_ids(call)
        groups = _groups(case, rollout, call)
        if ids is None or groups is None:
            continue
        kept = until_end(ids, ids_of(call.config.get("eos_token_id")))
        sampled = [tuple(row[mask].tolist()) for row, mask in zip(ids, kept, strict=True)]
        sizes = [members for members in groups if len(members) > 1]
        alike = [members for members in sizes if len({sampled[row] for row in members}) == 1]
        if not sizes or len(alike) < len(sizes):
            continue
        sampling = bool(call.config.get("do_sample", False))
        chance = _chance(call, kept, alike)
        if sampling and (chance is None or chance > 1e-6):
            continue
        reason = (
            f"by chance this happens once in {1 / max(chance or 0, 1e-300):.0e} rollouts"
            if sampling
            else "do_sample is off: greedy decoding gives the same text every time"
        )
        yield Evidence(
            "completion",
            "identical",
            f"in each of the {len(sizes)} groups all {len(sizes[0])} completions are identical; "
            f"{reason}",
            values={"do_sample": sampling, "groups": len(sizes), "size": len(sizes[0])},
        )


def _chance(call: GenerateCall, kept: Tensor, groups: Sequence[Sequence[int]]) -> float | None:
    """Probability of groups this alike, from the sampled tokens' own logprobs."""
    if call.logprobs is None or call.logprobs.shape != kept.shape:
        return None
    whole = torch.where(kept, call.logprobs, torch.zeros(())).sum(1)
    total = sum(float(whole[row]) for members in groups for row in members[1:])
    return float(torch.tensor(total).double().exp())


def _groups(case: Case, rollout: RolloutRecord, call: GenerateCall) -> list[list[int]] | None:
    """Rows of the sequences by group: by the trainer's group ids, else by equal prompts."""
    ids = completion_ids(call)
    if ids is None:
        return None
    names: Sequence[Any]
    if rollout.advantage is not None and len(rollout.advantage.group_ids) == len(ids):
        names = rollout.advantage.group_ids
    else:
        labels = prompts_of(case, call)
        if labels is None:
            return None
        names = labels
    found: dict[Any, list[int]] = {}
    for row, name in enumerate(names):
        found.setdefault(name, []).append(row)
    return list(found.values())


def look_at_cap(case: Case) -> Iterable[Evidence]:
    """Every completion is stopped by the cap. A broken prompt can be the reason too, unless even
    the shortest gold completion exceeds the cap."""
    shortest = _shortest_gold(case)
    for _, call in generated_rollouts(case):
        ids = completion_ids(call)
        eos = ids_of(call.config.get("eos_token_id"))
        if ids is None or len(ids) < 2 or not eos:
            continue
        ended = torch.isin(ids, torch.tensor(eos, dtype=ids.dtype)).any(1)
        if not ended.any():
            yield Evidence(
                "completion",
                "all-capped",
                f"all {len(ids)} completions reached the cap of {ids.shape[1]} tokens; none ended "
                "before it"
                + (f"; the shortest gold completion has {shortest}" if shortest else ""),
                "added" if shortest > ids.shape[1] else "unknown",
                values={"cap": ids.shape[1], "completions": len(ids)},
            )


def _shortest_gold(case: Case) -> int:
    """Tokens of the shortest gold completion of the step; 0 where unknown."""
    if case.reference is None:
        return 0
    tokenizer = case.reference.policy.processor.tokenizer
    golds = [row.get("solution") for seen in case.samples for row in seen.rows]
    if not golds or not all(isinstance(gold, str) for gold in golds):
        return 0
    return min(len(tokenizer(gold, add_special_tokens=False)["input_ids"]) for gold in golds)


def look_at_sampling(case: Case) -> Iterable[Evidence]:
    """Settings that make the sampled distribution differ from the one that the loss scores."""
    for _, call in generated_rollouts(case):
        if not call.config.get("do_sample", False):
            continue
        cut = truncation(call.config, _vocabulary(case))
        if cut:
            settings = ", ".join(f"{name}={value:g}" for name, value in cut.items())
            yield Evidence(
                "completion",
                "truncated-sampling",
                f"completions were sampled with {settings}, which changes the distribution; the "
                "loss scores the unchanged one",
                values=cut,
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
    for rollout, call in generated_rollouts(case):
        copies = int(call.config.get("num_return_sequences") or 1)
        for pixels, grids in _PIXELS.items():
            grid = call.inputs.get(grids)
            if copies > 1 and (pixels in call.inputs or pixels in call.large):
                yield Evidence(
                    "completion",
                    "pixels-scrambled",
                    f"num_return_sequences={copies} with {pixels}: generate repeats each patch "
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


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "…")


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
