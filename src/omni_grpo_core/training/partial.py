"""Partial rewards: a judge's score of one section becomes an advantage on that section's tokens.

    A_it = A_i of the total + sum over partial rewards p of weight_p A_i^p [t in section_p of o_i]

``A_i^p`` is computed from p's own scores within the group, with the same scale as the total's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omni_grpo_core.losses.advantages import Scale, group_advantages
from omni_grpo_core.losses.spans import PartialAdvantage, byte_pieces, token_offsets, token_span
from omni_grpo_core.rewards import health
from omni_grpo_core.rewards.parse import parse
from omni_grpo_core.training.config import SectionName
from omni_grpo_core.types import Completion, Malformed


@dataclass(frozen=True, slots=True, eq=False)
class Partial:
    """``own``: for one process's completions. ``usable``, ``informative``: bool, (N,), over all
    processes: whether any partial reward scored the completion, and could tell it from others."""

    own: tuple[PartialAdvantage, ...]
    usable: Tensor
    informative: Tensor


@dataclass(frozen=True, slots=True)
class PartialRewards:
    """``sections``: name of a partial reward -> the section it judges and its weight."""

    sections: Mapping[str, tuple[SectionName, float]]
    scale: Scale

    def advantages(
        self, tokenizer: Any, completions: Sequence[Completion], rewards: health.Step, own: Tensor
    ) -> Partial:
        """``completions``: this process's; ``own``: (N,), their places in ``rewards``, which cover
        all processes. A malformed completion has no sections: it counts within its group, but only
        the total acts on its tokens.

        Raises ``TrainError`` for a text that its token ids do not decode to.
        """
        count = len(rewards.totals)
        usable = torch.zeros(count, dtype=torch.bool)
        informative = torch.zeros(count, dtype=torch.bool)
        parts = []
        for name, (section, weight) in self.sections.items():
            found = group_advantages(rewards.scores[name], rewards.group_ids, self.scale)
            usable |= found.usable
            informative |= found.informative
            spans = tuple(section_span(tokenizer, c, section) for c in completions)
            parts.append(PartialAdvantage(name, weight * found.values[own], spans))
        return Partial(tuple(parts), usable, informative)


def section_span(
    tokenizer: Any, completion: Completion, section: SectionName
) -> tuple[int, int] | None:
    """The tokens ``[first, last)`` of a section's content; ``None`` for a malformed completion.

    ``tokenizer``: byte-level, with ``convert_ids_to_tokens``.
    """
    parsed = parse(completion.text)
    if isinstance(parsed, Malformed):
        return None
    pieces = byte_pieces(tokenizer.convert_ids_to_tokens(list(completion.token_ids)))
    content = getattr(parsed, section)
    return token_span(token_offsets(pieces, completion.text), content.start, content.end)
