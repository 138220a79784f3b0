"""Weights of tokens solved from gradients that autograd computed: known losses, read back.

float32 residuals are roundings of about 1e-7 of a logprob near 10, so 1e-5 is a generous limit;
bfloat16 rounds a gradient by up to 2**-9 of itself, so a weight by no more than 2**-8.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from omni_grpo_core.recorder.token_entropy import weights_at_hidden, weights_at_logits
from omni_grpo_core.recorder.token_weights import TokenWeights, at_hidden, at_logits

V, P, H = 50, 6, 12
EXACT, BF16 = 1e-5, 2.0**-8


@pytest.fixture
def scores() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(P, V) * 3


@pytest.fixture
def ids() -> Tensor:
    return torch.tensor([3, 1, 4, 15, 9, 26])


WEIGHTS = torch.tensor([-0.5, 0.25, -1e-4, 2.0, -0.01, 0.125])


def read(
    scores: Tensor, ids: Tensor, temperature: float = 1.0, following: Tensor | None = None,
    left_out: tuple[int, ...] = (),
) -> TokenWeights:  # fmt: skip
    logits = scores.clone().requires_grad_()
    scaled = logits.float() / temperature
    scaled = scaled.index_fill(-1, torch.tensor(left_out, dtype=torch.long), -torch.inf)
    logprobs = scaled.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    (WEIGHTS * logprobs).sum().backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    return at_logits(scores, logits.grad, ids if following is None else following)


def one_row(scores: Tensor, gradient: Tensor, ids: Tensor, *warm: float) -> TokenWeights:
    where = torch.zeros(P, dtype=torch.long), torch.arange(P)
    return weights_at_logits(scores[None], gradient[None], where, ids, warm)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.6])
def test_weights_tokens_and_temperature_come_back(
    scores: Tensor, ids: Tensor, temperature: float
) -> None:
    found = read(scores, ids, temperature)
    assert torch.equal(found.tokens, ids)
    torch.testing.assert_close(found.weights, WEIGHTS, rtol=EXACT, atol=0)
    torch.testing.assert_close(found.temperature, torch.full((P,), temperature), rtol=EXACT, atol=0)
    assert float(found.residual.max()) < EXACT


@pytest.mark.parametrize("candidate", [1.0, 1.7])
def test_a_log_softmax_in_16_bits_is_neither_an_entropy_nor_another_temperature(
    scores: Tensor, ids: Tensor, candidate: float
) -> None:
    """Rounding at 1.7 was read as weights of 20 that cancel at a temperature of 1, exactly."""
    logits = scores.clone().requires_grad_()
    logprobs = (logits.bfloat16() / 1.7).log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    (WEIGHTS * logprobs).sum().backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    found = one_row(scores, logits.grad, ids, candidate)
    assert not bool(found.entropy.any())
    assert float(found.residual.min()) > BF16 / 4
    assert float(found.temperature.median()) == pytest.approx(1.7, rel=4 * BF16)


@pytest.mark.parametrize("bonus", [0.05, 0.02, -0.05])
def test_an_entropy_comes_back_beside_the_weights(
    scores: Tensor, ids: Tensor, bonus: float
) -> None:
    """The slope of log |g| is no temperature then: it is one of those that are known."""
    logits = scores.clone().requires_grad_()
    logprobs = (logits / 1.6).log_softmax(-1)
    chosen = (WEIGHTS * logprobs.gather(-1, ids[:, None])[:, 0]).sum()
    entropy = -(logprobs.exp() * logprobs).sum()
    (chosen - bonus * entropy).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    found = one_row(scores, logits.grad, ids, 1.0, 1.6)
    assert torch.equal(found.tokens, ids)
    torch.testing.assert_close(found.entropy, torch.full((P,), -bonus), rtol=EXACT, atol=0)
    torch.testing.assert_close(found.weights, WEIGHTS, rtol=EXACT, atol=EXACT * abs(bonus))
    # read from what the entropy leaves, of which rounding is a larger part
    off = (found.temperature - 1.6).abs()
    assert bool((off <= EXACT * (1 + abs(bonus) / WEIGHTS.abs())).all())
    assert float(found.residual.max()) < EXACT


def test_an_entropy_is_told_over_a_row_where_tokens_are_nearly_sure(ids: Tensor) -> None:
    """Of a sure distribution the entropy's gradient is that of its token: read by itself, each
    position of the tiny checkpoint gave the bonus up to 3 %, and a weight as much off."""
    scores = torch.linspace(-2, 2, V).repeat(P, 1).roll(7, -1)
    scores = scores.scatter(-1, ids[:, None], torch.linspace(4.0, 14.0, P)[:, None])
    logits = scores.clone().requires_grad_()
    logprobs = logits.log_softmax(-1)
    chosen = 0.25 * logprobs.gather(-1, ids[:, None]).sum()
    (chosen + 0.02 * (logprobs.exp() * logprobs).sum()).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    found = one_row(scores, logits.grad, ids, 1.0)
    torch.testing.assert_close(found.entropy, torch.full((P,), -0.02), rtol=1e-3, atol=0)
    torch.testing.assert_close(found.weights, torch.full((P,), 0.25), rtol=EXACT, atol=0)


def test_a_row_of_nothing_but_an_entropy_has_no_weight(scores: Tensor, ids: Tensor) -> None:
    logits = scores.clone().requires_grad_()
    logprobs = logits.log_softmax(-1)
    (0.01 * (logprobs.exp() * logprobs).sum()).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    found = one_row(scores, logits.grad, ids, 1.0)
    assert not bool(found.weights.any())
    assert found.tokens.tolist() == [-1] * P
    torch.testing.assert_close(found.entropy, torch.full((P,), -0.01), rtol=EXACT, atol=0)


def test_the_trained_token_is_found_where_it_is_not_the_next(scores: Tensor, ids: Tensor) -> None:
    found = read(scores, ids, following=ids + 1)
    assert torch.equal(found.tokens, ids)


def test_suppressed_ids_are_no_part_of_the_softmax(scores: Tensor, ids: Tensor) -> None:
    found = read(scores, ids, 0.9, left_out=(0, 7, 30))
    torch.testing.assert_close(found.weights, WEIGHTS, rtol=EXACT, atol=0)
    assert float(found.residual.max()) < EXACT


def test_a_token_the_model_is_sure_of_keeps_its_weight(ids: Tensor) -> None:
    """1 - p is 2e-6: in float32 the token's own gradient keeps one digit, the others' all."""
    scores = torch.zeros(P, V)
    scores[:, 5:] = torch.linspace(-2, 2, V - 5)
    scores = scores.scatter(-1, ids[:, None], 18.5)
    found = read(scores, ids)
    assert torch.equal(found.tokens, ids)
    torch.testing.assert_close(found.weights, WEIGHTS, rtol=EXACT, atol=0)
    assert float(found.residual.max()) < 0.1


def test_two_tokens_pull_alike_and_the_sequence_decides() -> None:
    scores = torch.full((1, V), -torch.inf)
    scores[0, :3] = torch.tensor([1.0, 1.5, -torch.inf])
    gradient = torch.zeros(1, V)
    gradient[0, :2] = torch.tensor([0.25, -0.25])
    assert at_logits(scores, gradient, torch.tensor([0])).tokens.tolist() == [0]
    assert at_logits(scores, gradient, torch.tensor([1])).tokens.tolist() == [1]


def test_bfloat16_logits(scores: Tensor, ids: Tensor) -> None:
    found = read(scores.bfloat16(), ids, 1.2)
    assert torch.equal(found.tokens, ids)
    torch.testing.assert_close(found.weights, WEIGHTS, rtol=BF16, atol=0)
    # the slope is that of 49 roundings over logits that vary by 3
    torch.testing.assert_close(found.temperature, torch.full((P,), 1.2), rtol=1e-3, atol=0)
    assert float(found.residual.max()) < BF16


def test_another_term_is_what_remains(scores: Tensor, ids: Tensor) -> None:
    """An entropy bonus of a hundredth of each token's weight is no function of its logprob: most of
    it is fitted as a temperature one hundredth off, and not all."""
    logits = scores.clone().requires_grad_()
    logprobs = logits.log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    loss = -logprobs.gather(-1, ids[:, None]).mean() - 0.01 * entropy.mean()
    loss.backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    found = at_logits(scores, logits.grad, ids)
    assert float(found.residual.min()) > 10 * EXACT
    assert bool((found.temperature - 0.99).abs().max() < 1e-3)


def hidden(ids: Tensor, temperature: float, dtype: torch.dtype = torch.float32) -> TokenWeights:
    torch.manual_seed(1)
    head, state = torch.randn(V, H, dtype=dtype), torch.randn(P, H, dtype=dtype, requires_grad=True)
    logprobs = ((state @ head.T).float() / temperature).log_softmax(-1)
    (WEIGHTS * logprobs.gather(-1, ids[:, None])[:, 0]).sum().backward()  # type: ignore[no-untyped-call]
    assert state.grad is not None
    near = torch.stack([torch.tensor([3, 1, 4, 15, 9, 2]), torch.tensor([1, 4, 15, 9, 26, -1])], 1)
    return at_hidden(state.detach(), state.grad, near, head, [1.0, 1.5])


def test_without_logits_the_input_of_the_head_tells(ids: Tensor) -> None:
    found = hidden(torch.tensor([3, 1, 4, 15, 9, 2]), 1.6)
    assert found.tokens.tolist() == [3, 1, 4, 15, 9, 2]
    torch.testing.assert_close(found.weights, WEIGHTS, rtol=1e-4, atol=0)
    torch.testing.assert_close(found.temperature, torch.full((P,), 1.6), rtol=1e-4, atol=0)
    assert float(found.residual.max()) < 1e-4


def test_without_logits_an_entropy_comes_back(ids: Tensor) -> None:
    torch.manual_seed(1)
    head, state = torch.randn(V, H), torch.randn(P, H, requires_grad=True)
    logprobs = (state @ head.T / 1.6).log_softmax(-1)
    chosen = (WEIGHTS * logprobs.gather(-1, ids[:, None])[:, 0]).sum()
    (chosen + 0.02 * (logprobs.exp() * logprobs).sum()).backward()  # type: ignore[no-untyped-call]
    assert state.grad is not None
    near, rows = torch.stack([ids, ids + 1], 1), torch.zeros(P, dtype=torch.long)
    found = weights_at_hidden(state.detach(), state.grad, rows, near, head, (1.0, 1.6))
    torch.testing.assert_close(found.entropy, torch.full((P,), -0.02), rtol=1e-4, atol=0)
    torch.testing.assert_close(found.weights, WEIGHTS, rtol=1e-4, atol=2e-6)
    assert float(found.residual.max()) < 1e-4


def test_without_logits_a_neighbour_may_be_the_trained_token() -> None:
    """Five of six positions are trained on the token after the next."""
    found = hidden(torch.tensor([1, 4, 15, 9, 26, 2]), 0.8)
    assert found.tokens.tolist() == [1, 4, 15, 9, 26, 2]
    assert float(found.residual.max()) < 1e-4


def test_without_logits_another_target_remains_unexplained() -> None:
    assert float(hidden(torch.full((P,), 40), 1.0).residual.min()) > 0.1
