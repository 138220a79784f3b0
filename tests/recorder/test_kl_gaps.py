"""A KL is told from a ratio by its graph: in both the values are 1 where two policies agree.

An inverted ratio was proved to be a KL whose reference is the policy.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from omni_grpo_core.recorder.kl_gaps import has_ratio_to_itself, kl_gaps

NEW = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
OLD = torch.tensor([-1.25, -2.0, -0.5])


def k3(gap: Tensor) -> Tensor:
    return (gap.exp() - gap - 1).mean()


@pytest.mark.parametrize(
    ("loss", "gaps"),
    [
        (k3(OLD - NEW), [0.25]),
        (k3(-(NEW - OLD)), [0.25]),
        (k3((OLD - NEW).clamp(-10, 10)), [0.25]),
        (k3((OLD - NEW).double()) - (NEW - OLD).exp().mean(), [0.25]),
        (k3(NEW.detach() - NEW), [0.0]),
        (((OLD - NEW).exp() - 1 - (OLD - NEW)).mean(), [0.25]),
        (((OLD - NEW).exp() + (NEW - OLD) - 1).mean(), [0.25]),
        ((NEW - OLD).exp().mean(), []),
        ((OLD - NEW).exp().mean(), []),
        ((NEW - NEW.detach()).exp().mean(), []),
        (NEW.log_softmax(0).sum(), []),
    ],
    ids=[
        "k3",
        "negated",
        "clamped",
        "beside a ratio",
        "itself",
        "two gaps",
        "added",
        "ratio",
        "inverted",
        "first ratio",
        "none",
    ],
)
def test_the_gap_of_each_kl_in_a_loss(loss: Tensor, gaps: list[float]) -> None:
    assert [float(gap) for gap in kl_gaps([loss])] == pytest.approx(gaps, abs=1e-7)


def test_a_ratio_whose_old_logprobs_are_not_detached() -> None:
    shared = NEW * 1.0
    assert has_ratio_to_itself([(shared - shared).exp().mean()])
    assert not has_ratio_to_itself([(shared - shared.detach()).exp().mean()])
    assert not has_ratio_to_itself([(shared - NEW).exp().mean() + (shared - shared).mean()])
