"""The top-N and margin rule, on completions small enough to follow by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from omni_grpo_core.golden.generations import (
    Sides,
    classify_generation,
    margins,
    scoring_differences,
)
from omni_grpo_core.pipeline.stages import Scored
from omni_grpo_core.tolerances import FLOAT32 as TOLERANCE
from omni_grpo_core.types import Completion

EOS = 2


@dataclass
class Words:
    """The parts of a policy that classification needs."""

    eos_token_ids: tuple[int, ...] = (EOS,)
    processor: Any = field(
        default_factory=lambda: SimpleNamespace(
            tokenizer=SimpleNamespace(added_tokens_decoder={EOS: SimpleNamespace(special=True)})
        )
    )

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(f"<{i}>" for i in ids)


POLICY: Any = Words()


def completion(*ids: int, logprob: float = -0.5, finish: Any = "stop") -> Completion:
    return Completion("a", 0, ids, "text", finish, (logprob,) * len(ids))


def scored(*steps: tuple[tuple[int, float], ...], own: Sequence[int]) -> Scored:
    """Each step: (token, logprob), likeliest first."""
    return Scored(
        torch.tensor([[token for token, _ in step] for step in steps]),
        tuple(logprob for step in steps for _, logprob in step),
        tuple(dict(step)[token] for step, token in zip(steps, own, strict=True)),
    )


IDS = (7, 8, EOS)
SURE = scored(((7, -0.1), (9, -5.0)), ((8, -0.1), (9, -5.0)), ((EOS, -0.1), (9, -5.0)), own=IDS)
TIE = scored(((7, -0.1), (9, -5.0)), ((8, -0.70), (9, -0.71)), ((EOS, -0.1), (9, -5.0)), own=IDS)
FLIPPED = scored(
    ((7, -0.1), (9, -5.0)), ((9, -0.70), (8, -0.71)), ((EOS, -0.1), (9, -5.0)), own=IDS
)


def judged(
    now: Completion, was_scored: Scored | None = SURE, now_scored: Scored | None = SURE
) -> Any:
    return classify_generation(
        POLICY, Sides(completion(*IDS), now, was_scored, now_scored), TOLERANCE, drifted=True
    )


def test_the_same_tokens_with_the_same_logprobs() -> None:
    assert judged(completion(*IDS)).verdict == "exact"


def test_the_same_tokens_within_and_beyond_tolerance() -> None:
    assert judged(completion(*IDS, logprob=-0.50005)).verdict == "within"
    assert judged(completion(*IDS, logprob=-0.51)).verdict == "benign-drift"


def test_the_same_tokens_less_certain() -> None:
    less_certain = scored(
        ((7, -0.1), (9, -5.0)), ((8, -0.6), (9, -2.0)), ((EOS, -0.1), (9, -5.0)), own=IDS
    )
    found = judged(completion(*IDS), now_scored=less_certain)
    assert found.verdict == "harmful"
    assert found.sentence == "same tokens but less certain: margin of token 1 4.9 → 1.4 nats"


def test_a_near_tie_may_flip() -> None:
    found = judged(completion(7, 9, 5, EOS), TIE, FLIPPED)
    assert (found.verdict, found.first) == ("benign-drift", 1)
    # the golden's token is second now, the fresh one was second then, a hundredth of a nat apart
    assert (found.was_rank, found.now_rank) == (1, 1)
    assert found.margin == pytest.approx(0.01)


def test_a_certain_token_may_not_flip() -> None:
    found = judged(completion(7, 9, EOS), SURE, FLIPPED)
    assert found.verdict == "harmful"
    assert found.sentence == 'token 1 is 9 "<9>", was 8 "<8>": 4.9 nats apart'


def test_a_token_outside_the_other_sides_top() -> None:
    found = judged(completion(7, 6, EOS), TIE, FLIPPED)
    assert found.verdict == "harmful"
    assert "not among the other side's top tokens" in found.sentence


def test_a_near_tie_does_not_excuse_drift_elsewhere() -> None:
    moved = replace(FLIPPED, logprobs=(-0.1, -0.71, -0.4))
    assert judged(completion(7, 9, EOS), TIE, moved).verdict == "harmful"


def test_stopping_at_a_different_token() -> None:
    assert judged(completion(7, 8)).verdict == "harmful"
    endless = judged(completion(7, 8, 5, 5, finish="length"))
    assert endless.verdict == "degenerate"
    assert "the golden ended in eos" in endless.garbage


def sampled(now: Completion, draw_distance: float | None, *, drifted: bool = False) -> Any:
    return classify_generation(
        POLICY, Sides(completion(*IDS), now, draw_distance=draw_distance), TOLERANCE, drifted
    )


def test_a_sampled_token_may_flip_where_its_draw_lies_at_an_edge() -> None:
    """In bfloat16, the same machine with two threads instead of one was reported as harmful: five
    draws, 9e-7 to 9e-4 from the edges of their slices, fell on the other side."""
    flipped = completion(7, 9, EOS)
    assert sampled(flipped, 5e-5).verdict == "within"
    assert sampled(flipped, 5e-5).sentence == (
        'sampled: token 1 is 9 "<9>", was 8 "<8>"; '
        "the draw lies at the edge of its slice (5e-05 outside)"
    )
    # no edge moves this far at a tolerance of 1e-5 + 1e-4
    assert sampled(flipped, 2e-3).verdict == "harmful"
    assert sampled(flipped, 2e-3, drifted=True).verdict == "benign-drift"
    assert sampled(flipped, 0.2, drifted=True).verdict == "harmful"
    assert sampled(flipped, None, drifted=True).verdict == "harmful"


def test_a_draw_at_the_edge_does_not_excuse_earlier_drift() -> None:
    moved = replace(completion(7, 9, EOS), logprobs=(-0.9, -0.5, -0.5))
    assert sampled(moved, 5e-5, drifted=True).verdict == "harmful"


def test_margins_name_the_token_that_lost_most() -> None:
    found = margins(SURE, FLIPPED, IDS)
    assert (found.at, found.held) == (1, False)
    assert found.was == pytest.approx(4.9)
    assert found.now == pytest.approx(-0.01)
    assert margins(SURE, SURE, IDS).held


def test_scoring_is_compared_token_by_token() -> None:
    assert scoring_differences([SURE], [SURE], [completion(*IDS)], TOLERANCE) == []
    (found,) = scoring_differences([SURE], [TIE], [completion(*IDS)], TOLERANCE)
    assert (found.verdict, found.place) == ("differs", (1,))
    assert found.max_abs == pytest.approx(4.29)
    (near,) = scoring_differences(
        [SURE], [replace(SURE, logprobs=(-0.100001, -0.1, -0.1))], [completion(*IDS)], TOLERANCE
    )
    assert near.verdict == "within"
