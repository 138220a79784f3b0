"""Where everything is in a packed row, and which tokens see which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from omni_grpo_core.errors import TrainError


@dataclass(frozen=True, slots=True, eq=False)
class Spans:
    """Pairs of one stretch of queries and one of keys, each stretch after the last.

    ``queries``, ``keys``: their lengths. ``causal``: query i of a pair sees keys 0 to i, and the
    two stretches are equally long; else all of them. ``query_bounds``, ``key_bounds``: int32,
    (pairs + 1,), where each stretch begins, on the device.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    causal: bool
    query_bounds: Tensor
    key_bounds: Tensor

    @classmethod
    def of(
        cls, queries: Sequence[int], keys: Sequence[int], device: torch.device, *, causal: bool
    ) -> Spans:
        bounds = [
            torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
            for lengths in (queries, keys)
        ]
        return cls(tuple(queries), tuple(keys), causal, *bounds)


@dataclass(frozen=True, slots=True, eq=False)
class PackedRow:
    """Several groups in one row without padding: all prompts, then all completions, in order.

    ``prompts``: tokens of each, (B,). ``completions``: tokens of each, (B * G,), G consecutive ones
    for each prompt. ``within``: prompts and completions, each with itself. ``across``: each group's
    completions with their prompt.
    """

    prompts: tuple[int, ...]
    completions: tuple[int, ...]
    within: Spans
    across: Spans

    @classmethod
    def of(
        cls, prompts: Sequence[int], completions: Sequence[int], device: torch.device
    ) -> PackedRow:
        """Raises ``TrainError`` for completions that no prompt has."""
        copies, rest = divmod(len(completions), len(prompts))
        if rest or not copies:
            raise TrainError(
                "packed row",
                got=f"{len(completions)} completions of {len(prompts)} prompts",
                want="equally many of each",
                fix="pass G consecutive completions for each prompt",
            )
        segments = [*prompts, *completions]
        groups = [sum(completions[at : at + copies]) for at in range(0, len(completions), copies)]
        return cls(
            tuple(prompts),
            tuple(completions),
            Spans.of(segments, segments, device, causal=True),
            Spans.of(groups, prompts, device, causal=False),
        )

    @property
    def copies(self) -> int:
        return len(self.completions) // len(self.prompts)

    @property
    def prompt_tokens(self) -> int:
        """Also where the completions begin."""
        return sum(self.prompts)

    @property
    def length(self) -> int:
        return self.prompt_tokens + sum(self.completions)

    def predicting(self) -> Tensor:
        """Where in the row the logits of each completion token are, int64, (tokens of all
        completions,): for a completion's first token at the end of its prompt.

        >>> PackedRow.of([3], [2, 1], torch.device("cpu")).predicting().tolist()
        [2, 3, 2]
        """
        ends = [end - 1 for end in accumulate(self.prompts)]
        starts = [self.prompt_tokens, *accumulate(self.completions, initial=self.prompt_tokens)][1:]
        found: list[int] = []
        for index, (start, length) in enumerate(zip(starts, self.completions, strict=False)):
            if length:
                found += [ends[index // self.copies], *range(start, start + length - 1)]
        return torch.tensor(found, dtype=torch.int64)

    def mask(self) -> Tensor:
        """Bool, (length, length), [query, key]: the reference for attention that never has it.

        >>> PackedRow.of([1], [2, 1], torch.device("cpu")).mask().int().tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]]
        """
        device = self.within.query_bounds.device
        segments = torch.arange(len(self.within.queries), device=device)
        of_segment = torch.cat(
            [
                torch.arange(len(self.prompts), device=device),
                torch.arange(len(self.completions), device=device) // self.copies,
            ]
        )
        lengths = torch.tensor(self.within.queries, device=device)
        segment, group = (one.repeat_interleave(lengths) for one in (segments, of_segment))
        at = torch.arange(self.length, device=device)
        prompt = at < self.prompt_tokens
        own = segment[:, None] == segment
        same_group = group[:, None] == group
        return (at[:, None] >= at) & (own | (same_group & prompt))
