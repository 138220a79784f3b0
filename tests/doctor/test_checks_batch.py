"""Looks at processor calls and model inputs, mostly on the clean loop."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from doctor_recordings import case, facts, medium, only, processed, steps_with

from omni_grpo_core.doctor.checks import batch as looks
from omni_grpo_core.doctor.checks import flags
from omni_grpo_core.doctor.checks import replayed as checks_replayed
from omni_grpo_core.doctor.continuity import look_at_edges
from omni_grpo_core.doctor.evidence import Case
from omni_grpo_core.doctor.registry import LOOKS
from omni_grpo_core.trace.calls import GenerateCall, ProcessorCall
from omni_grpo_core.types import STAGES, Trace

TEXT = "<|im_start|>user\n<|vision_bos|><|VIDEO|><|vision_eos|><|im_end|>\n<|im_start|>assistant\n"
SOUND = TEXT.replace("<|vision_bos|>", "<|audio_bos|><|AUDIO|><|audio_eos|><|vision_bos|>")
EARLY = STAGES[: STAGES.index("logits")]


def changed(step: Case, kind: type, change: Any) -> Case:
    """``step`` with every value of one kind changed."""
    records = tuple(
        replace(record, value=change(record.value)) if type(record.value) is kind else record
        for record in step.trace.stages
    )
    return Case(Trace(step.trace.header, records), step.reference)


@pytest.mark.parametrize("audio", ["interleaved", "separate", "off"])
@pytest.mark.parametrize("rows", ["alike", "padded, with an image and text"])
def test_a_clean_loop_is_no_evidence(audio: str, rows: str) -> None:
    numbers = {
        "interleaved": ((0, 5), (12, 16, 20)),
        "separate": ((3, 6), (12, 18, 16, 20)),
        "off": ((0, 14), (9, 16, 20)),
    }[audio][rows != "alike"]
    for step in steps_with(audio=audio, rows=numbers):
        found = [e for look in LOOKS for e in look(step) if e.stage in EARLY]
        assert [e.sentence for e in found] == []


@pytest.mark.parametrize(
    ("text", "sounds", "flag", "wrong"),
    [
        (TEXT, 1, True, False),  # the track inside the video
        (TEXT, 1, False, True),
        (TEXT, 1, None, True),
        (TEXT, 0, False, False),  # no sound
        (TEXT, 0, None, False),
        (SOUND, 1, False, False),  # an item of its own
        (SOUND, 1, True, True),
        (SOUND, 2, True, False),  # both: twice, but laid out as the flag says
    ],
)
def test_the_processors_flag_follows_from_counts(
    text: str, sounds: int, flag: bool | None, wrong: bool
) -> None:
    flags_of: dict[str, Any] = {} if flag is None else {"flag": flag}
    audios = (medium("audio"),) * sounds
    call = processed(text, videos=(medium("video"),), audios=audios, **flags_of)
    assert facts(flags.look_flag, case(call)) == ["flag-differs"] * wrong


def test_a_clip_without_sound_beside_clips_with_it() -> None:
    """transformers 5.23 and 5.24 silently skip a clip that has no track. Its row then has positions
    of plain text, and each later row the grid of the one before: all looked right."""
    (step,) = steps_with("batch.silent-clip")
    generate, forward = list(flags.look_mute_beside_heard(step))
    assert generate.values == {"call": "generate", "mute": 2, "clips": 4}
    assert (generate.row, forward.values["call"]) == (0, "the scoring forward")
    # positions inherit the error: they follow a wrong flag
    positions = [e for look in LOOKS for e in look(step) if e.stage == "positions"]
    assert {e.origin for e in positions} <= {"inherited"}
    # sound that does not exist is not reported missing
    assert [e for look in LOOKS for e in look(step) if e.stage in ("conversation", "media")] == []


@pytest.mark.parametrize(
    ("error", "owners", "reported"),
    [
        ("ValueError: Found total 0 <|AUDIO|> tokens and 1 audio inputs.", None, True),
        ("ValueError: Mixing `audio` … requires `audio_from_video_indices`.", None, True),
        ("ValueError: Found total 0 <|AUDIO|> tokens and 1 audio inputs.", [0], False),
        ("ValueError: Found total 3 <|AUDIO|> tokens and 1 audio inputs.", None, False),
        (None, None, False),
    ],
)
def test_tracks_without_owners(error: str | None, owners: list[int] | None, reported: bool) -> None:
    keywords = {"load_audio_from_video": True, "audio_from_video_indices": owners}
    call = processed(
        TEXT, videos=(medium("video"),), audios=(medium("audio"),), error=error, keywords=keywords
    )
    assert facts(flags.look_track_owners, case(call)) == ["tracks-unowned"] * reported


def test_keywords_that_the_processor_ignores() -> None:
    call = processed(TEXT, ignored=("audios",), keywords={"audios": "<list>"})
    assert only(looks.look_keywords, case(call)).values["keyword"] == "audios"


def test_pictures_that_are_resized_again() -> None:
    clip = medium("video")  # 4 frames of 56 x 56: a grid of 4 x 4 patches
    right = processed(TEXT, videos=(clip,), outputs={"video_grid_thw": torch.tensor([[2, 4, 4]])})
    assert facts(looks.look_resized, case(right)) == []
    again = processed(TEXT, videos=(clip,), outputs={"video_grid_thw": torch.tensor([[2, 24, 24]])})
    assert only(looks.look_resized, case(again)).values["times"] == 36


def cut(values: torch.Tensor, start: int | None, end: int | None) -> torch.Tensor:
    return values[:, start:end]


@pytest.mark.parametrize(("start", "end", "side"), [(40, None, "left"), (None, -40, "right")])
def test_a_prompt_that_is_truncated_on_its_way_to_generate(
    start: int | None, end: int | None, side: str
) -> None:
    (step,) = steps_with()

    def shorter(call: GenerateCall) -> GenerateCall:
        names = ("input_ids", "attention_mask")
        inputs = {k: cut(v, start, end) if k in names else v for k, v in call.inputs.items()}
        return replace(call, inputs=inputs)

    (found,) = look_at_edges(changed(step, GenerateCall, shorter))
    assert (found.fact, found.values["side"], found.values["rows"]) == (
        "edge-cut", side, [0, 1, 2, 3]
    )  # fmt: skip
    assert "row 0 of generate: 105 of 145 tokens" in found.sentence


def test_features_without_placeholders_are_counted_by_row() -> None:
    (step,) = steps_with()

    def fewer(call: ProcessorCall) -> ProcessorCall:
        ids = call.outputs["input_ids"].clone()
        sound = 552
        place = int((ids[1] == sound).nonzero()[0])
        ids[1, place] = 10
        return replace(call, outputs={**call.outputs, "input_ids": ids})

    odd = changed(step, ProcessorCall, fewer)
    assert step.reference is not None
    tokenizer = step.reference.policy.processor.tokenizer
    assert tokenizer.convert_tokens_to_ids("<|AUDIO|>") == 552
    found = next(iter(looks.look_placeholders(odd)))
    assert found.values["modality"] == "audio"
    assert found.row == 1
    assert found.values["features"] - found.values["tokens"] == 1
    assert facts(checks_replayed.look_replay, odd) == ["ids-differ"]


def test_padding_mask_and_dtype() -> None:
    (step,) = steps_with(rows=(12, 5))
    assert facts(looks.look_padding, step) == []

    def narrow(call: ProcessorCall) -> ProcessorCall:
        ids = call.outputs["input_ids"].to(torch.int32)
        return replace(call, outputs={**call.outputs, "input_ids": ids})

    def unmasked(call: ProcessorCall) -> ProcessorCall:
        mask = torch.ones_like(call.outputs["attention_mask"])
        return replace(call, outputs={**call.outputs, "attention_mask": mask})

    def mirrored(call: ProcessorCall) -> ProcessorCall:
        names = ("input_ids", "attention_mask")
        flipped = {k: v.flip(1) if k in names else v for k, v in call.outputs.items()}
        return replace(call, outputs=flipped)

    for change, fact in ((narrow, "dtype"), (unmasked, "mask-wrong"), (mirrored, "padded-right")):
        found = facts(looks.look_padding, changed(step, ProcessorCall, change))
        assert found == [fact], fact


def test_a_prompt_that_holds_the_padding_token_itself() -> None:
    """One that begins with it: "truncated on the left" was proved, of a whole row."""
    (step,) = steps_with(rows=(12, 5))

    def begun(call: ProcessorCall) -> ProcessorCall:
        ids = call.outputs["input_ids"].clone()
        mask = call.outputs["attention_mask"]
        ids[torch.arange(len(ids)), mask.argmax(1)] = 549
        texts = tuple(text.replace("<|im_start|>", "<|endoftext|>", 1) for text in call.texts)
        return replace(call, texts=texts, outputs={**call.outputs, "input_ids": ids})

    odd = changed(step, ProcessorCall, begun)
    assert facts(looks.look_padding, odd) == facts(checks_replayed.look_replay, odd) == []


def test_seconds_between_frames_that_change_on_their_way_to_the_model() -> None:
    (step,) = steps_with()
    assert facts(looks.look_seconds, step) == []

    def slower(call: GenerateCall) -> GenerateCall:
        key = "video_second_per_grid"
        return replace(call, inputs={**call.inputs, key: call.inputs[key] * 3})

    found = only(looks.look_seconds, changed(step, GenerateCall, slower))
    assert found.sentence == "video_second_per_grid of generate is the processor's times 3"


def test_grids_in_another_order_than_their_pixels() -> None:
    """They were counted row by row and did not fit, and one of several causes of that was shown:
    the contents show which."""
    step = steps_with(audio="off", rows=(12, 7))[0]

    def turned(call: GenerateCall, *names: str) -> GenerateCall:
        return replace(call, inputs={**call.inputs, **{n: call.inputs[n].flip(0) for n in names}})

    [one] = looks.look_placeholders(
        changed(step, GenerateCall, lambda call: turned(call, "video_grid_thw"))
    )
    assert one.fact == "grids-exchanged"
    assert one.values["pixels"] == "pixel_values_videos"
    both = ("video_grid_thw", "pixel_values_videos")
    [one] = looks.look_placeholders(changed(step, GenerateCall, lambda call: turned(call, *both)))
    assert one.fact == "features-and-tokens"
