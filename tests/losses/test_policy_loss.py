from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from omni_grpo_core.errors import TrainError
from omni_grpo_core.losses import LossConfig
from omni_grpo_core.losses.policy_loss import Totals, policy_loss, policy_ratio

MASK = torch.tensor([[True, True, True, False], [True, True, False, False], [True] * 4])
LOSSES: tuple[dict[str, Any], ...] = (
    {"loss_type": "grpo"},
    {"loss_type": "bnpo"},
    {"loss_type": "dapo"},
    {"loss_type": "dr_grpo", "max_completion_length": 5},
    {"loss_type": "gspo"},
    {"loss_type": "luspo"},
    {"loss_type": "dapo", "off_policy_mask_threshold": 0.01},
)
KL: tuple[dict[str, Any], ...] = (
    {},
    {"beta": 0.3, "kl_estimator": "k1", "kl_weighted": True},
    {"beta": 0.3, "kl_estimator": "k2"},
    {"beta": 0.3, "kl_estimator": "k3"},
    {"beta": 0.3, "kl_estimator": "k3", "kl_weighted": True},
)


def step(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logprobs = -torch.rand(MASK.shape, generator=generator, dtype=torch.float64) * 3
    noise = torch.randn((2, *MASK.shape), generator=generator, dtype=torch.float64) * 0.5
    return {
        "logprobs": logprobs,
        "old_logprobs": logprobs + noise[0],
        "ref_logprobs": logprobs + noise[1],
        "advantages": torch.tensor([1.5, -1.0, -0.5], dtype=torch.float64),
        "mask": MASK,
    }


def loss_of(config: LossConfig, data: dict[str, Tensor], **changes: Any) -> Tensor:
    arguments: dict[str, Any] = {**data, "totals": Totals.of(MASK), **changes}
    if config.beta == 0:
        arguments["ref_logprobs"] = None
    return policy_loss(config, **arguments)


def numeric_gradient(value: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Central differences. A step of 1e-6 leaves an error of about 1e-10 in float64."""
    gradient = torch.zeros_like(at)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in at.shape)).tolist():
        move = torch.zeros_like(at)
        move[tuple(index)] = 1e-6
        gradient[tuple(index)] = (value(at + move) - value(at - move)) / 2e-6
    return gradient


def gradient_of(value: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    variable = at.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(variable), variable)
    return gradient


@pytest.mark.parametrize("kl", KL, ids=str)
@pytest.mark.parametrize("delta", [None, 1.3])
@pytest.mark.parametrize("settings", LOSSES, ids=lambda s: s["loss_type"])
def test_finite_differences(
    settings: dict[str, Any], kl: dict[str, Any], delta: float | None
) -> None:
    config, data = LossConfig(delta=delta, **settings, **kl), step()

    def value(logprobs: Tensor) -> Tensor:
        return loss_of(config, data, logprobs=logprobs)

    expected = numeric_gradient(value, data["logprobs"])
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(gradient_of(value, data["logprobs"]), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("kl", KL, ids=str)
def test_finite_differences_of_sapo(kl: dict[str, Any]) -> None:
    config, data = LossConfig(loss_type="sapo", **kl), step()

    def value(logprobs: Tensor) -> Tensor:
        return loss_of(config, data, logprobs=logprobs)

    expected = numeric_gradient(value, data["logprobs"])
    torch.testing.assert_close(gradient_of(value, data["logprobs"]), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("kl", KL, ids=str)
def test_finite_differences_of_vespo(kl: dict[str, Any]) -> None:
    """The weight is constant in the gradient, so the differences use a loss where it is fixed."""
    config, data = LossConfig(loss_type="vespo", **kl), step()
    still = torch.zeros(3, dtype=torch.float64)
    ratio = torch.where(MASK, data["logprobs"] - data["old_logprobs"], 0.0).sum(-1).exp()
    powers, decays = (torch.tensor(v) for v in ([2.0, 3.0, 3.0], [3.0, 2.0, 2.0]))
    phi = (ratio**powers * torch.exp(decays * (1 - ratio)))[:, None]

    def frozen(logprobs: Tensor) -> Tensor:
        policy = -(phi * data["advantages"][:, None] * logprobs)[MASK].sum() / MASK.sum()
        return policy + loss_of(config, data, logprobs=logprobs, advantages=still)

    found = gradient_of(lambda x: loss_of(config, data, logprobs=x), data["logprobs"])
    expected = numeric_gradient(frozen, data["logprobs"])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("loss_type", ["sapo", "vespo", "luspo"])
def test_where_the_policy_sampled_itself_new_losses_are_the_policy_gradient(loss_type: Any) -> None:
    """At a ratio of 1 every loss has the gradient -A, divided by what it divides by."""
    data = step()
    data["old_logprobs"] = data["logprobs"]
    gradient = gradient_of(
        lambda x: loss_of(LossConfig(loss_type=loss_type), data, logprobs=x), data["logprobs"]
    )
    divisor = {
        "sapo": 3 * MASK.sum(-1, keepdim=True),
        "vespo": MASK.sum(),
        "luspo": torch.tensor(3.0),
    }[loss_type]
    expected = torch.where(MASK, -data["advantages"][:, None] / divisor, 0.0)
    # float64 rounding
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


def test_vespo_corrects_the_rollout_inside_its_weight() -> None:
    """Halving every weight halves W once per token, instead of the loss."""
    data = step()
    config = LossConfig(loss_type="vespo")
    half = torch.full(MASK.shape, 0.5, dtype=torch.float64)
    older = data["old_logprobs"] + math.log(2)
    weighted = loss_of(config, data, rollout_weights=half)
    # float64 rounding
    torch.testing.assert_close(
        weighted, loss_of(config, data, old_logprobs=older), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("kl", KL, ids=str)
def test_finite_differences_of_cispo(kl: dict[str, Any]) -> None:
    """The weight is constant in the gradient, so the differences use a loss where it is fixed."""
    config, data = LossConfig(loss_type="cispo", **kl), step()
    free = LossConfig(loss_type="cispo", epsilon_low=1.0, epsilon_high=1e9, **kl)
    bounded = policy_ratio(config, data["logprobs"], data["old_logprobs"], MASK).clamp(0.8, 1.2)

    def frozen(logprobs: Tensor) -> Tensor:
        policy = -(bounded * data["advantages"][:, None] * logprobs)[MASK].sum() / MASK.sum()
        still = torch.zeros(3, dtype=torch.float64)
        return policy + loss_of(free, data, logprobs=logprobs, advantages=still)

    found = gradient_of(lambda x: loss_of(config, data, logprobs=x), data["logprobs"])
    expected = numeric_gradient(frozen, data["logprobs"])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)


def test_finite_differences_of_gspo_with_token_advantages() -> None:
    """GSPO-token: the ratio has the sequence's value and the token's own derivative."""
    config, data = LossConfig(loss_type="gspo", epsilon_low=0.5, epsilon_high=0.5), step()
    advantages = torch.randn(MASK.shape, generator=torch.Generator().manual_seed(1)).double()
    sequence = policy_ratio(config, data["logprobs"], data["old_logprobs"], MASK)

    def frozen(logprobs: Tensor) -> Tensor:
        ratio = sequence * torch.exp(logprobs - data["logprobs"])
        token = -torch.minimum(ratio * advantages, ratio.clamp(0.5, 1.5) * advantages)
        return ((token * MASK).sum(-1) / MASK.sum(-1)).sum() / 3

    found = gradient_of(
        lambda x: loss_of(config, data, logprobs=x, advantages=advantages), data["logprobs"]
    )
    expected = numeric_gradient(frozen, data["logprobs"])
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)


def test_gspo_of_equal_token_advantages_is_gspo() -> None:
    config, data = LossConfig(loss_type="gspo", epsilon_low=0.1, epsilon_high=0.1), step()
    wide = data["advantages"][:, None].expand(MASK.shape)
    narrow = gradient_of(lambda x: loss_of(config, data, logprobs=x), data["logprobs"])
    token = gradient_of(
        lambda x: loss_of(config, data, logprobs=x, advantages=wide), data["logprobs"]
    )
    torch.testing.assert_close(token, narrow, rtol=0, atol=1e-12)  # rounding of one sum


@pytest.mark.parametrize(
    "settings", [*LOSSES, {"loss_type": "cispo"}], ids=lambda s: s["loss_type"]
)
def test_values_outside_the_mask_have_no_effect(settings: dict[str, Any]) -> None:
    config, data = LossConfig(beta=0.1, **settings), step()
    spoiled = dict(data)
    for name in ("logprobs", "old_logprobs", "ref_logprobs"):
        spoiled[name] = torch.where(MASK, data[name], torch.nan)
    clean = gradient_of(lambda x: loss_of(config, data, logprobs=x), data["logprobs"])
    dirty = gradient_of(lambda x: loss_of(config, spoiled, logprobs=x), spoiled["logprobs"])
    assert loss_of(config, spoiled) == loss_of(config, data)
    assert torch.equal(clean, dirty)
    assert dirty[~MASK].tolist() == [0.0] * 3


@pytest.mark.parametrize("settings", LOSSES, ids=lambda s: s["loss_type"])
def test_ratios_beyond_exp_leave_a_finite_gradient(settings: dict[str, Any]) -> None:
    data = step()
    data["logprobs"] = torch.zeros_like(data["logprobs"]).float()
    data["old_logprobs"] = torch.full_like(data["logprobs"], -800.0)
    data["ref_logprobs"] = torch.full_like(data["logprobs"], 800.0)
    config = LossConfig(beta=0.1, **settings)
    gradient = gradient_of(lambda x: loss_of(config, data, logprobs=x), data["logprobs"])
    assert torch.isfinite(gradient).all()


def test_old_and_reference_policies_get_no_gradient() -> None:
    data = step()
    fixed = {name: data[name].requires_grad_() for name in ("old_logprobs", "ref_logprobs")}
    loss_of(LossConfig(beta=0.1), data | {"logprobs": data["logprobs"].requires_grad_()}).backward()  # type: ignore[no-untyped-call]
    assert [x.grad for x in fixed.values()] == [None, None]


def test_float32_in_float32_out() -> None:
    data = {name: x.float() if x.is_floating_point() else x for name, x in step().items()}
    data["advantages"] = data["advantages"].double()  # as group_advantages returns them
    assert loss_of(LossConfig(), data).dtype == torch.float32


@pytest.mark.parametrize(
    "changes",
    [
        {"advantages": torch.zeros(4)},
        {"advantages": torch.zeros(3, 1)},
        {"advantages": torch.zeros(1, 4)},
        {"advantages": torch.zeros(())},
        {"old_logprobs": torch.zeros(3, 3)},
        {"logprobs": torch.zeros(3, 4, dtype=torch.bfloat16)},
        {"logprobs": torch.full((3, 4), -torch.inf)},
        {"old_logprobs": torch.full((3, 4), torch.nan)},
        {"mask": MASK.long()},
        {"mask": MASK[0]},
        {"totals": Totals(0, 0)},
        {"totals": Totals(3, 8)},
        {"totals": Totals(2, 9)},
        {"rollout_weights": torch.ones(3, 1)},
        {"rollout_weights": torch.full((3, 4), torch.nan)},
        {"advantages": torch.tensor([0.0, torch.nan, 0.0])},
    ],
    ids=str,
)
def test_refusals(changes: dict[str, Any]) -> None:
    with pytest.raises(TrainError):
        loss_of(LossConfig(), step(), **changes)


def test_square_batch_does_not_broadcast_by_column() -> None:
    data = {name: x for name, x in step().items() if name != "advantages"}
    square = {name: torch.cat([x, x[:1]]) for name, x in data.items()}
    square["mask"] = torch.ones(4, 4, dtype=torch.bool)
    square["logprobs"] = square["old_logprobs"] = torch.zeros(4, 4)
    square["advantages"] = torch.tensor([4.0, 0.0, 0.0, 0.0])
    logprobs = square["logprobs"].clone().requires_grad_()
    loss_of(LossConfig(), square | {"logprobs": logprobs}, totals=Totals(4, 16)).backward()  # type: ignore[no-untyped-call]
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [[-0.25] * 4] + [[0.0] * 4] * 3


@pytest.mark.parametrize(("beta", "given"), [(0.1, False), (0.0, True)])
def test_reference_if_and_only_if_beta(beta: float, given: bool) -> None:
    data = step()
    reference = data.pop("ref_logprobs")
    with pytest.raises(TrainError, match="if and only if beta"):
        policy_loss(
            LossConfig(beta=beta),
            **data,
            totals=Totals.of(MASK),
            ref_logprobs=reference if given else None,
        )


def test_totals_ignore_rows_without_tokens() -> None:
    mask = torch.tensor([[True, True], [False, False], [True, False]])
    assert Totals.of(mask) == Totals(sequences=2, tokens=3)
    assert Totals.sum([Totals.of(mask[:1]), Totals.of(mask[1:])]) == Totals.of(mask)
