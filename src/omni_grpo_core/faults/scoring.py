"""The loop's second part: completions to rewards, rewards to advantages."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from omni_grpo_core.core.policy import Policy
from omni_grpo_core.faults.config import LoopConfig
from omni_grpo_core.faults.fixtures import Drawn
from omni_grpo_core.rewards import COLUMNS, Reward, RewardRow
from omni_grpo_core.trace.calls import AdvantageSeen
from omni_grpo_core.types import Score


class Scoring:
    """From completions to advantages. Every method is a seam that a fault may replace."""

    config: LoopConfig
    policy: Policy
    reward_funcs: list[Callable[..., list[float | None]]]
    reward_weights: list[float]

    def columns(self, drawn: list[Drawn]) -> dict[str, list[Any]]:
        """The columns of the data set, one value per completion."""
        return {name: [one.row[name] for one in drawn] for name in COLUMNS}

    def score(self, prompts: list[str], texts: list[str], drawn: list[Drawn]) -> Tensor:
        """(N, functions), NaN where a function could not score."""
        columns = self.columns(drawn)
        table = [
            function(prompts=prompts, completions=texts, **columns)
            for function in self.reward_funcs
        ]
        return torch.tensor(
            [[float("nan") if v is None else float(v) for v in values] for values in table]
        ).T

    def total(self, rewards: Tensor) -> Tensor:
        """(N,): the weighted sum, without a partial reward, which acts on its own tokens."""
        weights = torch.tensor(self.reward_weights)
        if self.config.partial:
            weights[-1] = 0.0
        return (rewards * weights).nansum(1)

    def group_ids(self, drawn: list[Drawn]) -> list[str]:
        """The sample id of each completion."""
        return [str(one.row["sample_id"]) for one in drawn]

    def normalise(self, rewards: Tensor, groups: Sequence[str]) -> Tensor:
        """(N,): reward minus the group's mean, divided by its standard deviation."""
        advantages = torch.zeros_like(rewards)
        for name in dict.fromkeys(groups):
            members = torch.tensor([group == name for group in groups])
            own = rewards[members]
            deviation = own.std() if len(own) > 1 else torch.tensor(0.0)
            advantages[members] = (own - own.mean()) / (deviation + 1e-4)
        return advantages

    def partial_spans(self, ids: Tensor, mask: Tensor) -> Tensor:
        """bool, (N, C): the tokens of the context, on which the partial reward acts."""
        return context_mask(self.policy, ids, mask)

    def advantages(
        self, rewards: Tensor, drawn: list[Drawn], ids: Tensor, mask: Tensor
    ) -> AdvantageSeen:
        """Advantages as used in the loss."""
        groups = self.group_ids(drawn)
        total = self.total(rewards)
        values = self.normalise(total, groups)
        spans = {}
        if self.config.partial:
            spans["recall"] = self.partial_spans(ids, mask)
            extra = self.normalise(rewards[:, -1].nan_to_num(), groups)
            values = values[:, None] + extra[:, None] * spans["recall"]
            values = values * mask
        names = [str(getattr(f, "__name__", "reward")) for f in self.reward_funcs]
        weights = dict(zip(names, self.reward_weights, strict=True))
        return AdvantageSeen(total, tuple(groups), values, "group", weights, spans)


_WORD = re.compile(r"\w+")
_CONTEXT = re.compile(r"\s*<context>([^<]+)</context>")


class Recall(Reward):
    """Overlap of the completion's context with the gold's: shared words over all words of the two.
    A completion that does not begin with a complete context earns 0, whatever follows."""

    def __init__(self) -> None:
        super().__init__("recall")

    def score(self, row: RewardRow) -> Score:
        gold = _CONTEXT.match(row.solution)
        if gold is None:
            return Score(None, "the gold has no context to compare with")
        given = _CONTEXT.match(row.text)
        if given is None:
            return Score(0.0, "no whole context at the start")
        wanted, used = (set(_WORD.findall(found.group(1).lower())) for found in (gold, given))
        shared = len(wanted & used)
        return Score(shared / max(len(wanted | used), 1), f"{shared} words shared")


def context_mask(policy: Policy, ids: Tensor, mask: Tensor) -> Tensor:
    """bool, (N, C): tokens of the text inside ``<context>``; none if it is missing.

    Found by text offsets: the same tag is tokenized differently at different places.
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
