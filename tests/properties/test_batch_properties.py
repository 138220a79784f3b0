"""Spans tile the media tokens; permuting samples permutes the outputs."""

from __future__ import annotations

from typing import get_args

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_grpo_core.core.batch import collate, find_spans, placeholder_ids
from omni_grpo_core.core.forward import positions, prefill
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.pipeline.inputs import Inputs
from omni_grpo_core.types import Modality

TOKENS: dict[Modality, int] = {"image": 7, "video": 8, "audio": 9}


@st.composite
def token_rows(draw: st.DrawFn) -> tuple[list[int], dict[Modality, list[int]]]:
    """Text with media items in between; text may split an item into several runs."""
    ids: list[int] = draw(st.lists(st.integers(0, 3), max_size=3))
    lengths: dict[Modality, list[int]] = {"image": [], "video": [], "audio": []}
    for modality in draw(st.lists(st.sampled_from(get_args(Modality)), max_size=6)):
        runs = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
        for run in runs:
            ids += [TOKENS[modality]] * run + draw(
                st.lists(st.integers(0, 3), min_size=1, max_size=3)
            )
        lengths[modality].append(sum(runs))
    return ids, lengths


@given(token_rows())
def test_spans_tile_exactly_the_media_tokens(
    row: tuple[list[int], dict[Modality, list[int]]],
) -> None:
    ids, lengths = row
    spans = find_spans(torch.tensor(ids, dtype=torch.int64), TOKENS, lengths, "sample")
    covered = [i for span in spans for i in range(span.start, span.start + span.length)]
    assert covered == [i for i, token in enumerate(ids) if token in TOKENS.values()]
    for span in spans:
        assert set(ids[span.start : span.start + span.length]) == {TOKENS[span.modality]}
    for modality, wanted in lengths.items():
        found = [
            sum(s.length for s in spans if s.modality == modality and s.item == item)
            for item in range(len(wanted))
        ]
        assert found == wanted


def test_spans_of_the_shipped_samples_tile_their_media_tokens(
    policy: Policy, inputs: Inputs
) -> None:
    media_ids = set(placeholder_ids(policy.processor).values())
    for row in inputs.batch.rows:
        covered = [i for s in row.spans for i in range(s.start, s.start + s.length)]
        wanted = [i for i, token in enumerate(row.input_ids.tolist()) if token in media_ids]
        assert covered == wanted


@given(st.data())
@settings(max_examples=10)  # each runs the model
def test_permuting_samples_permutes_outputs(
    policy: Policy, inputs: Inputs, data: st.DataObject
) -> None:
    rows = data.draw(
        st.lists(st.sampled_from(inputs.batch.rows), min_size=2, max_size=4, unique_by=id)
    )
    order = data.draw(st.permutations(range(len(rows))))
    with torch.no_grad():
        batch = collate(rows, policy.pad_token_id)
        permuted = collate([rows[i] for i in order], policy.pad_token_id)
        before, after = prefill(policy, batch), prefill(policy, permuted)
    index = torch.tensor(order)
    assert torch.equal(permuted.input_ids, batch.input_ids[index])
    assert torch.equal(
        positions(policy, permuted).position_ids, positions(policy, batch).position_ids[:, index]
    )
    # float32: another row order may change the blocking of the sums; measured below 2e-6
    torch.testing.assert_close(after.logits.values, before.logits.values[index], rtol=0, atol=1e-5)
