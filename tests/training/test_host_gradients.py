"""Gradients that leave the device change no number, and none is left on it."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import cast

import pytest
import torch
from host_gradient_runs import OPTIMIZERS, PLAN, Small, same, small_blocks, three_steps, window
from torch import Tensor, nn

from omni_grpo_core.training.host_gradients import HostGradients
from omni_grpo_core.training.micro_batches import MicroBatch
from omni_grpo_core.training.step import SingleProcess, Update, optimize


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_three_steps_are_the_same_to_the_last_bit(name: str, parts: int) -> None:
    """Two updates on each window, all of them clipped. What no row reaches is not stepped."""
    wanted = three_steps(name, parts)
    assert min(wanted.norms) > 2 * PLAN.max_grad_norm
    assert [state == {} for state in wanted.states] == [False, True, *[False] * 4]
    assert same(three_steps(name, parts, small_blocks), wanted)


@pytest.mark.parametrize("broken", [False, True])
def test_an_update_that_is_not_made_leaves_nothing_behind(broken: bool) -> None:
    """Forbidden, or with a gradient of NaN. The next one is that of a model that never had it."""
    model = Small(torch.float32, "cpu")
    start = copy.deepcopy(model.state_dict())
    learning = [*model.parameters()]
    optimizer, host = torch.optim.SGD(learning, lr=1.0), HostGradients(learning)
    given = window(3)
    spoilt = [replace(micro, advantages=micro.advantages * math.nan) for micro in given]

    def update(window: list[MicroBatch], allowed: bool) -> Update:
        plan, team = replace(PLAN, iterations=1), SingleProcess()
        (found,) = optimize(
            plan, team, model, model, optimizer, window, may_step=lambda _: allowed, host=host
        )
        return found

    with host.attached():
        refused = update(spoilt if broken else given, broken)
        assert not refused.stepped
        assert refused.finite is not broken
        assert all(torch.equal(model.state_dict()[name], start[name]) for name in start)
        assert all(host.gradient(parameter) is None for parameter in learning)
        second = update(given, True)
    assert second.stepped
    if not broken:
        assert second.grad_norm == refused.grad_norm


def test_an_earlier_micro_batch_that_is_lost_is_seen() -> None:
    """What the comparison above is worth."""

    class Forgetful(HostGradients):
        def _leave(self, parameter: Tensor) -> None:
            self._norms.pop(cast(nn.Parameter, parameter), None)
            super()._leave(parameter)

    wanted = three_steps("adamw", 3)
    assert not same(three_steps("adamw", 3, Forgetful), wanted)
    assert same(three_steps("adamw", 1, Forgetful), three_steps("adamw", 1))
