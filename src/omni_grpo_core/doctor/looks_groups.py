"""Whose completion is whose: prompts that were generated from, prompts that were scored, groups."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from omni_grpo_core.doctor.evidence import Case, Evidence, Look
from omni_grpo_core.doctor.looks_completion import prompt_labels, rollouts
from omni_grpo_core.doctor.turns import Turn, prompt_length, turns

_TOKEN = re.compile(r"<\|[^|<>]*\|>|\s+")


def look_at_order(case: Case) -> Iterable[Evidence]:
    """Rows generated in one order (1 2 1 2) and scored in another (1 1 2 2)."""
    for turn, call in rollouts(case):
        generated = prompt_labels(call)
        scored = _scored_labels(turn)
        if generated is None or scored is None or len(generated) != len(scored):
            continue
        mixed = _mixed(scored, generated) or _texts_moved(case, turn)
        if mixed:
            yield Evidence(
                "completion",
                "group-order",
                f"completions were generated in the prompt order {_told(generated)} and scored in "
                f"the order {_told(scored)}: rewards meet other prompts' answers",
                values={"generated": generated, "scored": scored},
            )


def look_at_groups(case: Case) -> Iterable[Evidence]:
    """Groups, by the trainer's own reckoning, that hold completions of different prompts."""
    for turn in turns(case):
        if turn.advantage is None:
            continue
        groups = labels_of(turn.advantage.group_ids)
        scored = _scored_labels(turn)
        if scored is None or len(scored) != len(groups) or not _mixed(groups, scored):
            continue
        yield Evidence(
            "advantage",
            "groups-mixed",
            f"advantages were taken over groups {_told(groups)}, but the completions answer the "
            f"prompts {_told(scored)}: a group compares answers to different questions",
            values={"groups": groups, "prompts": scored},
        )


def labels_of(values: Sequence[Any]) -> list[int]:
    """Equal values by one number each, in order of appearance.

    >>> labels_of(["b", "a", "b"])
    [0, 1, 0]
    """
    seen: dict[Any, int] = {}
    return [seen.setdefault(value, len(seen)) for value in values]


def _mixed(groups: Sequence[int], owners: Sequence[int]) -> bool:
    """Whether some group holds rows of different owners."""
    return len(set(zip(groups, owners, strict=True))) > len(set(groups))


def _scored_labels(turn: Turn) -> list[int] | None:
    """Which rows the rewards took for answers to one and the same sample."""
    of_rows = set() if turn.samples is None else {n for row in turn.samples.rows for n in row}
    for call in turn.rewards:
        count = len(call.completions)
        # a column that no row of the data has may differ from completion to completion
        columns = [
            values
            for name, values in sorted(call.columns.items())
            if name in of_rows and isinstance(values, list | tuple) and len(values) == count
        ]
        if len(call.prompts) == count and count:
            told = [json.dumps(c, default=str) for c in zip(call.prompts, *columns, strict=True)]
            return labels_of(told)
    return None


def _texts_moved(case: Case, turn: Turn) -> bool:
    """Whether the rewards got the same prompts as generate, in another order."""
    call = turn.generated
    if call is None or call.sequences is None or case.reference is None or not turn.rewards:
        return False
    policy = case.reference.policy
    mask = call.inputs.get("attention_mask")
    ids = call.sequences[:, : prompt_length(call)]
    if mask is None or len(mask) != len(ids):
        return False
    generated = [
        _bare(policy.decode(row[kept.bool()].tolist())) for row, kept in zip(ids, mask, strict=True)
    ]
    scored = [_bare(text) for text in turn.rewards[0].prompts]
    return generated != scored and sorted(generated) == sorted(scored)


def _bare(text: str) -> str:
    """A prompt without special tokens and white space: before and after expansion alike.

    >>> _bare("<|vision_bos|><|VIDEO|><|VIDEO|><|vision_eos|>who is it?")
    'whoisit?'
    """
    return _TOKEN.sub("", text)


def _told(labels: Sequence[int]) -> str:
    shown = " ".join(str(label + 1) for label in labels[:12])
    return shown + (" …" if len(labels) > 12 else "")


LOOKS: tuple[Look, ...] = (look_at_order, look_at_groups)
