"""The fast step on a CUDA device: its kernels and its graph against the plain step there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from omni_grpo_core import tiny
from omni_grpo_core.core.policy import Policy, load_policy
from omni_grpo_core.core.rollout import rollout
from omni_grpo_core.core.towers import features
from omni_grpo_core.fast.attention import WINDOWS, windows
from omni_grpo_core.fast.compiled import Compiled
from omni_grpo_core.fast.layout import PackedRow
from omni_grpo_core.fast.prefix import SharedPrefix, prefix_attention
from omni_grpo_core.fast.rollout import shared_rollout
from omni_grpo_core.fast.segments import packed_attention
from omni_grpo_core.pipeline.inputs import Inputs, prepare
from omni_grpo_core.pipeline.settings import load_settings
from omni_grpo_core.recorder.record import record
from omni_grpo_core.trace.calls import GenerateCall, calls_of
from omni_grpo_core.trace.store import load_trace
from omni_grpo_core.training.determinism import deterministic
from omni_grpo_core.types import Sample

pytestmark = [pytest.mark.gpu, pytest.mark.tiny]


@pytest.fixture(scope="module")
def cuda_policy() -> Policy:
    return load_policy(tiny.checkpoint_dir(), device="cuda")


@pytest.fixture(scope="module")
def ready(cuda_policy: Policy, samples: tuple[Sample, ...]) -> Inputs:
    return prepare(cuda_policy, samples, load_settings(tiny.checkpoint_dir()))


@pytest.mark.parametrize("lengths", [([300, 77], [40, 1, 130, 5, 64, 64]), ([20], [1])])
def test_flash_kernels_agree_with_the_mask(lengths: tuple[list[int], list[int]]) -> None:
    """At the head sizes of the 7B: 28 heads of queries, 4 of keys, 128 wide."""
    device = torch.device("cuda")
    row = PackedRow.of(*lengths, device)
    torch.manual_seed(0)
    tensors = [
        torch.randn(row.length, heads, 128, device=device, dtype=torch.bfloat16, requires_grad=True)
        for heads in (28, 4, 4)
    ]
    weights = torch.randn(row.length, 28, 128, device=device, dtype=torch.bfloat16)

    def gradients(result: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad((result * weights).sum(), tensors))

    found = packed_attention(*tensors, row, 128**-0.5)  # type: ignore[call-arg, arg-type]
    query, key, value = (one.float().transpose(0, 1) for one in tensors)
    want = torch.nn.functional.scaled_dot_product_attention(
        query, key.repeat_interleave(7, 0), value.repeat_interleave(7, 0), attn_mask=row.mask()
    ).transpose(0, 1)
    # bfloat16 has three digits; values are of size 1
    assert float((found.float() - want).detach().abs().max()) < 0.03
    for one, other in zip(gradients(found), gradients(want.to(torch.bfloat16)), strict=True):
        assert float((one.float() - other.float()).norm() / other.float().norm()) < 0.02


def test_gradients_of_the_flash_kernels_are_the_same_bits_again() -> None:
    """At the 7B's sizes. With torch's deterministic kernels "with a warning only" they are not."""
    row = PackedRow.of([3457], [256] * 8, torch.device("cuda"))
    torch.manual_seed(0)
    tensors = [
        torch.randn(row.length, heads, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for heads in (28, 4, 4)
    ]
    with deterministic(True):
        first, *others = (
            torch.autograd.grad(packed_attention(*tensors, row, 128**-0.5).sum(), tensors)  # type: ignore[call-arg, arg-type]
            for _ in range(5)
        )
    for other in others:
        assert all(map(torch.equal, first, other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("groups", "copies", "heads", "kv", "size", "prompt", "tokens", "padding"),
    [
        (1, 8, 28, 4, 128, 3457, 256, 0),  # the 7B's
        (2, 3, 4, 2, 16, 70, 9, 20),  # the tiny checkpoint's
        (3, 40, 8, 1, 64, 130, 70, 5),  # more queries of a head than one block takes
    ],
)
def test_the_decoding_kernel_agrees_with_torch(
    dtype: torch.dtype, groups: int, copies: int, heads: int, kv: int, size: int, prompt: int,
    tokens: int, padding: int,
) -> None:  # fmt: skip
    """At the first token, in the middle and at the last one; what it writes is the same."""
    torch.manual_seed(0)
    device = torch.device("cuda")

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    cached = [(random(groups, kv, prompt, size), random(groups, kv, prompt, size))]
    mask = torch.ones(groups, prompt)
    mask[0, :padding] = 0
    state = SharedPrefix.of(cached, mask, copies, tokens)
    [layer] = state.layers
    [other] = SharedPrefix.of(cached, mask, copies, tokens).with_kernel().layers
    for one in (layer, other):
        one.keys.copy_(torch.ones_like(one.keys).cumsum(2) % 3)
        one.values.copy_(torch.ones_like(one.values).cumsum(2) % 5)
    rows = groups * copies
    for at in (0, tokens // 2, tokens - 1):
        for one in (layer, other):
            one.at.fill_(at)
        layer.own[: at + 1] = 0.0
        query, key, value = random(rows, heads, 1, size), *(random(rows, kv, 1, size),) * 2
        want = prefix_attention(query, key, value, layer, size**-0.5)
        found = prefix_attention(query, key, value, other, size**-0.5)
        # values are of size 1 to 4; bfloat16 has three digits, and shares are rounded to it
        bound = 1e-5 if dtype is torch.float32 else 0.03
        assert float((found.float() - want.float()).abs().max()) < bound
        assert torch.equal(layer.keys, other.keys)
        assert torch.equal(layer.values, other.values)


def test_all_windows_of_a_clip_in_one_call(ready: Inputs) -> None:
    """The towers' features, without a call for each window."""
    policy = load_policy(tiny.checkpoint_dir(), device="cuda", dtype="bfloat16")
    with torch.no_grad():
        want = features(policy, ready.batch)
        with windows(policy.model):
            assert policy.model.visual.config._attn_implementation == WINDOWS
            found = features(policy, ready.batch)
    for modality, one in want.items():
        apart = (found[modality].tokens.float() - one.tokens.float()).norm()
        assert float(apart / one.tokens.float().norm()) < 0.02  # other kernels, in bfloat16


def test_a_recorded_graph_samples_the_same_bits(
    cuda_policy: Policy, ready: Inputs, tmp_path: Path
) -> None:
    """What is captured is not read; the passes before the capture and the last result are."""
    settings: dict[str, Any] = {"group_size": 4, "max_new_tokens": 48, "temperature": 1.6}
    bare = shared_rollout(cuda_policy, ready.batch, **settings)
    with record(tmp_path, model=cuda_policy.model, processor=cuda_policy.processor):
        assert shared_rollout(cuda_policy, ready.batch, **settings) == bare
    trace = load_trace(tmp_path / "step-000000")
    assert "not_recorded" not in trace.header
    calls = calls_of(trace, GenerateCall)
    assert len(calls) == len(ready.batch.rows)
    assert all(call.sequences is not None and call.logprobs is not None for call in calls)


@pytest.mark.parametrize("temperature", [0.0, 1.6])
def test_the_graph_samples_the_plain_rollouts_tokens(
    cuda_policy: Policy, ready: Inputs, temperature: float
) -> None:
    """A compiler or a capture that fails warns, and warnings are errors here."""
    assert Compiled(cuda_policy).usable
    settings: dict[str, Any] = {
        "group_size": 4, "max_new_tokens": 48, "temperature": temperature, "seed": 1,
    }  # fmt: skip
    want = rollout(cuda_policy, ready.batch, **settings).completions
    found = shared_rollout(cuda_policy, ready.batch, **settings).completions
    equal = [a.token_ids == b.token_ids for a, b in zip(found, want, strict=True)]
    # float32: a draw within rounding of the edge of a token's slice may fall on either side
    assert sum(equal) >= 0.97 * len(equal)
    for one, other, same in zip(found, want, equal, strict=True):
        if same:
            assert one.text == other.text
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
