"""What the recorder reads at the logits of a scoring forward, however loops make and use them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import backward
from torch.utils.checkpoint import checkpoint
from toy_thinker import Output, ToyProcessor, ToyThinker, make

from omni_grpo_core import record
from omni_grpo_core.trace.calls import ForwardCall, LossGradient, calls_of
from omni_grpo_core.trace.store import load_trace
from omni_grpo_core.types import Trace

IDS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
WEIGHTS = torch.tensor([[0.0, 0.0, -0.5, 0.25], [0.0, 0.125, -1.0, 0.0]])
"""Of the logprob of each token after the first."""
EXACT = 1e-4
"""float32 logits near 1, spread by no more than 1: a slope of 15 of them is good to 1e-5."""


def logprobs(logits: Tensor, ids: Tensor = IDS) -> Tensor:
    return logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]


def loss(logits: Tensor, ids: Tensor = IDS) -> Tensor:
    return (WEIGHTS * logprobs(logits, ids)).sum()


def traced(folder: Path, loop: Callable[[Any], None], model: Any = None) -> Trace:
    """One step of ``loop``, which forwards and runs backward; then the optimizer's."""
    model = make() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with record(folder, model=model, processor=ToyProcessor(), steps=1, probe_rewards=False):
        loop(model)
        optimizer.step()
    return load_trace(folder / "step-000000")


def read(trace: Trace) -> LossGradient:
    [found] = calls_of(trace, LossGradient)
    return found


def check(found: LossGradient, weights: Tensor = WEIGHTS, temperature: float = 1.0) -> None:
    shown = weights != 0
    torch.testing.assert_close(found.weights[:, :-1], weights, rtol=EXACT, atol=1e-7)
    wanted = torch.where(shown, IDS[:, 1:], -1)
    assert torch.equal(found.tokens[:, :-1], wanted)
    assert bool((found.tokens[:, -1] == -1).all())
    told = found.temperature[:, :-1][shown]
    torch.testing.assert_close(told, torch.full_like(told, temperature), rtol=EXACT, atol=0)
    assert bool(found.temperature[:, :-1][~shown].isnan().all())
    assert float(found.residual[:, :-1][shown].max()) < EXACT


def test_one_forward_one_backward(tmp_path: Path) -> None:
    trace = traced(tmp_path, lambda model: backward(loss(model(input_ids=IDS).logits)))
    found = read(trace)
    assert (found.at, found.forward) == ("logits", 0)
    check(found)
    assert "not_recorded" not in trace.header


def test_forwards_are_numbered_and_those_without_gradients_left_out(tmp_path: Path) -> None:
    def loop(model: Any) -> None:
        with torch.no_grad():
            model(input_ids=IDS)
        first, second = model(input_ids=IDS).logits, model(input_ids=IDS[:1]).logits
        backward(loss(second.expand(2, -1, -1) * torch.tensor([1.0, 0.0])[:, None, None]))
        backward(loss(first))

    trace = traced(tmp_path, loop)
    assert len(calls_of(trace, ForwardCall)) == 3
    assert [found.forward for found in calls_of(trace, LossGradient)] == [2, 1]


def test_a_loss_without_a_signal_is_told_from_a_detached_one(tmp_path: Path) -> None:
    """Zero advantages reach the logits, as zeros; a detached loss does not."""
    zero = traced(tmp_path / "a", lambda model: backward(0 * loss(model(input_ids=IDS).logits)))
    assert bool((read(zero).tokens == -1).all())

    def detached(model: Any) -> None:
        backward(loss(model(input_ids=IDS).logits).detach().requires_grad_())

    assert not calls_of(traced(tmp_path / "b", detached), LossGradient)


def test_logits_scaled_in_place_are_read_as_they_were_made(tmp_path: Path) -> None:
    """A gradient belongs to the logits before ``div_``; the tensor holds those after it."""

    def loop(model: Any) -> None:
        logits = model(input_ids=IDS).logits
        logits.div_(1.6)
        backward(loss(logits))

    check(read(traced(tmp_path, loop)), temperature=1.6)


def test_ids_suppressed_in_place(tmp_path: Path) -> None:
    def loop(model: Any) -> None:
        logits = model(input_ids=IDS).logits
        logits[..., [0, 11, 15]] = -torch.inf
        backward(loss(logits))

    check(read(traced(tmp_path, loop)))


def test_logits_changed_in_another_way_are_not_read(tmp_path: Path) -> None:
    def loop(model: Any) -> None:
        logits = model(input_ids=IDS).logits
        logits.sin_()
        backward(loss(logits))

    found = read(traced(tmp_path, loop))
    assert bool(found.weights[found.tokens >= 0].isnan().all())


class KeepsLast(ToyThinker):
    def forward(self, input_ids: Tensor, logits_to_keep: int = 0) -> Output:
        return Output(super().forward(input_ids).logits[:, -logits_to_keep:])


def test_only_the_last_logits(tmp_path: Path) -> None:
    def loop(model: Any) -> None:
        logits = model(input_ids=IDS, logits_to_keep=3).logits
        made = logits[:, :-1].log_softmax(-1).gather(-1, IDS[:, -2:, None])[..., 0]
        backward((WEIGHTS[:, -2:] * made).sum())

    torch.manual_seed(0)
    found = read(traced(tmp_path, loop, KeepsLast()))
    assert found.tokens.shape == (2, 3)
    torch.testing.assert_close(found.weights[:, :-1], WEIGHTS[:, -2:], rtol=EXACT, atol=1e-7)


def test_two_backwards_through_one_graph_add_up(tmp_path: Path) -> None:
    def loop(model: Any) -> None:
        made = logprobs(model(input_ids=IDS).logits)
        backward((WEIGHTS * made).sum(), retain_graph=True)
        backward((0.5 * WEIGHTS * made).sum())

    first, second = calls_of(traced(tmp_path, loop), LossGradient)
    check(first)
    check(second, 0.5 * WEIGHTS)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_model_is_one_forward(tmp_path: Path, reentrant: bool) -> None:
    """Its backward runs it again: neither a second call nor a second reading. Re-entrant, the only
    logits with a gradient are made inside the backward, and none can be read."""

    def loop(model: Any) -> None:
        def run(ids: Tensor, _: Tensor) -> Tensor:
            logits: Tensor = model(input_ids=ids).logits
            return logits

        needs = torch.ones(1, requires_grad=True)
        backward(loss(checkpoint(run, IDS, needs, use_reentrant=reentrant)))

    trace = traced(tmp_path, loop)
    assert len(calls_of(trace, ForwardCall)) == 1
    if reentrant:
        assert not calls_of(trace, LossGradient)
    else:
        check(read(trace))


class Fused(ToyThinker):
    """Returns logprobs, computed in chunks from the hidden state and the head's weights."""

    def forward(self, input_ids: Tensor) -> Any:
        where = torch.arange(input_ids.shape[1]).expand(3, *input_ids.shape).float()
        state = self.model(inputs_embeds=self.embed(input_ids), position_ids=where)
        chunks = [(c @ self.lm_head.weight.T / 1.6).log_softmax(-1) for c in state.split(2, 1)]
        made = torch.cat(chunks, 1)[:, :-1].gather(-1, input_ids[:, 1:, None])[..., 0]
        return type("Scores", (), {"log_probs": made})()


def test_a_head_that_makes_no_logits_is_read_at_its_input(tmp_path: Path) -> None:
    torch.manual_seed(0)
    found = read(
        traced(
            tmp_path,
            lambda model: backward((WEIGHTS * model(input_ids=IDS).log_probs).sum()),
            Fused(),
        )
    )
    assert found.at == "hidden"
    check(found, temperature=1.6)


def test_logits_that_only_lie_beside_the_loss(tmp_path: Path) -> None:
    """Logits are returned, and the loss is made from the hidden state."""

    class Both(Fused):
        def forward(self, input_ids: Tensor) -> Any:
            made = super().forward(input_ids)
            made.logits = ToyThinker.forward(self, input_ids).logits
            return made

    def loop(model: Any) -> None:
        output = model(input_ids=IDS)
        backward((WEIGHTS * output.log_probs).sum())

    torch.manual_seed(0)
    trace = traced(tmp_path, loop, Both())
    # the toy runs its text model twice, and the last is not the loss's
    assert not calls_of(trace, LossGradient)


def weights_after(folder: Path | None, dtype: torch.dtype) -> list[Tensor]:
    model = make().to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def step() -> None:
        logits = model(input_ids=IDS).logits
        logits.div_(1.3)
        backward(loss(logits.float()))
        optimizer.step()
        optimizer.zero_grad()

    if folder is None:
        step()
        step()
    else:
        with record(folder, model=model, processor=ToyProcessor(), steps=2, probe_rewards=False):
            step()
            step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_is_equal_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    plain, watched = weights_after(None, dtype), weights_after(tmp_path, dtype)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert calls_of(load_trace(tmp_path / "step-000001"), LossGradient)


def test_logits_that_the_loop_drops_are_freed(tmp_path: Path) -> None:
    """Nothing but the graph may hold them: at full size they are the largest tensor of a step."""
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with record(tmp_path, model=model, processor=ToyProcessor(), steps=2, probe_rewards=False):
        gone = weakref.ref(model(input_ids=IDS).logits.untyped_storage())
        gc.collect()
        assert gone() is None
        kept = model(input_ids=IDS).logits
        held = loss(kept)
        backward(held)
        references = [weakref.ref(kept)]
        optimizer.step()
        del kept
        gc.collect()
        assert references[0]() is None
        assert held.grad_fn is not None
