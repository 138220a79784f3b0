"""Decoding over one copy of each prompt is pinned to the plain rollout, id by id."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook

from omni_grpo_core.core.batch import collate
from omni_grpo_core.core.forward import (
    completion_logits,
    first_positions,
    prefill,
    sampling_logprobs,
)
from omni_grpo_core.core.policy import Policy, generating, load_policy
from omni_grpo_core.core.rollout import draw_distance, draws, rollout
from omni_grpo_core.errors import ConfigError
from omni_grpo_core.fast import prefix
from omni_grpo_core.fast import rollout as shared
from omni_grpo_core.fast.compiled import Compiled
from omni_grpo_core.fast.prefix import LayerPrefix, SharedPrefix, prefix_attention
from omni_grpo_core.fast.rollout import shared_rollout
from omni_grpo_core.recorder.record import record
from omni_grpo_core.training.guard import watch_generation
from omni_grpo_core.types import Batch, Completion, Rollout, Row

pytestmark = pytest.mark.skipif(
    Version(version("transformers")) < Version("4.57"), reason="no attention functions"
)

LOGPROB = 1e-4
"""As for scoring; 1.2e-5 at most was measured."""
Sides = Callable[..., tuple[Rollout, Rollout]]


@pytest.fixture(scope="module", params=["policy mixed", "qwen3_policy qwen3_mixed"])
def both(request: pytest.FixtureRequest) -> Sides:
    """Each family: the plain rollout of a padded, mixed batch, and the shared one."""
    policy, batch = map(request.getfixturevalue, request.param.split())

    def sides(temperature: float) -> tuple[Rollout, Rollout]:
        settings: dict[str, Any] = {
            "group_size": 2, "max_new_tokens": 14, "temperature": temperature, "seed": 5,
        }  # fmt: skip
        return rollout(policy, batch, **settings), shared_rollout(policy, batch, **settings)

    return sides


@pytest.mark.parametrize("temperature", [0.0, 1.6])
def test_the_same_tokens(both: Sides, temperature: float) -> None:
    """Greedy and sampled. The shipped policies leave no ties within rounding on these rows."""
    want, found = both(temperature)
    assert [_plain(c) for c in found.completions] == [_plain(c) for c in want.completions]
    gaps = [
        abs(a - b)
        for one, other in zip(found.completions, want.completions, strict=True)
        for a, b in zip(one.logprobs, other.logprobs, strict=True)
    ]
    assert max(gaps) <= LOGPROB
    assert (found.group_size, found.temperature, found.seed) == (2, temperature, 5)


def _plain(completion: Any) -> Any:
    return replace(completion, logprobs=())


TIE = 1e-4
"""Nats between two greedy tokens, and probability between a draw and its token: float32 in another
order of sums."""


@pytest.mark.slow
@pytest.mark.parametrize("family", ["policy inputs", "qwen3_policy qwen3_inputs"])
@given(data=st.data())
@settings(max_examples=30)
def test_the_same_tokens_from_batches_of_random_shape(
    request: pytest.FixtureRequest, family: str, data: st.DataObject
) -> None:
    policy, inputs = map(request.getfixturevalue, family.split())
    rows = inputs.batch.rows
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=4, unique=True))
    batch = collate([rows[at] for at in chosen], policy.pad_token_id)
    drawn: dict[str, Any] = {
        "group_size": data.draw(st.integers(1, 4)),
        "max_new_tokens": data.draw(st.integers(1, 40)),
        "temperature": data.draw(st.sampled_from([0.0, 0.7, 1.0, 1.6, 3.0])),
        "seed": data.draw(st.integers(0, 2**31)),
    }
    want, found = rollout(policy, batch, **drawn), shared_rollout(policy, batch, **drawn)
    for index, (one, other) in enumerate(zip(want.completions, found.completions, strict=True)):
        if one.token_ids != other.token_ids:
            row = batch.rows[index // want.group_size]
            assert _is_tie(policy, row, one, other, want)
        else:
            assert _plain(one) == _plain(other)
            assert other.logprobs == pytest.approx(one.logprobs, abs=LOGPROB)


def _is_tie(policy: Policy, row: Row, one: Completion, other: Completion, made: Rollout) -> bool:
    """Whether rounding may have chosen the first token that differs."""
    pairs = zip(one.token_ids, other.token_ids, strict=False)
    at = next(place for place, (a, b) in enumerate(pairs) if a != b)
    ids = torch.tensor([one.token_ids[: at + 1]])
    with torch.no_grad():
        logits = completion_logits(
            policy, collate([row], policy.pad_token_id), ids, torch.ones_like(ids)
        )
    scores = sampling_logprobs(policy, logits[0, -1], made.temperature or 1.0)
    token = torch.tensor(other.token_ids[at])
    if not made.temperature:
        return float(scores.max() - scores[token]) <= TIE
    drawn = draws(made.seed, row.sample_id, made.group_size, at + 1)[one.index, at]
    return float(draw_distance(scores, drawn, token)) <= TIE


def test_rows_that_end_stop_in_place(policy: Policy, mixed: Batch) -> None:
    rows = collate(mixed.rows[6:], policy.pad_token_id)
    settings: dict[str, Any] = {"group_size": 3, "max_new_tokens": 60, "temperature": 1.6}
    want, found = rollout(policy, rows, **settings), shared_rollout(policy, rows, **settings)
    assert [_plain(c) for c in found.completions] == [_plain(c) for c in want.completions]
    assert {c.finish_reason for c in found.completions} == {"stop"}
    assert len({len(c.token_ids) for c in found.completions}) > 1


def test_the_prompts_keys_and_values_are_those_of_the_prefill(policy: Policy, mixed: Batch) -> None:
    """Not a copy of them, whatever the size of the group."""
    with torch.no_grad(), generating(policy.model):
        layers = prefill(policy, mixed).cache.layers
    cached = [(layer.keys, layer.values) for layer in layers]
    found = SharedPrefix.of(cached, mixed.attention_mask, copies=4, length=3)
    for layer, own in zip(layers, found.layers, strict=True):
        assert own.prompt_keys.data_ptr() == layer.keys.data_ptr()
        assert own.prompt_values.data_ptr() == layer.values.data_ptr()


def test_attention_by_hand() -> None:
    """Two completions of one prompt with one padded key. Keys are 0, so that all that is seen
    counts alike: the mean of the values."""
    keys, values = torch.zeros(1, 1, 3, 2), torch.tensor([[[[9.0, 9], [1, 0], [3, 0]]]])
    state = SharedPrefix.of([(keys, values)], torch.tensor([[0, 1, 1]]), copies=2, length=4)
    token = torch.tensor([[8.0, 4], [2, 0]]).view(2, 1, 1, 2)
    state.own[0] = 0.0
    [own] = state.layers
    found = prefix_attention(torch.ones(2, 1, 1, 2), torch.zeros_like(token), token, own, 1.0)
    torch.testing.assert_close(found.view(2, 2), torch.tensor([[4.0, 4 / 3], [2.0, 0.0]]))
    assert own.values[:, 0, 0].tolist() == [[8.0, 4.0], [2.0, 0.0]]


def test_modes_and_attention_are_restored(policy: Policy, mixed: Batch) -> None:
    rows = collate(mixed.rows[7:], policy.pad_token_id)
    policy.model.train()
    try:
        shared_rollout(policy, rows, group_size=1, max_new_tokens=2)
        assert policy.model.training
    finally:
        policy.model.eval()
    assert policy.text_model.config._attn_implementation == "sdpa"


def test_a_bad_request_is_refused_as_the_plain_one_refuses_it(policy: Policy, mixed: Batch) -> None:
    with pytest.raises(ConfigError, match="group_size >= 1"):
        shared_rollout(policy, mixed, group_size=0, max_new_tokens=2)


def _with_layers(patch: pytest.MonkeyPatch, change: Callable[[LayerPrefix], LayerPrefix]) -> None:
    real = SharedPrefix.of

    def changed(*given: Any, **rest: Any) -> SharedPrefix:
        state = real(*given, **rest)
        return replace(state, layers=tuple(map(change, state.layers)))

    patch.setattr(prefix.SharedPrefix, "of", changed)


def _sees_what_is_not_there_yet(patch: pytest.MonkeyPatch) -> None:
    _with_layers(patch, lambda layer: replace(layer, own=torch.zeros_like(layer.own)))


def _sees_padding(patch: pytest.MonkeyPatch) -> None:
    _with_layers(patch, lambda layer: replace(layer, seen=None))


def _position_off_by_one(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(shared, "first_positions", lambda *given: first_positions(*given) + 1)


def _sees_its_neighbour(patch: pytest.MonkeyPatch) -> None:
    """Rows of a group in another order for queries than for their own keys."""
    real = prefix._by_row
    patch.setattr(prefix, "_by_row", lambda tensor, rows: real(tensor, rows).roll(1, 0))


def _forgets_itself(patch: pytest.MonkeyPatch) -> None:
    def late(query: Tensor, key: Tensor, value: Tensor, state: LayerPrefix, *rest: Any) -> Tensor:
        return prefix_attention(query, key, value, replace(state, own=state.own.roll(-1)), *rest)

    from omni_grpo_core.fast import attention

    patch.setattr(attention, "prefix_attention", late)


PLANTED = {
    "unwritten tokens are seen": _sees_what_is_not_there_yet,
    "padding is seen": _sees_padding,
    "position off by one": _position_off_by_one,
    "completions see each other": _sees_its_neighbour,
    "a token does not see itself": _forgets_itself,
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_seen(
    fault: str, policy: Policy, mixed: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = collate([mixed.rows[at] for at in (1, 6, 7)], policy.pad_token_id)
    settings: dict[str, Any] = {"group_size": 2, "max_new_tokens": 10, "temperature": 1.6}
    want = rollout(policy, rows, **settings)
    PLANTED[fault](monkeypatch)
    found = shared_rollout(policy, rows, **settings)
    worst = max(
        abs(a - b)
        for one, other in zip(found.completions, want.completions, strict=True)
        for a, b in zip(one.logprobs, other.logprobs, strict=False)
    )
    assert worst > 10 * LOGPROB


def test_a_compiler_that_fails_costs_speed_alone(policy: Policy, mixed: Batch) -> None:
    """As on a machine without a C compiler, which Triton needs."""
    rows = collate(mixed.rows[6:7], policy.pad_token_id)
    settings: dict[str, Any] = {"group_size": 2, "max_new_tokens": 6, "temperature": 1.6}

    def none(*_: Any) -> Any:
        raise RuntimeError("no C compiler was found")

    compiled = Compiled(policy, True, kernel=False, backend=none)
    want = rollout(policy, rows, **settings)
    with pytest.warns(UserWarning, match="without compiled layers: .*no C compiler was found"):
        found = shared_rollout(policy, rows, compiled=compiled, **settings)
    assert [_plain(c) for c in found.completions] == [_plain(c) for c in want.completions]
    assert not compiled.usable


def test_a_watched_model_is_not_compiled(policy: Policy) -> None:
    """A hook of a recorder would be left out of a graph, or break the compiler; so would one inside
    an adapted head, or one of a profiler on every module there is."""
    compiled = Compiled(policy, True, kernel=False)
    inside = torch.nn.Linear(1, 1)
    policy.model.lm_head.register_module("adapter", inside)
    try:
        for watch in (
            policy.text_model.layers[0].mlp.register_forward_hook,
            inside.register_forward_pre_hook,
            register_module_forward_hook,
        ):
            assert compiled.usable
            handle = watch(lambda *_: None)
            assert not compiled.usable
            handle.remove()
    finally:
        del policy.model.lm_head.adapter
    assert compiled.usable


@pytest.mark.slow
def test_layers_that_the_user_compiled_stay_so(policy: Policy, mixed: Batch) -> None:
    own = replace(policy, model=copy.deepcopy(policy.model))
    calls = []
    for layer in own.text_model.layers:
        layer.compile(backend="eager")
        calls.append(layer._compiled_call_impl)
    rows = collate(mixed.rows[7:], own.pad_token_id)
    shared_rollout(own, rows, group_size=1, max_new_tokens=2, compiled=Compiled(own, False))
    assert [layer._compiled_call_impl for layer in own.text_model.layers] == calls


def test_what_our_own_guard_and_recorder_watch_is_compiled(policy: Policy, tmp_path: Path) -> None:
    """They need prompts and results. Training on a device was never compiled: the guard's hook."""
    compiled = Compiled(policy, True, kernel=False)
    end = watch_generation(policy.model.model, lambda finding: None)
    try:
        with record(tmp_path, model=policy.model, processor=policy.processor):
            assert compiled.usable
    finally:
        end()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["policy mixed", "qwen3_policy qwen3_mixed"])
def test_compiled_layers_are_one_graph_for_prompts_of_other_lengths(
    request: pytest.FixtureRequest, family: str
) -> None:
    """Traced whole, without inductor: that is the device's."""
    from torch._dynamo.utils import counters

    shared, batch = map(request.getfixturevalue, family.split())
    # what switched checkpointing on left attributes on its layers, which a graph is guarded by
    policy = load_policy(Path(shared.checkpoint))
    settings: dict[str, Any] = {"group_size": 2, "max_new_tokens": 6, "temperature": 1.6}
    rows = [collate(part, policy.pad_token_id) for part in (batch.rows[:2], batch.rows[2:4])]
    compiled = Compiled(policy, True, kernel=False, backend="eager")
    # sets the attributes that modes are restored to, which the graph is guarded by
    rollout(policy, rows[0], **settings)
    before = counters["stats"]["unique_graphs"]
    for one in rows:
        want = rollout(policy, one, **settings)
        found = shared_rollout(policy, one, compiled=compiled, **settings)
        assert [_plain(c) for c in found.completions] == [_plain(c) for c in want.completions]
    assert counters["stats"]["unique_graphs"] == before + 1
