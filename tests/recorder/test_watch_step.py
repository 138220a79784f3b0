"""What is kept of backward and the optimizer's step, on a model of two matrices."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_thinker
from torch import nn

from omni_grpo_core import record
from omni_grpo_core.trace.calls import LayerSeen, StepSeen, calls_of
from omni_grpo_core.trace.store import load_trace


def nothing(model: nn.Module) -> None:
    """Between backward and step."""


class Loop:
    """Backward ``passes`` times, ``between`` and one step of every optimizer."""

    def __init__(self, *optimizers: Callable[[nn.Module], Any]) -> None:
        self.model = toy_thinker.make()
        self.optimizers = [make(self.model) for make in optimizers or (whole,)]

    def step(self, between: Any = nothing, passes: int = 1, zeroing: bool = True) -> None:
        ids = torch.tensor([[1, 2, 3, 4]])
        for _ in range(passes):
            logits = self.model(input_ids=ids).logits[:, :-1]
            loss = -logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).mean()
            (loss / passes).backward()
        between(self.model)
        for optimizer in self.optimizers:
            optimizer.step()
            if zeroing:
                optimizer.zero_grad()


def whole(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.1)


def head(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.lm_head.parameters(), lr=0.2)


def body(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([*model.model.parameters(), *model.embed.parameters()], lr=0.1)


def recorded(folder: Path, loop: Loop, *steps: dict[str, Any]) -> list[StepSeen]:
    with record(folder, model=loop.model, processor=toy_thinker.ToyProcessor(), steps=9):
        for keywords in steps:
            loop.step(**keywords)
    traces = [load_trace(path) for path in sorted(folder.glob("step-*"))]
    assert not [trace.header["not_recorded"] for trace in traces if "not_recorded" in trace.header]
    return [one for trace in traces for one in calls_of(trace, StepSeen)]


def by_name(step: StepSeen) -> dict[str, LayerSeen]:
    return {layer.name: layer for layer in step.layers}


def test_a_plain_step(tmp_path: Path) -> None:
    loop = Loop()
    first, second = recorded(tmp_path, loop, {"passes": 2}, {})
    assert (first.outcome, first.factor, first.rates, first.others) == ("stepped", 1.0, (0.1,), 0)
    assert (len(first.losses), len(second.losses)) == (2, 1)
    assert by_name(first).keys() == {"text embed", "text mix", "head"}
    top = by_name(first)["head"]
    assert (top.part, top.elements, top.trainable, top.held) == ("head", 64, 64, 64)
    assert (top.rates, top.dtype, top.stale, top.odd) == ((0.1,), "float32", 0.0, {})
    # all elements of a small layer are read, and SGD subtracts a tenth of the gradient
    assert top.backward is not None
    assert top.backward.norm == pytest.approx(top.norm)
    assert top.between is None
    assert 0 < top.moved <= 1
    assert [layer.between for layer in second.layers] == [0.0] * 3


def test_an_optimizer_that_is_made_anew_counts_from_one(tmp_path: Path) -> None:
    loop = Loop(adam)

    def renewed(model: Any) -> None:
        loop.optimizers = [adam(model)]

    found = recorded(tmp_path, loop, {}, {}, {"between": renewed})
    assert [{layer.updates for layer in step.layers} for step in found] == [{1}, {2}, {1}]


def test_a_clipped_gradient_has_one_factor(tmp_path: Path) -> None:
    loop = Loop()
    [step] = recorded(
        tmp_path, loop, {"between": lambda m: nn.utils.clip_grad_norm_(m.parameters(), 0.01)}
    )
    assert math.hypot(*(layer.norm for layer in step.layers)) == pytest.approx(0.01, rel=1e-3)
    assert step.factor is not None
    assert step.factor < 1
    assert [layer.odd for layer in step.layers] == [{}] * 3


@pytest.mark.parametrize("times", [0.0, -1.0, 3.0])
def test_one_layer_s_gradient_is_changed(tmp_path: Path, times: float) -> None:
    def change(model: Any) -> None:
        model.lm_head.weight.grad.mul_(times)

    [step] = recorded(tmp_path, Loop(), {"between": change})
    assert {n: layer.odd for n, layer in by_name(step).items() if layer.odd} == {
        "head": {"lm_head.weight": pytest.approx(times)}
    }
    assert step.factor == pytest.approx(1.0)


def test_a_gradient_of_other_values_is_no_multiple(tmp_path: Path) -> None:
    def roll(model: Any) -> None:
        model.lm_head.weight.grad = model.lm_head.weight.grad.roll(1, 0)

    [step] = recorded(tmp_path, Loop(), {"between": roll})
    assert math.isnan(by_name(step)["head"].odd["lm_head.weight"])


def test_every_gradient_is_negated(tmp_path: Path) -> None:
    """No positive factor was left, so there was none, and nothing was compared with it."""

    def negate(model: nn.Module) -> None:
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad.neg_()

    [step] = recorded(tmp_path, Loop(), {"between": negate})
    assert step.factor == pytest.approx(-1.0)
    assert [layer.odd for layer in step.layers] == [{}] * 3


def test_every_gradient_is_noisy(tmp_path: Path) -> None:
    def disturb(model: nn.Module) -> None:
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad += 3 * parameter.grad.std() * torch.randn_like(parameter.grad)

    [step] = recorded(tmp_path, Loop(), {"between": disturb})
    assert step.factor is None
    assert [{*map(math.isnan, layer.odd.values())} for layer in step.layers] == [{True}] * 3


@pytest.mark.parametrize(
    ("kind", "keywords", "downhill"),
    [
        (torch.optim.SGD, {"lr": 0.1}, [1.0, 1.0]),
        # momentum may carry a weight against its gradient: only the first step is told
        (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.01}, [1.0, None]),
        (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.0, "maximize": True}, [0.0, None]),
        (torch.optim.SGD, {"lr": 0.1, "maximize": True}, [0.0, 0.0]),
    ],
)
def test_an_optimizer_s_direction(
    tmp_path: Path, kind: Any, keywords: dict[str, Any], downhill: list[float | None]
) -> None:
    """``maximize=True`` on a loss climbs it, and every gradient on the way is right."""
    loop = Loop(lambda model: kind(model.parameters(), **keywords))
    assert [step.downhill for step in recorded(tmp_path, loop, {}, {})] == downhill


def test_the_direction_after_steps_without_a_gradient(tmp_path: Path) -> None:
    """Equal rewards in the first step left Adam a state of zeros, and the next climbed unseen."""

    def zeroed(model: nn.Module) -> None:
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad.zero_()

    loop = Loop(lambda model: torch.optim.Adam(model.parameters(), lr=0.1, maximize=True))
    steps = recorded(tmp_path, loop, {"between": zeroed}, {}, {})
    assert [step.downhill for step in steps] == [None, 0.0, None]


def test_gradients_that_were_there_before(tmp_path: Path) -> None:
    first, second = recorded(tmp_path, Loop(), {"zeroing": False}, {})
    assert {layer.stale for layer in first.layers} == {0.0}
    assert [layer.stale for layer in second.layers] == pytest.approx(
        [layer.norm for layer in first.layers]
    )


def test_two_optimizers_make_one_step(tmp_path: Path) -> None:
    first, second = recorded(tmp_path, Loop(head, body), {}, {})
    assert first.trainable == first.held
    assert sorted(first.rates) == [0.1, 0.2]
    assert (by_name(first)["head"].rates, second.step) == ((0.2,), 1)
    assert all(layer.moved for layer in first.layers)


def test_an_optimizer_of_a_copy(tmp_path: Path) -> None:
    [step] = recorded(tmp_path, Loop(lambda model: whole(toy_thinker.make())), {})
    assert step.others == sum(step.trainable.values())
    assert step.held == {}
    assert not any(step.changed.values())


def test_a_recording_that_ends_before_the_optimizer(tmp_path: Path) -> None:
    [step] = recorded(tmp_path, Loop(lambda model: _Quiet(model.parameters())), {"passes": 3})
    assert (step.outcome, len(step.losses), step.held) == ("never", 3, {})
    assert step.layers[0].backward is not None
    assert load_trace(tmp_path / "step-000000").header["complete"] == "False"


class _Quiet:
    """An optimizer that torch does not know."""

    def __init__(self, parameters: Any) -> None:
        self._parameters = list(parameters)

    def step(self) -> None:
        pass

    def zero_grad(self) -> None:
        pass


def test_a_step_that_a_scaler_skips(tmp_path: Path) -> None:
    """A scaled loss overflows, as in the first steps of any run in float16."""
    loop = Loop()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)  # type: ignore[attr-defined]

    def step(infinite: bool) -> None:
        ids = torch.tensor([[1, 2, 3]])
        loss = loop.model(input_ids=ids).logits.square().mean()
        scaler.scale(loss).backward()
        if infinite:
            next(loop.model.parameters()).grad.fill_(math.inf)  # type: ignore[union-attr]
        scaler.step(loop.optimizers[0])
        scaler.update()
        loop.optimizers[0].zero_grad()

    with record(tmp_path, model=loop.model, processor=toy_thinker.ToyProcessor(), steps=2):
        step(infinite=True)
        step(infinite=False)
    skipped, stepped = (
        calls_of(load_trace(tmp_path / f"step-00000{at}"), StepSeen)[0] for at in range(2)
    )
    assert (skipped.outcome, skipped.scale, skipped.changed) == (
        "skipped", 8.0, {"text": False, "head": False},
    )  # fmt: skip
    # update() halves the scale after an overflow
    assert (stepped.outcome, stepped.scale, stepped.factor) == ("stepped", 4.0, 0.25)


@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_that_are_gone_before_the_next_backward(tmp_path: Path, to_none: bool) -> None:
    """zero_grad() inside the loop over micro-batches: the last of them alone is learnt."""

    class Zeroing(Loop):
        def step(self, *args: Any, **keywords: Any) -> None:
            for _ in range(3):
                self.optimizers[0].zero_grad(set_to_none=to_none)
                self.model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
            self.optimizers[0].step()
            self.optimizers[0].zero_grad()

    first, second = recorded(tmp_path, Zeroing(), {}, {})
    # zeros are not read between backwards: that would cost every loop a pass over its gradients
    assert first.dropped == second.dropped == (2 if to_none else 0)
    assert recorded(tmp_path / "kept", Loop(), {"passes": 3})[0].dropped == 0


def test_weights_that_are_put_back_after_a_step(tmp_path: Path) -> None:
    class Restoring(Loop):
        def step(self, *args: Any, **keywords: Any) -> None:
            before = {name: value.clone() for name, value in self.model.state_dict().items()}
            super().step(*args, **keywords)
            self.model.load_state_dict(before)

    first, second = recorded(tmp_path, Restoring(), {}, {})
    for layer, later in zip(first.layers, second.layers, strict=True):
        assert (layer.undone, later.undone, later.between) == (0.0, layer.moved, layer.moved)
    assert {one.undone for one in recorded(tmp_path / "kept", Loop(), {}, {})[1].layers} == {0.0}
