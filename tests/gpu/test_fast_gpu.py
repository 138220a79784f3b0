"""The fast step on a CUDA device: its kernels and its graph against the plain step there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from omni_grpo_core import tiny
from omni_grpo_core.core.policy import Policy, load_policy
from omni_grpo_core.core.rollout import rollout
from omni_grpo_core.fast.layout import PackedRow
from omni_grpo_core.fast.rollout import shared_rollout
from omni_grpo_core.fast.segments import packed_attention
from omni_grpo_core.pipeline.inputs import Inputs, prepare
from omni_grpo_core.pipeline.settings import load_settings
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


@pytest.mark.parametrize("temperature", [0.0, 1.6])
def test_the_graph_samples_the_plain_rollouts_tokens(
    cuda_policy: Policy, ready: Inputs, temperature: float
) -> None:
    """A capture that fails warns, and warnings are errors here."""
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
