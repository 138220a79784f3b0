"""On-policy and splitting invariants of the step, on the tiny model and a mixed, padded batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from omni_grpo_core.core.batch import collate
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.core.rollout import rollout
from omni_grpo_core.errors import ConfigError
from omni_grpo_core.losses import LossConfig, RolloutCorrection
from omni_grpo_core.training.micro_batches import MicroBatch, make_micro_batches
from omni_grpo_core.training.step import Scorer, SingleProcess, StepPlan, Update, optimize, scoring
from omni_grpo_core.types import Batch, Rollout

GROUP = 2
TEMPERATURE = 3.0  # the shipped policy is confident: at 1 there is no gradient to compare
PLAN = StepPlan(LossConfig(), None, iterations=1, max_grad_norm=1e9, gradient_checkpointing=False)
ADVANTAGES = torch.tensor([1.0, -0.5, 0.25, -2.0, 1.5, 0.75, -1.0, 0.5] * 2, dtype=torch.float64)
KEPT = torch.tensor([True] * 3 + [False] + [True] * 12)


class Still(torch.optim.SGD):
    """Keeps the gradients of its last step and changes nothing."""

    def __init__(self, model: nn.Module) -> None:
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        super().__init__([p for _, p in named], lr=0.0)
        self.named = named
        self.grads: dict[str, Tensor] = {}

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.grads = {n: p.grad.clone() for n, p in self.named if p.grad is not None}


@pytest.fixture(scope="module")
def rolled(policy: Policy, mixed: Batch) -> Rollout:
    return rollout(
        policy, mixed, group_size=GROUP, max_new_tokens=10, temperature=TEMPERATURE, seed=3
    )


@pytest.fixture(autouse=True)
def untouched(policy: Policy) -> Iterator[None]:
    yield
    policy.model.zero_grad()
    policy.model.requires_grad_(True).eval()


def gradient(
    policy: Policy, window: Sequence[MicroBatch], plan: StepPlan = PLAN, **options: Any
) -> tuple[Update, dict[str, Tensor]]:
    optimizer = Still(policy.model)
    scorer = Scorer(policy, TEMPERATURE)
    (update,) = optimize(plan, SingleProcess(), scorer, policy.model, optimizer, window, **options)
    return update, optimizer.grads


def whole(policy: Policy, mixed: Batch, rolled: Rollout, size: int = 16) -> tuple[MicroBatch, ...]:
    return make_micro_batches(policy, mixed, rolled, ADVANTAGES, KEPT, size)


def assert_same(
    found: tuple[Update, dict[str, Tensor]], want: tuple[Update, dict[str, Tensor]]
) -> None:
    # float32 sums in another order; a lost row or a wrong divisor is a sixteenth of the step or
    # more
    assert found[0].loss == pytest.approx(want[0].loss, abs=1e-5)
    assert found[0].grad_norm == pytest.approx(want[0].grad_norm, rel=1e-4)
    assert found[1].keys() == want[1].keys()
    for name, grad in want[1].items():
        torch.testing.assert_close(found[1][name], grad, atol=1e-4 * want[0].grad_norm, rtol=0)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.4])
def test_the_first_ratio_is_1_for_every_row(
    policy: Policy, mixed: Batch, temperature: float
) -> None:
    rolled = rollout(
        policy, mixed, group_size=GROUP, max_new_tokens=10, temperature=temperature, seed=1
    )
    (micro,) = whole(policy, mixed, rolled)
    with torch.no_grad(), scoring(policy.model, checkpointing=False):
        logprobs, _ = Scorer(policy, temperature)(micro.batch, micro.ids, micro.mask)
    ratios = torch.exp(logprobs - micro.rollout_logprobs)[micro.mask]
    assert len(ratios) > 16
    assert (ratios - 1).abs().max() < 1e-5


def test_the_drift_reveals_scoring_at_another_temperature(
    policy: Policy, mixed: Batch, rolled: Rollout
) -> None:
    update, _ = gradient(policy, whole(policy, mixed, rolled))
    assert update.metrics.peaks["drift_max"] < 1e-5
    scorer = Scorer(policy, 1.0)
    window = whole(policy, mixed, rolled)
    (off,) = optimize(PLAN, SingleProcess(), scorer, policy.model, Still(policy.model), window)
    assert off.metrics.peaks["drift_max"] > 1e-3


QUICK = {("dapo", 6), ("grpo", 6), ("gspo", 6), ("cispo", 6), ("dapo", 1), ("gspo", 2)}


@pytest.mark.parametrize(
    ("loss_type", "size"),
    [
        pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow)
        for pair in product(("dapo", "grpo", "gspo", "cispo"), (1, 2, 6))
    ],
)
def test_micro_batches_of_any_size_sum_to_the_step(
    policy: Policy, mixed: Batch, rolled: Rollout, loss_type: Any, size: int
) -> None:
    plan = replace(PLAN, loss=LossConfig(loss_type=loss_type))
    want = gradient(policy, whole(policy, mixed, rolled), plan)
    assert want[0].grad_norm > 1e-3
    assert_same(gradient(policy, whole(policy, mixed, rolled, size), plan), want)


def test_the_order_of_the_rows_does_not_matter(
    policy: Policy, mixed: Batch, rolled: Rollout
) -> None:
    order = [5, 0, 7, 2, 1, 6, 3, 4]
    backwards = collate([mixed.rows[i] for i in order], policy.pad_token_id)
    at = [2 * i + g for i in order for g in range(GROUP)]
    moved = replace(rolled, completions=tuple(rolled.completions[i] for i in at))
    window = make_micro_batches(policy, backwards, moved, ADVANTAGES[at], KEPT[at], 16)
    assert_same(gradient(policy, window), gradient(policy, whole(policy, mixed, rolled)))


def test_padding_further_does_not_matter(policy: Policy, mixed: Batch, rolled: Rollout) -> None:
    (micro,) = whole(policy, mixed, rolled)
    wider = replace(
        micro,
        ids=nn.functional.pad(micro.ids, (0, 5), value=policy.pad_token_id),
        mask=nn.functional.pad(micro.mask, (0, 5)),
        in_loss=nn.functional.pad(micro.in_loss, (0, 5)),
        rollout_logprobs=nn.functional.pad(micro.rollout_logprobs, (0, 5)),
        batch=replace(
            micro.batch,
            input_ids=nn.functional.pad(micro.batch.input_ids, (7, 0), value=policy.pad_token_id),
            attention_mask=nn.functional.pad(micro.batch.attention_mask, (7, 0)),
        ),
    )
    assert_same(gradient(policy, [wider]), gradient(policy, [micro]))


def test_a_row_that_is_not_kept_has_no_effect(
    policy: Policy, mixed: Batch, rolled: Rollout
) -> None:
    kept = torch.tensor([True] * 14 + [False] * 2)
    window = make_micro_batches(policy, mixed, rolled, ADVANTAGES, kept, 16)
    fewer = collate(mixed.rows[:7], policy.pad_token_id)
    short = replace(rolled, completions=rolled.completions[:14])
    want = gradient(
        policy, make_micro_batches(policy, fewer, short, ADVANTAGES[:14], kept[:14], 14)
    )
    assert_same(gradient(policy, window), want)


def test_nothing_in_the_loss_is_no_update(policy: Policy, mixed: Batch, rolled: Rollout) -> None:
    window = make_micro_batches(
        policy, mixed, rolled, ADVANTAGES, torch.zeros(16, dtype=torch.bool), 8
    )
    optimizer = Still(policy.model)
    scorer = Scorer(policy, TEMPERATURE)
    assert optimize(PLAN, SingleProcess(), scorer, policy.model, optimizer, window) == ()
    assert optimizer.grads == {}


def test_checkpointing_changes_no_gradient_and_is_off_outside_scoring(
    policy: Policy, mixed: Batch, rolled: Rollout
) -> None:
    want = gradient(policy, whole(policy, mixed, rolled))
    seen = []
    # inside a block: since 5.23 hooks of the block itself are outside the recomputed part
    hook = policy.text_model.layers[0].self_attn.register_forward_pre_hook(
        lambda *_: seen.append(policy.model.is_gradient_checkpointing)
    )
    plan = replace(PLAN, gradient_checkpointing=True)
    found = gradient(policy, whole(policy, mixed, rolled), plan)
    hook.remove()
    assert_same(found, want)
    assert seen == [True, True], "once forward, once again for the backward pass"
    assert not policy.model.is_gradient_checkpointing
    assert not policy.model.training


@pytest.mark.parametrize("wanted", [False, True])
def test_attention_adds_up_in_one_order_where_that_is_wanted(
    policy: Policy, mixed: Batch, rolled: Rollout, wanted: bool
) -> None:
    """With a warning only, as a killed and resumed run of 7B was first tried, its backward pass
    keeps the kernel whose last digits change from run to run."""
    seen = []
    hook = policy.text_model.layers[0].register_full_backward_pre_hook(
        lambda *_: seen.append(
            (
                torch.are_deterministic_algorithms_enabled(),
                torch.is_deterministic_algorithms_warn_only_enabled(),
            )
        )
    )
    gradient(policy, whole(policy, mixed, rolled), replace(PLAN, full_determinism=wanted))
    hook.remove()
    assert seen == [(wanted, False)]
    assert not torch.are_deterministic_algorithms_enabled()


def test_later_iterations_keep_the_old_logprobs(
    policy: Policy, mixed: Batch, rolled: Rollout
) -> None:
    weights = {name: value.clone() for name, value in policy.model.state_dict().items()}
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.05)
    plan = replace(PLAN, iterations=2, correction=RolloutCorrection())
    rates: list[int] = []
    first, second = optimize(
        plan, SingleProcess(), Scorer(policy, TEMPERATURE), policy.model, optimizer,
        whole(policy, mixed, rolled, 4), set_rate=rates.append,
    )  # fmt: skip
    policy.model.load_state_dict(weights)
    assert rates == [0, 1]
    assert first.metrics.values()["ratio"] == pytest.approx(1.0, abs=1e-6)
    assert second.metrics.peaks["ratio_max"] > 1.01, "the weights have moved since"
    assert "drift" not in second.metrics.means


def test_a_forbidden_update_changes_nothing(policy: Policy, mixed: Batch, rolled: Rollout) -> None:
    before = policy.model.lm_head.weight.clone()
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=1.0)
    (update,) = optimize(
        replace(PLAN, iterations=3), SingleProcess(), Scorer(policy, TEMPERATURE), policy.model,
        optimizer, whole(policy, mixed, rolled), may_step=lambda update: False,
    )  # fmt: skip
    assert not update.stepped
    assert torch.equal(policy.model.lm_head.weight, before)
    assert policy.model.lm_head.weight.grad is None


def test_micro_batches_hold_equally_many_completions_of_each_prompt(
    policy: Policy, mixed: Batch, rolled: Rollout
) -> None:
    """Three completions fit, and the second of a prompt would be alone: two are taken."""
    assert {micro.ids.shape[0] for micro in whole(policy, mixed, rolled, 3)} == {GROUP}


def test_processes_with_fewer_completions_have_as_many_micro_batches(
    policy: Policy, mixed: Batch, rolled: Rollout
) -> None:
    """Elsewhere there are three of each prompt: one at a time, each prompt takes three turns. The
    turn in which there is nothing left is scored and counts for nothing."""
    parts = make_micro_batches(
        policy, mixed, rolled, ADVANTAGES, torch.ones_like(KEPT), 1, most=GROUP + 1
    )
    assert len(parts) == (GROUP + 1) * len(mixed.rows)
    assert [bool(part.in_loss.any()) for part in parts[:3]] == [False, True, True]
    assert sum(int(part.in_loss.sum()) for part in parts) == sum(
        len(completion.token_ids) for completion in rolled.completions
    )


class Frozen(nn.Module):
    """What a forward through frozen towers only returns."""

    def forward(self, batch: Batch, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros(ids.shape), torch.zeros(ids.shape)


def test_rows_from_which_nothing_learns_are_an_input_error(
    policy: Policy, mixed: Batch, rolled: Rollout
) -> None:
    """A case that cannot be detected earlier: a silent clip, with all frozen but the audio tower.
    It was a RuntimeError of torch, reported as an internal error."""
    window = whole(policy, mixed, rolled)
    with pytest.raises(ConfigError, match="freeze: found a micro-batch from which nothing learns"):
        optimize(PLAN, SingleProcess(), Frozen(), policy.model, Still(policy.model), window)
