"""Every public function of the losses refuses a tensor that broadcasting would have expanded.

Torch accepts ``(1, C)`` with ``(N, C)`` everywhere, and gives a wrong loss that looks right.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

import pytest
import torch
from torch import Tensor

from omni_grpo_core.errors import TrainError
from omni_grpo_core.losses import (
    LossConfig,
    RolloutCorrection,
    logprobs,
    metrics,
    policy_loss,
    spans,
)
from omni_grpo_core.losses.policy_loss import Totals

N, C, V = 2, 3, 5
MASK = torch.ones(N, C, dtype=torch.bool)
TOKENS = torch.full((N, C), -0.5)
LOSS: dict[str, Any] = {
    "config": LossConfig(beta=0.1),
    "logprobs": TOKENS,
    "old_logprobs": TOKENS,
    "advantages": torch.tensor([1.0, -1.0]),
    "mask": MASK,
    "ref_logprobs": TOKENS,
}
ROLLOUT = {"rollout_weights": TOKENS, "rollout_logprobs": TOKENS}
RIGHT: dict[Callable[..., Any], dict[str, Any]] = {
    logprobs.predicting_logits: {"logits": torch.zeros(N, C + 1, V), "width": C},
    logprobs.completion_logprobs: {
        "predicting": torch.zeros(N, C, V),
        "ids": torch.zeros(N, C, dtype=torch.int64),
        "mask": MASK,
        "temperature": 1.0,
        "suppressed": torch.zeros(V, dtype=torch.bool),
    },
    policy_loss.policy_loss: {**LOSS, **ROLLOUT, "totals": Totals(N, N * C)},
    policy_loss.token_losses: {**LOSS, **ROLLOUT},
    policy_loss.policy_ratio: {k: LOSS[k] for k in ("config", "logprobs", "old_logprobs", "mask")},
    policy_loss.reduce_loss: {
        "config": LossConfig(),
        "per_token": TOKENS,
        "mask": MASK,
        "totals": Totals(N, N * C),
    },
    policy_loss.token_kl: {"logprobs": TOKENS, "ref_logprobs": TOKENS, "estimator": "k3"},
    policy_loss.rollout_weights: {
        "old_logprobs": TOKENS,
        "rollout_logprobs": TOKENS,
        "mask": MASK,
        "correction": RolloutCorrection(),
    },
    metrics.loss_metrics: {**LOSS, "entropy": TOKENS},
    spans.token_advantages: {"base": torch.tensor([1.0, -1.0]), "mask": MASK, "partial": ()},
}
"""Every public function that takes tensors, with valid arguments."""
NAMES = {
    "ref_logprobs": "reference logprobs",
    "base": "advantages",
    "per_token": "per-token losses",
    "ids": "completion ids",
    "predicting": "predicting logits",
}
"""What the errors call an argument, if not its own name with spaces."""


def tensors(function: Callable[..., Any]) -> list[str]:
    hints = get_type_hints(function)
    return [name for name in inspect.signature(function).parameters
            if hints[name] in (Tensor, Tensor | None)]  # fmt: skip


def cases() -> list[Any]:
    found = []
    for function in RIGHT:
        for name in tensors(function):
            # on its own, a mask or a batch of logits is right with any number of rows
            rows = name not in ("mask", "logits") and function is not policy_loss.token_kl
            for wrong in ("one row", "one dimension more") if rows else ("one dimension more",):
                label = f"{function.__name__}: {name} of {wrong}"
                found.append(pytest.param(function, name, wrong, id=label))
    return found


@pytest.mark.parametrize(("function", "name", "wrong"), cases())
def test_another_shape_is_an_error_that_names_the_argument(
    function: Callable[..., Any], name: str, wrong: str
) -> None:
    right = RIGHT[function]
    function(**right)
    bad = right[name][:1] if wrong == "one row" else right[name][None]
    with pytest.raises(TrainError) as caught:
        function(**{**right, name: bad})
    error = caught.value
    if function is not policy_loss.token_kl:  # either of its two tensors may be the wrong one
        assert error.item == NAMES.get(name, name.replace("_", " "))
    assert str(tuple(bad.shape)) in error.got + error.want
    assert "shape" in error.want or "(N, K, V)" in error.want


def test_the_table_lists_every_public_function_that_takes_tensors() -> None:
    public = {
        function
        for module in (logprobs, metrics, policy_loss, spans)
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if not name.startswith("_") and function.__module__ == module.__name__
    }
    assert {function for function in public if tensors(function)} == set(RIGHT)
