"""Rows of any shape: where everything is, and that merged attention is masked attention."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from sides import assert_parity, packed, plain, ragged, scored, with_adapters

from omni_grpo_core import tiny
from omni_grpo_core.core.batch import collate
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.errors import TrainError
from omni_grpo_core.fast.layout import PackedRow
from omni_grpo_core.fast.segments import packed_attention
from omni_grpo_core.pipeline.inputs import Inputs
from omni_grpo_core.types import Batch, Row

pytestmark = pytest.mark.skipif(
    Version(version("transformers")) < Version("4.57"), reason="no attention functions"
)

CPU = torch.device("cpu")
Lengths = tuple[list[int], list[int]]


@st.composite
def lengths(draw: st.DrawFn) -> Lengths:
    """Up to three prompts and three completions of each; a completion may have no token."""
    prompts = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    count = len(prompts) * draw(st.integers(1, 3))
    return prompts, draw(st.lists(st.integers(0, 5), min_size=count, max_size=count))


@given(lengths(), st.sampled_from([(1, 1), (4, 2), (6, 2)]), st.integers(0, 2**31))
@settings(max_examples=15)
def test_merged_attention_is_masked_attention(
    found: Lengths, heads: tuple[int, int], seed: int
) -> None:
    row = PackedRow.of(*found, CPU)
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(row.length, count, 4, generator=generator, dtype=torch.float64).requires_grad_(
            True
        )
        for count in (heads[0], heads[1], heads[1])
    )
    weights = torch.randn(row.length, heads[0], 4, generator=generator, dtype=torch.float64)
    merged = packed_attention(query, key, value, row, 0.7)
    shared = heads[0] // heads[1]
    masked = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(0, 1),
        key.transpose(0, 1).repeat_interleave(shared, 0),
        value.transpose(0, 1).repeat_interleave(shared, 0),
        attn_mask=row.mask(),
        scale=0.7,
    ).transpose(0, 1)
    # float64: sums of a few dozen numbers of size 1 in another order
    torch.testing.assert_close(merged, masked, atol=1e-12, rtol=0)
    for one, other in zip(
        torch.autograd.grad((merged * weights).sum(), [query, key, value]),
        torch.autograd.grad((masked * weights).sum(), [query, key, value]),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=0)


@given(lengths())
def test_a_token_is_predicted_by_the_last_token_it_may_see(found: Lengths) -> None:
    row = PackedRow.of(*found, CPU)
    sees = row.mask()
    tokens = torch.arange(row.prompt_tokens, row.length)
    assert len(row.predicting()) == len(tokens)
    for token, at in zip(tokens.tolist(), row.predicting().tolist(), strict=True):
        assert sees[token, :token].nonzero().max() == at


def test_completions_that_no_prompt_has_are_refused() -> None:
    with pytest.raises(TrainError, match="3 completions of 2 prompts"):
        PackedRow.of([4, 4], [1, 1, 1], CPU)


def _random_batches(policy: Policy, rows: Sequence[Row], data: st.DataObject) -> None:
    """Up to four prompts of any kinds, up to four completions of each; some may have no token."""
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=4))
    count = len(chosen) * data.draw(st.integers(1, 4))
    sizes = data.draw(st.lists(st.integers(0, 10), min_size=count, max_size=count).filter(any))
    batch = collate([rows[at] for at in chosen], policy.pad_token_id)
    tokens = ragged(policy, sizes, seed=data.draw(st.integers(0, 2**31)))
    checkpointing = data.draw(st.booleans())
    want = scored(policy, plain(policy), batch, tokens)
    assert_parity(scored(policy, packed(policy), batch, tokens, checkpointing=checkpointing), want)


@given(data=st.data())
@settings(max_examples=3)
def test_batches_of_random_shape(policy: Policy, mixed: Batch, data: st.DataObject) -> None:
    _random_batches(policy, mixed.rows, data)


FAMILIES: dict[tiny.FamilyName, str] = {
    "qwen2.5": "policy inputs", "qwen3": "qwen3_policy qwen3_inputs",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
@settings(max_examples=60)
def test_more_batches_of_random_shape(
    request: pytest.FixtureRequest, family: tiny.FamilyName, data: st.DataObject
) -> None:
    """Of all shipped rows: clips of each audio mode, sounds and images alone, text."""
    policy, inputs = map(request.getfixturevalue, FAMILIES[family].split())
    _random_batches(policy, inputs.batch.rows, data)


@pytest.fixture(scope="module", params=FAMILIES)
def adapted(request: pytest.FixtureRequest) -> tuple[Policy, Sequence[Row]]:
    inputs: Inputs = request.getfixturevalue(FAMILIES[request.param].split()[1])
    return with_adapters(request.param), inputs.batch.rows


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=30)
def test_batches_of_random_shape_with_adapters(
    adapted: tuple[Policy, Sequence[Row]], data: st.DataObject
) -> None:
    _random_batches(*adapted, data)
