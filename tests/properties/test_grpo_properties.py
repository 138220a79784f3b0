"""Changes that must not affect a step's loss and gradient, for every loss."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omni_grpo_core.losses import LossConfig
from omni_grpo_core.losses.advantages import group_advantages
from omni_grpo_core.losses.policy_loss import Totals, policy_loss
from omni_grpo_core.losses.spans import token_offsets, token_span

CONFIGS = (
    LossConfig(loss_type="grpo", beta=0.1),
    LossConfig(loss_type="bnpo", beta=0.1, kl_estimator="k2"),
    LossConfig(loss_type="dr_grpo", max_completion_length=9),
    LossConfig(loss_type="dapo", epsilon_high=0.28, delta=2.0),
    LossConfig(loss_type="gspo", epsilon_low=0.05, epsilon_high=0.1, beta=0.1),
    LossConfig(loss_type="cispo", epsilon_low=1.0, epsilon_high=0.5),
)
every_loss = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.loss_type)
few = settings(max_examples=25, deadline=None)
# float64 sums of a few dozen numbers of size 1 in a different order
EXACT = 1e-12

Step = dict[str, Tensor]


@st.composite
def steps(draw: st.DrawFn) -> Step:
    """Up to six completions of up to seven tokens, some rows without a token in the loss."""
    rows = draw(st.integers(1, 6))
    width = draw(st.integers(1, 7))
    lengths = draw(st.lists(st.integers(0, width), min_size=rows, max_size=rows))
    lengths[0] = max(lengths[0], 1)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(scale: float, *shape: int) -> Tensor:
        return scale * torch.randn(shape, generator=generator, dtype=torch.float64)

    logprobs = normal(1.0, rows, width)
    token_level = draw(st.booleans())
    return {
        "logprobs": logprobs,
        "old_logprobs": logprobs + normal(0.4, rows, width),
        "ref_logprobs": logprobs + normal(0.4, rows, width),
        "advantages": normal(1.0, rows, width) if token_level else normal(1.0, rows),
        "rollout_weights": normal(0.3, rows, width).exp(),
        "mask": torch.arange(width) < torch.tensor(lengths)[:, None],
    }


def solve(config: LossConfig, step: Step, totals: Totals | None = None) -> tuple[Tensor, Tensor]:
    """Loss and its gradient with respect to the logprobs."""
    logprobs = step["logprobs"].clone().requires_grad_()
    arguments: dict[str, Any] = {**step, "logprobs": logprobs}
    if config.beta == 0:
        arguments["ref_logprobs"] = None
    loss = policy_loss(config, totals=totals or Totals.of(step["mask"]), **arguments)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return loss.detach(), gradient


def same(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=EXACT)


@every_loss
@few
@given(step=steps(), seed=st.integers(0, 99))
def test_order_of_rows(config: LossConfig, step: Step, seed: int) -> None:
    order = torch.randperm(len(step["mask"]), generator=torch.Generator().manual_seed(seed))
    loss, gradient = solve(config, step)
    moved_loss, moved = solve(config, {name: x[order] for name, x in step.items()})
    same(moved_loss, loss)
    same(moved, gradient[order])


@every_loss
@few
@given(step=steps(), data=st.data())
def test_micro_batches_sum_to_the_step(config: LossConfig, step: Step, data: st.DataObject) -> None:
    """However a step is split over accumulation and ranks: the totals are the whole step's."""
    rows = len(step["mask"])
    cuts = sorted(data.draw(st.sets(st.integers(1, rows - 1)))) if rows > 1 else []
    totals = Totals.of(step["mask"])
    parts = [
        solve(config, {name: x[start:end] for name, x in step.items()}, totals)
        for start, end in zip([0, *cuts], [*cuts, rows], strict=True)
    ]
    loss, gradient = solve(config, step)
    same(torch.stack([part[0] for part in parts]).sum(), loss)
    same(torch.cat([part[1] for part in parts]), gradient)


@every_loss
@few
@given(step=steps(), more=st.integers(1, 5))
def test_padding_further(config: LossConfig, step: Step, more: int) -> None:
    def pad(x: Tensor) -> Tensor:
        if x.ndim == 1:
            return x
        fill = False if x.dtype == torch.bool else torch.nan
        return torch.cat([x, x.new_full((len(x), more), fill)], dim=1)

    loss, gradient = solve(config, step)
    wide_loss, wide = solve(config, {name: pad(x) for name, x in step.items()})
    same(wide_loss, loss)
    same(wide[:, :-more], gradient)
    assert not wide[:, -more:].any()


@every_loss
@few
@given(step=steps())
def test_masking_a_row_equals_omitting_it(config: LossConfig, step: Step) -> None:
    kept = step["mask"].any(-1)
    loss, gradient = solve(config, step)
    short_loss, short = solve(config, {name: x[kept] for name, x in step.items()})
    same(short_loss, loss)
    same(short, gradient[kept])


@every_loss
@few
@given(step=steps())
def test_on_policy_is_the_plain_policy_gradient(config: LossConfig, step: Step) -> None:
    """At ratio 1: minus each token's advantage, with the loss's own divisor."""
    rows, width = step["mask"].shape
    advantages = step["advantages"]
    wide = advantages[:, None].expand(rows, width) if advantages.ndim == 1 else advantages
    step = step | {"old_logprobs": step["logprobs"], "ref_logprobs": step["logprobs"]}
    sequences, tokens = int(step["mask"].any(-1).sum()), int(step["mask"].sum())
    lengths = step["mask"].sum(-1, keepdim=True).clamp(min=1)
    divisor: Any = {
        "grpo": sequences * lengths,
        "gspo": sequences * lengths,
        "dr_grpo": sequences * 9,
    }.get(config.loss_type, tokens)
    weights = step["rollout_weights"]
    if config.loss_type == "gspo" and advantages.ndim == 1:
        # one ratio per sequence: its tokens share the mean of their weights
        inside = torch.where(step["mask"], weights, 0.0)
        weights = inside.sum(-1, keepdim=True) / lengths
    _, gradient = solve(config, step)
    same(gradient, torch.where(step["mask"], -wide * weights / divisor, 0.0))


rewards = st.lists(
    st.tuples(
        st.sampled_from("abc"),
        st.one_of(st.none(), st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(0, 1)),
    ),
    max_size=12,
)


@few
@given(
    rows=rewards,
    scale=st.sampled_from(["group", "batch", "none"]),
    seed=st.randoms(use_true_random=False),
)
def test_advantages_follow_ids_not_positions(rows: list[Any], scale: Any, seed: Any) -> None:
    order = list(range(len(rows)))
    seed.shuffle(order)
    plain = group_advantages([r for _, r in rows], [g for g, _ in rows], scale)
    moved = group_advantages([rows[i][1] for i in order], [rows[i][0] for i in order], scale)
    same(moved.values, plain.values[order])
    assert moved.usable.tolist() == plain.usable[order].tolist()


@few
@given(rows=rewards, shift=st.integers(-3, 3), scale=st.sampled_from(["group", "batch", "none"]))
def test_advantages_of_a_group_sum_to_zero_and_ignore_a_shift(
    rows: list[tuple[Hashable, float | None]], shift: int, scale: Any
) -> None:
    ids = [group for group, _ in rows]
    found = group_advantages([reward for _, reward in rows], ids, scale)
    for group in set(ids):
        members = [at for at, other in enumerate(ids) if other == group]
        # up to twelve numbers of at most 1 / STD_EPSILON
        assert abs(found.values[members].sum().item()) <= 1e-9
    moved = group_advantages([None if r is None else r + shift for _, r in rows], ids, scale)
    # adding 3 to a reward rounds it by 4e-16, which dividing by STD_EPSILON amplifies to 1e-11
    torch.testing.assert_close(moved.values, found.values, rtol=0, atol=1e-9)


@few
@given(data=st.binary(max_size=30), cuts=st.sets(st.integers(1, 29)), at=st.data())
def test_spans_cover_the_characters_and_no_unneeded_tokens(
    data: bytes, cuts: set[int], at: st.DataObject
) -> None:
    """Any bytes, cut anywhere: decoding the tokens before a span never reaches into it."""
    inner = sorted(cut for cut in cuts if cut < len(data))
    pieces = [data[a:b] for a, b in zip([0, *inner], [*inner, len(data)], strict=True)]
    text = data.decode(errors="replace")
    offsets = token_offsets(pieces, text)
    start = at.draw(st.integers(0, len(text)))
    end = at.draw(st.integers(start, len(text)))
    first, last = token_span(offsets, start, end)
    if start == end:
        assert first == last
        return
    before = len(b"".join(pieces[:first]).decode(errors="ignore"))
    through = b"".join(pieces[:last]).decode(errors="replace")
    assert before <= start
    assert len(through) >= end
    assert all(
        offsets.starts[token] < end and offsets.ends[token] > start for token in range(first, last)
    )
