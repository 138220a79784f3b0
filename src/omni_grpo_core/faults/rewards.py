"""What the clean loop adds to the project's own rewards: one that varies within any group."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from omni_grpo_core.core.policy import Policy
from omni_grpo_core.rewards.base import Reward, Row
from omni_grpo_core.types import Score

_WORD = re.compile(r"\w+")
_CONTEXT = re.compile(r"\s*<context>([^<]+)</context>")


class Recall(Reward):
    """How much of the gold's context the completion's context says: words shared, of all words of
    the two. A completion that does not begin with a whole context earns 0, whatever follows."""

    def __init__(self) -> None:
        super().__init__("recall")

    def score(self, row: Row) -> Score:
        gold = _CONTEXT.match(row.solution)
        if gold is None:
            return Score(None, "the gold has no context to compare with")
        given = _CONTEXT.match(row.text)
        if given is None:
            return Score(0.0, "no whole context at the start")
        wanted, said = (set(_WORD.findall(found.group(1).lower())) for found in (gold, given))
        shared = len(wanted & said)
        return Score(shared / max(len(wanted | said), 1), f"{shared} words shared")


def context_mask(policy: Policy, ids: Tensor, mask: Tensor) -> Tensor:
    """bool, (N, C): tokens that spell what stands inside ``<context>``; none where there is none.

    Found from text offsets: the same tag has other ids at other places of a text.
    """
    found = torch.zeros_like(mask)
    for row, (tokens, kept) in enumerate(zip(ids, mask, strict=True)):
        own = tokens[kept].tolist()
        context = _CONTEXT.match(policy.decode(own))
        if context is None:
            continue
        ends = [len(policy.decode(own[: i + 1])) for i in range(len(own))]
        for i, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            found[row, i] = start < context.end(1) and end > context.start(1)
    return found
