from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

from omni_grpo_core.core.batch import collate, find_spans, placeholder_ids, process_row, render
from omni_grpo_core.core.conversation import build_conversation
from omni_grpo_core.core.forward import positions, prefill
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.errors import BatchError
from omni_grpo_core.pipeline.inputs import Inputs
from omni_grpo_core.types import Audio, Batch, Modality, Row, Sample, Span

TOKENS: dict[Modality, int] = {"image": 7, "video": 8, "audio": 9}


def spans(ids: list[int], **expected: Sequence[int]) -> tuple[Span, ...]:
    lengths: dict[Modality, Sequence[int]] = {
        "image": expected.get("image", ()),
        "video": expected.get("video", ()),
        "audio": expected.get("audio", ()),
    }
    return find_spans(torch.tensor(ids), TOKENS, lengths, "sample s")


def test_spans_by_hand() -> None:
    assert spans([1, 8, 8, 2, 9, 9, 9, 2], video=[2], audio=[3]) == (
        Span("video", 0, 1, 2),
        Span("audio", 0, 4, 3),
    )


def test_an_interleaved_video_and_its_audio_alternate() -> None:
    assert spans([1, 8, 8, 9, 8, 9, 9, 2, 8, 3], video=[3, 1], audio=[3]) == (
        Span("video", 0, 1, 2),
        Span("audio", 0, 3, 1),
        Span("video", 0, 4, 1),
        Span("audio", 0, 5, 2),
        Span("video", 1, 8, 1),
    )


@pytest.mark.parametrize(
    ("ids", "expected", "message"),
    [
        ([1, 9, 9, 9], {"audio": [2]}, "3 audio placeholders at token 1, wanted 2"),
        ([1, 9, 9], {"audio": [3]}, "audio item 0 with 1 features too many"),
        ([1, 2], {"audio": [3]}, "audio item 0 with 3 features too many"),
        ([1, 8], {}, "1 video placeholders at token 1, wanted 0"),
        ([9, 9, 1, 9], {"audio": [2]}, "1 audio placeholders at token 3, wanted 0"),
    ],
)
def test_counts_that_disagree_are_refused_for_every_modality(
    ids: list[int], expected: dict[str, list[int]], message: str
) -> None:
    """transformers checks only images and videos: for audio it takes the first features and shifts
    everything after, across the batch, with nothing raised."""
    with pytest.raises(BatchError, match=message):
        spans(ids, **expected)


def test_collate_pads_to_the_left(policy: Policy) -> None:
    rows = [
        Row("a", torch.tensor([5, 6]), "off", (), {}),
        Row("b", torch.tensor([7]), "off", (), {}),
    ]
    batch = collate(rows, 0)
    assert batch.input_ids.tolist() == [[5, 6], [0, 7]]
    assert batch.attention_mask.tolist() == [[1, 1], [0, 1]]
    assert batch.pads == (0, 1)


def test_no_rows_is_an_error() -> None:
    with pytest.raises(BatchError, match="no rows"):
        collate([], 0)


def test_the_mixed_batch_mixes_everything(mixed: Batch) -> None:
    modes = [row.audio_in_video for row in mixed.rows]
    assert modes == ["interleaved"] * 2 + ["separate"] * 2 + ["off"] * 4
    assert len(set(mixed.pads)) > 3
    several = [s for s in mixed.rows[0].spans + mixed.rows[1].spans if s.modality == "video"]
    assert len(several) > 2, "a clip of more than one chunk: video and audio really alternate"


def test_a_row_alone_equals_the_row_in_a_mixed_padded_batch(policy: Policy, mixed: Batch) -> None:
    together = prefill(policy, mixed)
    for index, row in enumerate(mixed.rows):
        alone = prefill(policy, collate([row], policy.pad_token_id))
        pad = mixed.pads[index]
        assert torch.equal(mixed.input_ids[index, pad:], row.input_ids)
        in_batch = together.positions.position_ids[:, index, pad:]
        assert torch.equal(in_batch, alone.positions.position_ids[:, 0])
        assert together.positions.deltas[index] == alone.positions.deltas[0]
        # float32 sums in another order over a padded width: measured 9e-7, a tenfold margin
        torch.testing.assert_close(
            together.logits.values[index], alone.logits.values[0], rtol=0, atol=1e-5
        )


def test_padding_further_changes_nothing(policy: Policy, mixed: Batch) -> None:
    wide = Row("wide", torch.full((mixed.input_ids.shape[1] + 9,), 3), "off", (), {})
    wider = collate([*mixed.rows, wide], policy.pad_token_id)
    before, after = prefill(policy, mixed), prefill(policy, wider)
    # same reason and margin as above
    torch.testing.assert_close(after.logits.values[:-1], before.logits.values, rtol=0, atol=1e-5)


def test_positions_need_the_row_s_own_audio_decision(policy: Policy, mixed: Batch) -> None:
    """One flag for the whole call, as in transformers, is wrong for the other rows."""
    row = mixed.rows[0]
    off = collate([replace(row, audio_in_video="separate")], policy.pad_token_id)
    assert not torch.equal(
        positions(policy, collate([row], 0)).position_ids, positions(policy, off).position_ids
    )


def _inputs_of(inputs: Inputs, index: int) -> tuple[Any, Any, Any]:
    return inputs.prompts[index], inputs.conversations[index], inputs.media[index]


def test_a_prompt_over_the_limit_is_refused_not_truncated(policy: Policy, inputs: Inputs) -> None:
    with pytest.raises(BatchError, match=r"a prompt of \d+ tokens, wanted at most 40"):
        process_row(*_inputs_of(inputs, 0), policy.processor, policy.family, max_length=40)


@pytest.mark.parametrize(
    ("seconds", "fix"),
    [(1 / 16000, "use a longer"), (0.01, "use a longer"), (3600, "cut the clip")],
)
def test_audio_that_the_extractor_would_truncate_is_refused(
    policy: Policy, inputs: Inputs, seconds: float, fix: str
) -> None:
    """The message for a single audio sample advised cutting it."""
    prompt, conversation, media = _inputs_of(inputs, 0)
    sound = Audio(torch.zeros(int(seconds * 16000)), from_video=0)
    with pytest.raises(BatchError, match=rf"audio 0: found .* s of audio.*; {fix}"):
        process_row(
            prompt, conversation, replace(media, audios=(sound,)), policy.processor, policy.family
        )


def test_media_of_another_sample_are_refused(policy: Policy, inputs: Inputs) -> None:
    """Where the counts differ; where they agree, only goldens and swapping can show it."""
    prompt, conversation, _ = _inputs_of(inputs, 0)
    no_media = inputs.media[-1]
    with pytest.raises(BatchError, match="0 video items decoded, wanted 1"):
        process_row(prompt, conversation, no_media, policy.processor, policy.family)


def test_a_video_without_its_track_cannot_be_interleaved(policy: Policy, inputs: Inputs) -> None:
    """The processor raises a bare StopIteration with an empty message."""
    prompt, conversation, media = _inputs_of(inputs, 0)
    assert conversation.audio_in_video == "interleaved"
    with pytest.raises(BatchError, match="0 interleaved tracks for 1 videos"):
        process_row(
            prompt, conversation, replace(media, audios=()), policy.processor, policy.family
        )


def test_a_placeholder_in_the_question_is_refused(
    policy: Policy, samples: tuple[Sample, ...]
) -> None:
    text_only = next(sample for sample in samples if not sample.media)
    asked = replace(text_only, question="What does <|VIDEO|> mean?")
    conversation = build_conversation(asked, tracks={})
    with pytest.raises(BatchError, match="1 video placeholders in the rendered text, wanted 0"):
        render(conversation, policy.processor)


def test_the_sampled_frame_rate_reaches_the_time_positions(policy: Policy, inputs: Inputs) -> None:
    prompt, conversation, media = _inputs_of(inputs, 0)
    half = replace(
        media, videos=tuple(replace(v, sample_fps=v.sample_fps / 2) for v in media.videos)
    )
    row = process_row(prompt, conversation, half, policy.processor, policy.family)
    was = inputs.batch.rows[0].tensors["video_second_per_grid"]
    assert torch.equal(row.tensors["video_second_per_grid"], 2 * was)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.14"),
    reason="its image processors return only torch tensors",
)
def test_a_row_is_made_without_a_warning(policy: Policy, inputs: Inputs) -> None:
    """Torch tensors, counted in numpy inside the omni processors, warn about ``__array__`` without
    ``copy``: an error where warnings are errors. No number changes."""
    for index in range(len(inputs.batch.rows)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            row = process_row(*_inputs_of(inputs, index), policy.processor, policy.family)
        # the goldens contain every number; numpy's own floats would be wider
        assert torch.float64 not in {value.dtype for value in row.tensors.values()}


def test_placeholder_ids_come_from_the_checkpoint(policy: Policy) -> None:
    config = policy.model.config
    assert placeholder_ids(policy.processor) == {
        "image": config.image_token_id,
        "video": config.video_token_id,
        "audio": config.audio_token_id,
    }
