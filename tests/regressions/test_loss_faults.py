"""The ``adv.*`` and ``loss.*`` faults: what the faulty formula gives, and what ours gives.

Every number can be checked by hand. Each test contains the faulty formula, because the story is in
the difference.
"""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch import Tensor

from omni_grpo_core.core.completions import stack_completions
from omni_grpo_core.errors import ConfigError, TrainError
from omni_grpo_core.losses import LossConfig
from omni_grpo_core.losses.advantages import group_advantages
from omni_grpo_core.losses.logprobs import completion_logprobs, predicting_logits
from omni_grpo_core.losses.metrics import Mean, advantage_metrics, loss_metrics
from omni_grpo_core.losses.policy_loss import Totals, policy_loss, token_kl
from omni_grpo_core.losses.spans import (
    PartialAdvantage,
    token_advantages,
    token_offsets,
    token_span,
)
from omni_grpo_core.types import Completion


def on_policy(
    advantages: Tensor, mask: Tensor, totals: Totals | None = None
) -> tuple[float, list[list[float]]]:
    """Token-mean loss at ratio 1 and its gradient with respect to the logprobs."""
    logprobs = torch.zeros(mask.shape, dtype=torch.float64, requires_grad=True)
    loss = policy_loss(
        LossConfig(loss_type="dapo"),
        logprobs=logprobs,
        old_logprobs=logprobs.detach(),
        advantages=advantages,
        mask=mask,
        totals=totals or Totals.of(mask),
    )
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return loss.item(), gradient.tolist()


def test_adv_group_mixed() -> None:
    """One completion of group p was dropped; a trainer that pairs rows by order compares the 5 of
    group q with the 1 of group p, and every later advantage belongs to another question."""
    rewards, ids = [1.0, 5.0, 7.0], ["p", "q", "q"]
    by_order = [r - statistics.fmean(rewards[0:2]) for r in rewards[0:2]]
    assert by_order == [-2.0, 2.0]
    found = group_advantages(rewards, ids, "none")
    assert found.values.tolist() == [0.0, -1.0, 1.0]
    assert found.usable.tolist() == [False, True, True]


def test_adv_zero_variance() -> None:
    """The incident: every reward is 0.10, so loss and gradient are 0 and nothing reports it."""
    found = group_advantages([0.1] * 4, ["a", "a", "b", "b"], "group")
    loss, gradient = on_policy(found.values, torch.ones((4, 2), dtype=torch.bool))
    assert (loss, gradient) == (0.0, [[0.0, 0.0]] * 4)
    assert advantage_metrics(found).values()["zero_variance_rate"] == 1.0
    assert not found.informative.any()


def test_adv_rounding_is_not_a_signal() -> None:
    """Equal rewards summed in another order differ by 5e-17; our advantages are exactly 0."""
    rewards = [0.1 + 0.2, 0.3]
    mean = statistics.fmean(rewards)
    assert any(r != mean for r in rewards)
    assert group_advantages(rewards, ["g", "g"], "group").values.tolist() == [0.0, 0.0]


def test_adv_unscored_as_zero() -> None:
    """The judge was unreachable for one of three: as 0.0 it is the worst answer of the group and
    raises the other two, which are equally good."""
    as_zero = [r - statistics.fmean([6.0, 6.0, 0.0]) for r in (6.0, 6.0, 0.0)]
    assert as_zero == [2.0, 2.0, -4.0]
    found = group_advantages([6.0, 6.0, None], ["g"] * 3, "none")
    assert found.values.tolist() == [0.0, 0.0, 0.0]
    assert found.usable.tolist() == [True, True, False]


def test_adv_partial_unused() -> None:
    """The context reward was normalised from the total reward's tensor, so the gradient was the
    same whatever the judge's score. Here it acts on exactly its tokens."""
    mask = torch.ones((2, 3), dtype=torch.bool)
    total = torch.tensor([1.0, -1.0])
    judged = group_advantages([0.0, 2.0], ["g", "g"], "none").values.float()
    spans = ((0, 1), (0, 1))
    of_total = token_advantages(total, mask, [PartialAdvantage("context", total, spans)])
    ours = token_advantages(total, mask, [PartialAdvantage("context", judged, spans)])
    assert of_total.tolist() == [[2.0, 1.0, 1.0], [-2.0, -1.0, -1.0]]
    assert ours.tolist() == [[0.0, 1.0, 1.0], [0.0, -1.0, -1.0]]


def test_adv_span_mask() -> None:
    """The tag was searched for as one hard-coded id; BPE had merged its '>' with what followed, so
    it was not found, ``argmax`` of no match is 0, and the span began at token 0."""
    pieces = [b"<think>", b"no", b"</think>", b"<", b"context", b">r", b"ed", b"</context>"]
    text = b"".join(pieces).decode()
    hard_coded = torch.tensor([piece == b"<context>" for piece in pieces]).int()
    assert int(hard_coded.argmax()) == 0
    start = text.index("red")
    assert token_span(token_offsets(pieces, text), start, start + 3) == (5, 7)


def test_adv_broadcast() -> None:
    """(B,) times (B, L) at B = L: each column gets the advantage of another row."""
    advantages, ones = torch.tensor([3.0, -6.0, 9.0]), torch.ones(3, 3)
    mixed = advantages * ones
    assert mixed.tolist() == [[3.0, -6.0, 9.0]] * 3
    _, gradient = on_policy(advantages, ones.bool())
    expected = torch.tensor([[-3.0] * 3, [6.0] * 3, [-9.0] * 3], dtype=torch.float64) / 9
    # float64 rounding of a ninth
    torch.testing.assert_close(
        torch.tensor(gradient, dtype=torch.float64), expected, rtol=0, atol=1e-15
    )
    with pytest.raises(TrainError, match="advantages"):
        on_policy(advantages[None], ones.bool())


def test_loss_shift() -> None:
    """A model that is certain of each next token: scored off by one, certainty becomes e^-100."""
    ids = torch.tensor([[4, 5, 6]])
    logits = 100.0 * torch.nn.functional.one_hot(torch.tensor([[4, 5, 6, 7]]), 8).float()
    mask = torch.ones((1, 3), dtype=torch.bool)
    off = completion_logprobs(logits[:, 1:], ids, mask, temperature=1.0).logprobs
    assert off.tolist() == [[-100.0] * 3]
    right = completion_logprobs(predicting_logits(logits, 3), ids, mask, temperature=1.0).logprobs
    assert right.tolist() == [[0.0] * 3]
    with pytest.raises(TrainError, match="one position more"):
        predicting_logits(logits[:, 1:], 3)
    with pytest.raises(TrainError, match="predicting logits"):
        completion_logprobs(logits, ids, mask, temperature=1.0)


def test_loss_prompt_included_and_after_eos() -> None:
    """A prompt of 2 tokens, an answer of 2 with its eos, 4 of padding, advantage 4. With all eight
    in the loss the answer gets a quarter of its gradient, and the rest goes to tokens that were not
    sampled; the loss is -4 both times."""
    advantage = torch.tensor([4.0])
    assert on_policy(advantage, torch.ones((1, 8), dtype=torch.bool)) == (-4.0, [[-0.5] * 8])
    done = Completion("g", 0, (9, 2), "a", "stop", (-1.0, -1.0))
    long = Completion("g", 1, (9, 9, 9, 9, 9, 2), "aaaaa", "stop", (-1.0,) * 6)
    mask = stack_completions([done, long], pad_id=2, eos_ids={2}).mask[:1]
    assert on_policy(advantage, mask) == (-4.0, [[-2.0, -2.0, 0.0, 0.0, 0.0, 0.0]])
    ran_on = Completion("g", 0, (9, 2, 9), "a", "length", (-1.0,) * 3)
    with pytest.raises(TrainError, match="an eos at token 1 of 3"):
        stack_completions([ran_on], pad_id=2, eos_ids={2})


def test_loss_normaliser() -> None:
    """Completions of 1 and 3 tokens with advantages 4 and -4. One micro-batch: (4 - 12) / 4. Two,
    each with its own token mean, averaged: 0. Ours is the same either way."""
    advantages = torch.tensor([4.0, -4.0])
    mask = torch.tensor([[True, False, False], [True, True, True]])
    local_means = [-4.0 * 1 / 1, 4.0 * 3 / 3]
    assert statistics.fmean(local_means) == 0.0
    whole, _ = on_policy(advantages, mask)
    totals = Totals.sum(Totals.of(mask[row : row + 1]) for row in (0, 1))
    parts = [on_policy(advantages[row : row + 1], mask[row : row + 1], totals)[0] for row in (0, 1)]
    assert whole == sum(parts) == 2.0
    with pytest.raises(TrainError, match="whole step"):
        on_policy(advantages, mask, Totals.of(mask[:1]))


def test_loss_clip_side() -> None:
    """Ratios 2 and 1/2, both advantages positive. ``|ratio - 1| > epsilon`` counts two clipped
    tokens; the lower bound has no effect for a positive advantage, so only one is clipped."""
    ratio = torch.tensor([[2.0, 0.5]])
    assert int(((ratio - 1).abs() > 0.2).sum()) == 2
    found = loss_metrics(
        LossConfig(),
        logprobs=ratio.log(),
        old_logprobs=torch.zeros(1, 2),
        advantages=torch.tensor([1.0]),
        mask=torch.tensor([[True, True]]),
        entropy=torch.zeros(1, 2),
    ).means
    assert (found["clip_high"], found["clip_low"]) == (Mean(1, 2), Mean(0, 2))


def test_loss_kl_sign() -> None:
    """The policy gives the token twice the reference's probability. With the difference reversed,
    k3 is 2 - ln 2 - 1 = 0.31 instead of 1/2 + ln 2 - 1 = 0.19; and subtracting it would reward
    drifting away: the loss must push the logprob back down, so its gradient is positive."""
    policy = torch.zeros((1, 1), dtype=torch.float64, requires_grad=True)
    reference = torch.full((1, 1), -math.log(2), dtype=torch.float64)
    d = policy.detach() - reference
    reversed_k3 = (d.exp() - d - 1).item()
    ours = token_kl(policy, reference, "k3")
    assert round(reversed_k3, 2) == 0.31
    assert round(ours.item(), 2) == 0.19
    loss = policy_loss(
        LossConfig(beta=1.0),
        logprobs=policy,
        old_logprobs=policy.detach(),
        advantages=torch.zeros(1),
        mask=torch.tensor([[True]]),
        totals=Totals(1, 1),
        ref_logprobs=reference,
    )
    (gradient,) = torch.autograd.grad(loss, policy)
    assert gradient.item() == pytest.approx(0.5, abs=1e-12)  # 1 - e^d; float64 rounding


def test_loss_hidden_beta() -> None:
    """A default of 0.04 in the trainer added a KL that the config never mentioned. Ours is 0, and a
    reference without beta, or beta without a reference, stops the step."""
    assert LossConfig().beta == 0.0
    one = torch.zeros((1, 1), dtype=torch.float64)
    for beta, reference in ((0.0, one), (0.04, None)):
        with pytest.raises(TrainError, match="never added or left out silently"):
            policy_loss(
                LossConfig(beta=beta),
                logprobs=one,
                old_logprobs=one,
                advantages=torch.zeros(1),
                mask=torch.tensor([[True]]),
                totals=Totals(1, 1),
                ref_logprobs=reference,
            )
    with pytest.raises(ConfigError, match="beta"):
        LossConfig(beta=-0.04)


def test_loss_sign() -> None:
    """A step of gradient descent must make the better answer more likely: (r A) itself, minimised,
    makes it less likely."""
    advantages = group_advantages([0.0, 2.0], ["g", "g"], "none").values
    _, gradient = on_policy(advantages, torch.ones((2, 1), dtype=torch.bool))
    moved = [-row[0] for row in gradient]
    assert moved == [-0.5, 0.5]
    unsigned = advantages.tolist()
    assert [-a / 2 for a in unsigned] == [0.5, -0.5]
