"""No non-finite value reaches the weights: at any update, from any micro-batch, of any process.

The guard once checked only the first update on a rollout. With ``iterations: 2`` and a loss that
became NaN in the second, every weight was NaN afterwards, and the run went on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from ranks import codes, together
from test_step import ADVANTAGES, GROUP, KEPT, PLAN, TEMPERATURE
from torch import Tensor
from train_runs import log, short

from omni_grpo_core.core.policy import Policy
from omni_grpo_core.core.rollout import rollout
from omni_grpo_core.losses.metrics import Metrics
from omni_grpo_core.training import run as run_module
from omni_grpo_core.training.config import Fast
from omni_grpo_core.training.loop import train
from omni_grpo_core.training.micro_batches import MicroBatch, make_micro_batches
from omni_grpo_core.training.step import Scorer, SingleProcess, Update, optimize
from omni_grpo_core.types import Batch

MICRO_BATCHES = 2


class Poisoned(Scorer):
    """Scores like its base until forward number ``at``. There it multiplies the loss or, with
    ``backward``, only the gradient by ``value``."""

    def __init__(
        self, policy: Policy, temperature: float, *, at: int, value: float, backward: bool
    ) -> None:
        super().__init__(policy, temperature)
        self.at, self.value, self.backward = at, value, backward
        self.calls = 0

    def forward(self, batch: Batch, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        logprobs, entropy = super().forward(batch, ids, mask)
        if self.calls == self.at:
            if self.backward:
                spoilt: Any = logprobs
                spoilt.register_hook(lambda gradient: gradient * self.value)
            else:
                logprobs = logprobs * self.value
        self.calls += 1
        return logprobs, entropy


@pytest.fixture(scope="module")
def window(policy: Policy, mixed: Batch) -> tuple[MicroBatch, ...]:
    rolled = rollout(
        policy, mixed, group_size=GROUP, max_new_tokens=6, temperature=TEMPERATURE, seed=3
    )
    return make_micro_batches(policy, mixed, rolled, ADVANTAGES, KEPT, 16 // MICRO_BATCHES)


@pytest.fixture
def weights(policy: Policy) -> Iterator[dict[str, Tensor]]:
    """Those of the session's policy, which are restored."""
    before = copies(policy.model.state_dict())
    yield before
    policy.model.load_state_dict(before)
    policy.model.zero_grad()
    policy.model.requires_grad_(True).eval()


def copies(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: copies(value) for key, value in state.items()}
    return state.clone() if isinstance(state, Tensor) else state


def same(found: Any, want: Any) -> bool:
    """Bitwise."""
    if isinstance(want, dict):
        return found.keys() == want.keys() and all(same(found[key], want[key]) for key in want)
    return torch.equal(found, want) if isinstance(want, Tensor) else bool(found == want)


@pytest.mark.parametrize("backward", [False, True], ids=["loss", "gradient"])
@pytest.mark.parametrize("iteration", [0, 1, 2])
@pytest.mark.parametrize(
    ("micro", "value"), [(0, math.nan), (1, math.inf)], ids=["nan first", "inf last"]
)
def test_weights_and_moments_stay_as_they_were_before_the_bad_update(
    policy: Policy,
    window: tuple[MicroBatch, ...],
    weights: dict[str, Tensor],
    iteration: int,
    micro: int,
    value: float,
    backward: bool,
) -> None:
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-3)
    scorer = Poisoned(
        policy,
        TEMPERATURE,
        at=iteration * MICRO_BATCHES + micro,
        value=value,
        backward=backward,
    )
    before: list[Any] = []

    def look(update: Update) -> bool:
        before.append(copies(policy.model.state_dict()))
        before.append(copies(optimizer.state_dict()["state"]))
        return True  # even so

    updates = optimize(
        replace(PLAN, iterations=3), SingleProcess(), scorer, policy.model, optimizer, window,
        may_step=look,
    )  # fmt: skip
    assert [update.stepped for update in updates] == [True] * iteration + [False]
    assert not updates[-1].finite
    assert same(policy.model.state_dict(), before[-2])
    assert same(optimizer.state_dict()["state"], before[-1])
    assert all(parameter.grad is None for parameter in policy.model.parameters())
    assert (iteration == 0) == same(policy.model.state_dict(), weights), "good ones are made"


def test_one_number_of_one_parameter_is_enough(
    policy: Policy, window: tuple[MicroBatch, ...], weights: dict[str, Tensor]
) -> None:
    parameters = dict(policy.model.named_parameters())
    for name in list(parameters)[:: len(parameters) // 4]:
        parameter = parameters[name]

        def spoil(gradient: Tensor) -> Tensor:
            return gradient.index_fill(0, torch.tensor([0]), math.nan)

        handle = parameter.register_hook(spoil)
        optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-3)
        (update,) = optimize(
            PLAN, SingleProcess(), Scorer(policy, TEMPERATURE), policy.model, optimizer, window[:1]
        )
        handle.remove()
        assert not update.stepped, name
        assert same(policy.model.state_dict(), weights), name


def test_a_peak_that_is_nan_stays_nan() -> None:
    """``max(1.0, nan)`` is 1.0: whether the drift was NaN depended on the order of the parts."""
    numbers = [Metrics({}, {"drift_max": value}) for value in (1.0, math.nan, 2.0)]
    for order in (numbers, numbers[::-1], numbers[1:] + numbers[:1]):
        assert math.isnan(Metrics.sum(order).peaks["drift_max"])


# --------------------------------------------------------------------------- a whole run


def poisoned_at(at: int, made: list[Poisoned]) -> Callable[..., Poisoned]:
    def make(policy: Policy, temperature: float, *_: object) -> Poisoned:
        made.append(Poisoned(policy, temperature, at=at, value=math.nan, backward=False))
        return made[-1]

    return make


def test_a_run_is_stopped_at_the_second_iteration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Poisoned] = []
    # 2 micro-batches an iteration, 2 iterations a step: forward 6 is the second step's second
    monkeypatch.setattr(run_module, "Scorer", poisoned_at(6, made))
    out = tmp_path / "run"
    result = train(short(out, iterations=2))
    assert (result.status, result.step) == ("stopped", 1)
    assert [str(f).partition(";")[0] for f in result.findings] == [
        "loss: not a number: loss is nan, from logprobs, completion 0, token 0: nan",
        "gradient: not a number: gradient is nan",
    ]
    assert all(w.isfinite().all() for w in made[0].model.state_dict().values())
    assert [line["step"] for line in log(out)] == [0]
    assert [folder.name for folder in (out / "state").iterdir()] == ["000001"]
    monkeypatch.undo()
    assert train(short(out, iterations=2)).status == "finished", "the state it left is complete"


@pytest.mark.skipif(
    Version(version("transformers")) < Version("4.57"), reason="no attention functions"
)
@pytest.mark.parametrize("fast", ["on", pytest.param("off", marks=pytest.mark.slow)])
def test_a_run_whose_weights_are_broken_is_stopped_with_a_trace(tmp_path: Path, fast: Fast) -> None:
    """As after an update that overflowed. Sampling raised an IndexError."""
    policies: list[Policy] = []

    def watch(policy: Policy) -> AbstractContextManager[None]:
        policies.append(policy)
        return nullcontext()

    def poison(_: object) -> None:
        with torch.no_grad():
            policies[0].model.lm_head.weight[3] = math.inf

    result = train(short(tmp_path / "run", fast=fast), on_step=poison, watch=watch)
    assert (result.status, result.step) == ("stopped", 1)
    assert "loss: not a number: loss is nan" in " ".join(map(str, result.findings))
    assert result.bundle
    assert result.bundle.is_dir()


def _rank(out: Path, rank: int) -> None:
    made: list[Poisoned] = []
    if rank == 1:  # one micro-batch an iteration: the second iteration of the first step
        vars(run_module)["Scorer"] = poisoned_at(1, made)
    result = train(short(out, iterations=2))
    assert (result.status, result.step) == ("stopped", 0)
    assert all(w.isfinite().all() for one in made for w in one.model.state_dict().values())


def test_all_processes_stop_if_one_finds_it(tmp_path: Path) -> None:
    assert codes(together(2, partial(_rank, tmp_path / "run"), tmp_path)) == [0, 0]
