"""How a loop drew its tokens, told from the tokens: no call of its own sampling says it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from omni_grpo_core.doctor.checks.drawn import sharper
from omni_grpo_core.doctor.teacher_forced import Replayed

SCORES = torch.linspace(0, 6, 12).repeat(400, 1)
"""400 positions, at each of which one token of twelve is 6 likelier than another."""
POLICY: Any = SimpleNamespace(
    eos_token_ids=(11,),
    processor=SimpleNamespace(tokenizer=SimpleNamespace(get_added_vocab=lambda: {"<eos>": 11})),
)


class _Scored(Replayed):
    """With scores by hand."""

    def scores(self, row: int) -> Tensor:
        return torch.cat([SCORES, SCORES[:1]])


def drawn(temperature: float, top_k: int = 12) -> list[tuple[str, Any]]:
    """What is said of tokens drawn in this way and scored at 1.5."""
    table = SCORES / temperature
    table = table.masked_fill(table < table.topk(top_k).values[:, -1:], -torch.inf).softmax(-1)
    ids = torch.multinomial(table, 1, generator=torch.Generator().manual_seed(0)).T
    known = _Scored(POLICY, ids, torch.ones_like(ids).bool(), torch.empty(0), 0)
    return [(one.severity, dict(one.values)) for one in sharper([known], 1.5)]


def test_the_temperature_of_the_loss_is_that_of_the_tokens() -> None:
    assert drawn(1.5) == []


def test_tokens_drawn_at_another_temperature() -> None:
    """Logits were divided in the loss and not in sampling, or the other way round."""
    assert drawn(0.5) == [("breaks", {"sampled": 0.5, "scored": 1.5})]
    assert drawn(1.0) == [("differs", {"sampled": 1.0, "scored": 1.5})]
    assert drawn(3.0) == [], "other scores than were replayed look the same"


def test_tokens_of_the_likeliest_alone_are_a_recipe() -> None:
    assert drawn(1.5, top_k=3) == [("differs", {"k": 3})]
