"""Our own steps, plain and fast, are recorded alike and completely, and stay what they were."""

from __future__ import annotations

from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from packaging.version import Version
from torch import Tensor

from omni_grpo_core.core.batch import collate
from omni_grpo_core.core.completions import pad_completions
from omni_grpo_core.core.observers import OBSERVERS
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.core.rollout import rollout
from omni_grpo_core.fast.step import FastStep
from omni_grpo_core.recorder.record import record
from omni_grpo_core.trace.calls import ForwardCall, GenerateCall, LossGradient, calls_of
from omni_grpo_core.trace.store import load_trace
from omni_grpo_core.training.step import plain_scores
from omni_grpo_core.types import Batch, Trace

pytestmark = pytest.mark.skipif(
    Version(version("transformers")) < Version("4.57"), reason="no attention functions"
)

TEMPERATURE = 1.6
LOGPROB = 1e-4
"""Between a packed row and padded copies, float32, as in tests/fast."""


class Stepped(NamedTuple):
    """What one step made: sampled ids, loss, and a gradient."""

    ids: list[tuple[int, ...]]
    loss: float
    gradient: Tensor


def stepped(policy: Policy, batch: Batch, fast: bool) -> Stepped:
    """Sample, score, and go back; the optimizer's rate is 0."""
    one = FastStep(policy)
    sample = one.rollout if fast else partial(rollout, policy)
    settings: dict[str, Any] = {"group_size": 2, "max_new_tokens": 5, "temperature": TEMPERATURE}
    rolled = sample(batch, **settings)
    tokens = pad_completions(rolled.completions, policy.pad_token_id)
    scores = one.scores if fast else partial(plain_scores, policy)
    scored = scores(batch, tokens.ids, tokens.mask, temperature=TEMPERATURE)
    weights = torch.linspace(-1.0, 1.0, tokens.ids.numel()).view(tokens.ids.shape)
    loss = -(scored.logprobs * weights * tokens.mask).sum()
    torch.autograd.backward(loss)
    gradient = policy.model.lm_head.weight.grad.clone()
    torch.optim.SGD(policy.model.parameters(), lr=0.0).step()
    policy.model.zero_grad(set_to_none=True)
    return Stepped([c.token_ids for c in rolled.completions], float(loss.detach()), gradient)


def recorded(folder: Path, policy: Policy, batch: Batch, fast: bool) -> tuple[Stepped, Trace]:
    with record(folder, model=policy.model, processor=policy.processor, steps=1):
        found = stepped(policy, batch, fast)
    trace = load_trace(folder / "step-000000")
    assert "not_recorded" not in trace.header
    return found, trace


@pytest.mark.parametrize(
    "family", ["policy mixed", pytest.param("qwen3_policy qwen3_mixed", marks=pytest.mark.slow)]
)
def test_the_fast_step_is_recorded_as_the_plain_one(
    request: pytest.FixtureRequest, tmp_path: Path, family: str
) -> None:
    """From one packed row come calls for each prompt and completion, as from padded copies."""
    policy, mixed = map(request.getfixturevalue, family.split())
    batch = collate([mixed.rows[at] for at in (0, len(mixed.rows) - 1)], policy.pad_token_id)
    traces = []
    for fast in (False, True):
        found, trace = recorded(tmp_path / str(fast), policy, batch, fast)
        bare = stepped(policy, batch, fast)
        assert (found.ids, found.loss) == (bare.ids, bare.loss)
        assert found.gradient.equal(bare.gradient)
        traces.append(trace)
    assert not OBSERVERS
    for kind, number in ((GenerateCall, 2), (ForwardCall, 4), (LossGradient, 4)):
        pairs = [*zip(*(calls_of(trace, kind) for trace in traces), strict=True)]
        assert len(pairs) == number
        for plain, fast in pairs:
            assert_same(plain, fast)


def assert_same(plain: Any, fast: Any) -> None:
    """Equal, but for floats of another order of sums."""
    assert plain.__slots__ == fast.__slots__
    for name in plain.__slots__:
        one, other = getattr(plain, name), getattr(fast, name)
        if isinstance(one, Tensor) and one.is_floating_point() and name != "position_ids":
            # logits are about ten times as large as their logprobs differ by
            torch.testing.assert_close(other, one, atol=10 * LOGPROB, rtol=0, equal_nan=True)
        elif isinstance(one, Tensor):
            assert other.equal(one), name
        elif name not in ("inputs", "digests", "large"):
            assert other == one, name
    if not isinstance(plain, LossGradient):
        assert plain.inputs.keys() == fast.inputs.keys()
        assert all(fast.inputs[name].equal(held) for name, held in plain.inputs.items())
