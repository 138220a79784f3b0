"""Looks at the rows of a batch: each is passed on whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from omni_grpo_core.core.batch import placeholder_ids
from omni_grpo_core.doctor.evidence import Case, Evidence, Look, note_judged
from omni_grpo_core.doctor.rendered import rendered_batches

if TYPE_CHECKING:
    from torch import Tensor

    from omni_grpo_core.core.policy import Policy


def look_generate_prompts(case: Case) -> Iterator[Evidence]:
    """The prompts passed to generate are the processor's, whole."""
    if case.reference is None:
        return
    policy = case.reference.policy
    for one in rendered_batches(case):
        made = [row for call in one.processed for row in _unpadded(call.outputs, policy)]
        if not made:
            continue
        for call in one.generated:
            note_judged(case, "batch")
            for row, got in enumerate(_unpadded(call.inputs, policy)):
                if got in made or not got:
                    continue
                longer = next((whole for whole in made if part_of(got, whole)), None)
                if longer is not None:
                    yield cut(row, got, longer, policy, "generate got")
                else:
                    yield Evidence(
                        "batch",
                        "prompt-changed",
                        f"row {row} of generate has a prompt of {len(got)} tokens that the "
                        "processor did not make",
                        row=row,
                        values={"got": len(got)},
                    )


def cut(row: int, got: Sequence[int], whole: Sequence[int], policy: Policy, how: str) -> Evidence:
    end = whole[: len(got)] == list(got)
    marks_of = placeholder_ids(policy.processor)
    lost = {
        m: whole.count(token) - got.count(token)
        for m, token in marks_of.items()
        if whole.count(token) != got.count(token)
    }
    parts = ", ".join(f"{n} {m} tokens" for m, n in lost.items()) or "no media tokens"
    return Evidence(
        "batch",
        "prompt-cut",
        f"{how} {len(got)} of the {len(whole)} tokens of row {row}, truncated on the "
        f"{'right' if end else 'left'}: {parts} among the {len(whole) - len(got)} lost",
        row=row,
        values={
            "side": "right" if end else "left", "got": len(got), "want": len(whole), "lost": lost
        },
    )  # fmt: skip


def _unpadded(held: Mapping[str, Tensor], policy: Policy) -> list[list[int]]:
    ids = held.get("input_ids")
    if ids is None or ids.dim() != 2:
        return []
    return [row[row != policy.pad_token_id].tolist() for row in ids]


def part_of(got: Sequence[int], whole: Sequence[int]) -> bool:
    """Whether one end of ``whole`` was cut off."""
    if not got or len(got) >= len(whole):
        return False
    return list(whole[: len(got)]) == list(got) or list(whole[-len(got) :]) == list(got)


LOOKS: tuple[Look, ...] = (look_generate_prompts,)
