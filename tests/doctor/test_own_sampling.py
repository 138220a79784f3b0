"""A loop that samples with forwards of its own has completions as well.

A notebook drew its tokens one by one: neither its completions nor how its rewards became the loss's
weights were judged, and random advantages, a dropped cache or logits one column late were HEALTHY.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from joined_calls import EOS, rows, sampled, scored, step, weighed

from omni_grpo_core.doctor.own_sampling import with_own_sampling
from omni_grpo_core.trace.calls import ForwardCall, GenerateCall, LossGradient, calls_of
from omni_grpo_core.types import Trace

PROMPTS = [[7, 8], [6, 7, 8]]
CACHE = {"past_key_values": "<DynamicCache>"}
LATER = rows([[7, 8, 1, EOS], [6, 7, 8, 3, 4, 5]])
"""What is scored: the second completion's last token was fed to no forward before."""


def fed(ids: Sequence[Sequence[int]], **more: Any) -> ForwardCall:
    return scored({"input_ids": torch.tensor(ids)}, grad=False, **more)


def folded(*steps: ForwardCall) -> Trace:
    first = scored(rows(PROMPTS), grad=False)
    case = step(first, *steps, scored(LATER), weighed(1 + len(steps), torch.ones(2, 6)))
    return with_own_sampling(case.trace, (EOS,))


@pytest.mark.parametrize(
    ("steps", "cached"),
    [
        ([fed([[1], [3]], keywords=CACHE), fed([[EOS], [4]], keywords=CACHE)], (3, 4)),
        ([fed([[0, 7, 8, 1], [6, 7, 8, 3]]), fed([[0, 7, 8, 1, 9], [6, 7, 8, 3, 4]])], (3, 4)),
        # each token sees the one before it alone
        ([fed([[1], [3]]), fed([[EOS], [4]])], (0, 0)),
    ],
    ids=["cached", "all again", "cache dropped"],
)
def test_forwards_of_one_more_token_each_are_a_rollout(
    steps: Sequence[ForwardCall], cached: tuple[int, ...]
) -> None:
    trace = folded(*steps)
    [call] = calls_of(trace, GenerateCall)
    assert call.sequences is not None
    # the first has ended and is filled with any eos
    assert call.sequences.tolist() == [[0, 7, 8, 1, EOS, EOS], [6, 7, 8, 3, 4, 5]]
    assert call.cached == cached
    [forward] = calls_of(trace, ForwardCall)
    assert forward.modes.grad_enabled
    [gradient] = calls_of(trace, LossGradient)
    assert gradient.forward == 0


def test_where_generate_samples_forwards_stay_what_they_are() -> None:
    """Old log-probabilities of two micro-batches that differ in one column are no rollout."""
    calls = (sampled(rows(PROMPTS), [[1, EOS], [3, 4]]), fed([[7]]), fed([[7, 8]]))
    trace = step(*calls).trace
    assert with_own_sampling(trace, (EOS,)) is trace


def test_scoring_alone_is_no_rollout() -> None:
    trace = step(scored(LATER, grad=False), scored(LATER)).trace
    assert with_own_sampling(trace, (EOS,)) is trace


def test_positions_are_the_first_row_s_until_it_has_ended() -> None:
    """A finished row's padding stays where it is: its positions were called stale."""
    at = [torch.full((3, 2, 1), place) for place in (2, 3, 3)]
    tokens = ([[1], [3]], [[EOS], [4]], [[EOS], [5]])
    steps = [fed(t, keywords=CACHE, position_ids=p) for t, p in zip(tokens, at, strict=True)]
    [call] = calls_of(folded(*steps), GenerateCall)
    assert call.step_positions == (2, 3)
