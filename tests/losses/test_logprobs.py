from __future__ import annotations

import pytest
import torch
from torch import Tensor

from omni_grpo_core.errors import TrainError
from omni_grpo_core.losses import logprobs as module
from omni_grpo_core.losses.logprobs import completion_logprobs, predicting_logits

ROWS, WIDTH, SIZE = 2, 5, 7
MASK = torch.tensor([[True] * 5, [True, True, True, False, False]])


def scores(dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn((ROWS, WIDTH, SIZE), generator=generator)).to(dtype)


def some_ids(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, SIZE - 1, (ROWS, WIDTH), generator=generator)


def plainly(logits: Tensor, ids: Tensor, temperature: float, forbidden: Tensor) -> Tensor:
    log_p = (logits / temperature).masked_fill(forbidden, -torch.inf).log_softmax(-1)
    return torch.where(MASK, log_p.gather(-1, ids[..., None]).squeeze(-1), 0.0)


@pytest.fixture(params=[1, 2 * SIZE, 2**24], ids=["one position", "two", "all"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_SCORES", request.param)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
@pytest.mark.parametrize("last_is_forbidden", [False, True])
def test_equals_log_softmax_in_value_and_gradient(
    temperature: float, last_is_forbidden: bool
) -> None:
    forbidden = torch.zeros(SIZE, dtype=torch.bool)
    forbidden[-1] = last_is_forbidden
    ours, plain = (scores().requires_grad_() for _ in range(2))
    scored = completion_logprobs(
        ours, some_ids(), MASK, temperature=temperature, suppressed=forbidden
    )
    expected = plainly(plain, some_ids(), temperature, forbidden)
    # the same float64 operations, chunk by chunk; 1e-12 allows for the order of summation
    torch.testing.assert_close(scored.logprobs, expected, rtol=0, atol=1e-12)
    weights = torch.arange(10.0, dtype=torch.float64).view(ROWS, WIDTH)
    (scored.logprobs * weights).sum().backward()  # type: ignore[no-untyped-call]
    (expected * weights).sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(ours.grad, plain.grad, rtol=0, atol=1e-12)


def test_gradient_against_finite_differences() -> None:
    def total(logits: Tensor) -> Tensor:
        return completion_logprobs(logits, some_ids(), MASK, temperature=0.8).logprobs

    assert torch.autograd.gradcheck(total, scores().requires_grad_())


def test_entropy_is_that_of_the_sampled_distribution() -> None:
    logits = torch.zeros((1, 1, 4))
    ids, mask = torch.tensor([[0]]), torch.tensor([[True]])
    forbidden = torch.tensor([False, False, False, True])
    of = completion_logprobs(logits, ids, mask, temperature=1.0, suppressed=forbidden)
    assert of.entropy.exp().item() == pytest.approx(3.0, abs=1e-6)  # three equal choices, float32
    assert of.logprobs.exp().item() == pytest.approx(1 / 3, abs=1e-7)
    assert not of.entropy.requires_grad


def test_bf16_logits_are_upcast_and_their_gradient_is_bf16() -> None:
    logits = scores(torch.bfloat16).requires_grad_()
    scored = completion_logprobs(logits, some_ids(), MASK, temperature=1.0)
    wide = completion_logprobs(logits.detach().double(), some_ids(), MASK, temperature=1.0)
    assert scored.logprobs.dtype == torch.float32
    # float32 rounding of values up to 20; a log-softmax in bf16 would be off by 0.05
    torch.testing.assert_close(scored.logprobs.double(), wide.logprobs, rtol=0, atol=1e-5)
    scored.logprobs.sum().backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16


@pytest.mark.usefixtures("chunk")
def test_nothing_leaks_from_outside_the_mask() -> None:
    logits = torch.where(MASK[..., None], scores(), torch.nan).requires_grad_()
    ids = torch.where(MASK, some_ids(), 999)
    scored = completion_logprobs(logits, ids, MASK, temperature=1.0)
    scored.logprobs.sum().backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert scored.logprobs[~MASK].tolist() == scored.entropy[~MASK].tolist() == [0.0, 0.0]
    assert logits.grad[~MASK].tolist() == [[0.0] * SIZE] * 2
    assert torch.isfinite(logits.grad).all()


def test_predicting_logits_are_one_position_before_their_token() -> None:
    """A counting model: after token v it always predicts v + 1. Scored right, 3 4 5 is certain."""
    sequence = torch.tensor([[1, 2, 3, 4, 5]])
    logits = 50.0 * torch.nn.functional.one_hot(sequence + 1, 8).float()
    mask = torch.ones((1, 3), dtype=torch.bool)
    scored = completion_logprobs(
        predicting_logits(logits, 3), sequence[:, -3:], mask, temperature=1.0
    )
    assert scored.logprobs.tolist() == [[0.0, 0.0, 0.0]]
    shifted_wrongly = completion_logprobs(
        logits[:, -3:], sequence[:, -3:], mask, temperature=1.0
    ).logprobs
    assert shifted_wrongly.tolist() == [[-50.0, -50.0, -50.0]]


@pytest.mark.parametrize("shape", [(1, 3, 8), (1, 2, 8), (3, 8)])
def test_logits_that_cannot_predict_the_first_token_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(TrainError, match="one position more"):
        predicting_logits(torch.zeros(shape), 3)


def test_refusals() -> None:
    logits, ids = scores(), some_ids()
    for wrong_logits, wrong_ids, wrong_mask in (
        (logits[:, :-1], ids, MASK),
        (torch.cat([logits, logits], 1), ids, MASK),
        (logits, ids[:, :-1], MASK),
        (logits, ids.clone().fill_(SIZE), MASK),
        (logits, ids.clone().fill_(-1), MASK),
        (logits, ids, MASK.long()),
    ):
        with pytest.raises(TrainError):
            completion_logprobs(wrong_logits, wrong_ids, wrong_mask, temperature=1.0)
    with pytest.raises(TrainError, match="temperature"):
        completion_logprobs(logits, ids, MASK, temperature=0.0)
    everything = torch.ones(SIZE, dtype=torch.bool)
    with pytest.raises(TrainError, match="suppress the same ids"):
        completion_logprobs(logits, ids, MASK, temperature=1.0, suppressed=everything)
    with pytest.raises(TrainError, match="suppressed"):
        completion_logprobs(logits, ids, MASK, temperature=1.0, suppressed=everything[:-1])


def test_no_wide_copy_of_the_logits_is_kept_for_the_backward_pass() -> None:
    """Plain ``log_softmax`` keeps one of 4 * N * C * V bytes; here only the logits themselves."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    logits = scores(torch.bfloat16).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        completion_logprobs(logits, some_ids(), MASK, temperature=0.9)
    large = [tensor for tensor in kept if tensor.numel() >= logits.numel()]
    assert [tensor.data_ptr() for tensor in large] == [logits.data_ptr()]
