"""Several media in one row: two videos of different length in one prompt were refused, since
transformers' processor takes one frame rate for all of them.

Each clip gets what it gets alone. In both families: grids, pixels, seconds per grid and tower
features are equal, positions equal up to where the clip begins, and the logits after it are those
of the clip alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from media_files import numbered, tone, write_media
from torch import Tensor

from omni_grpo_core.core.batch import check_batch, collate, process_row, render
from omni_grpo_core.core.conversation import (
    SYSTEM_PROMPT,
    build_conversation,
    check_conversation,
)
from omni_grpo_core.core.forward import embed, library_forward, positions, prefill, text_states
from omni_grpo_core.core.media import MediaConfig, load_media, probe
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.errors import BatchError
from omni_grpo_core.pipeline.checks import check_positions
from omni_grpo_core.types import (
    Audio,
    Conversation,
    Dialogue,
    Media,
    MediaPart,
    MediaRef,
    Message,
    Modality,
    Row,
    Sample,
    TextPart,
)

SMALL = MediaConfig(max_frames=14, max_pixels=56 * 84, image_max_pixels=56 * 84)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Clips of 2.5 s at ten frames a second and 4 s at six, with sound and without; a recording."""
    folder = tmp_path_factory.mktemp("clips")
    return {
        "short": write_media(folder / "short.mp4", numbered(25), tone(2.5, 16_000), fps=10),
        "long": write_media(folder / "long.mp4", numbered(24), tone(2.4, 16_000), fps=6),
        "mute": write_media(folder / "mute.mp4", numbered(24), fps=6),
        "sound": write_media(
            folder / "sound.wav", audio=tone(1.5, 16_000), audio_codec="pcm_s16le"
        ),
    }


@pytest.fixture(params=["qwen2.5", "qwen3"])
def either(request: pytest.FixtureRequest) -> Policy:
    name = "policy" if request.param == "qwen2.5" else "qwen3_policy"
    found: Policy = request.getfixturevalue(name)
    return found


def made(policy: Policy, conversation: Conversation) -> tuple[Row, Media]:
    media = load_media(conversation, SMALL, patch_size=policy.patch_size)
    prompt = render(conversation, policy.processor)
    return process_row(prompt, conversation, media, policy.processor, policy.family), media


def asked(paths: Sequence[tuple[Modality, Path]], question: str = "Which?") -> Sample:
    media = tuple(MediaRef(modality, str(path)) for modality, path in paths)
    return Sample("s", question, "free-form", (), "<answer>x</answer>", media, "rows.json:1")


def conversation_of(sample: Sample) -> Conversation:
    videos = [ref.path for ref in sample.media if ref.modality == "video"]
    return build_conversation(sample, tracks={path: probe(path).has_audio for path in videos})


def shown(videos: Sequence[Path], mode: str) -> Conversation:
    """Only these clips and a word: no text that says how many there are."""
    parts = [MediaPart(MediaRef("video", str(path))) for path in videos]
    message = Message("user", (*parts, TextPart("Which?")))
    return Conversation("s", (message,), "interleaved" if mode == "interleaved" else "off")


def block(row: Row, item: int) -> slice:
    """The tokens of a video, with what surrounds it."""
    spans = [s for s in row.spans if s.modality == "video" and s.item == item]
    around = 2 if row.audio_in_video == "interleaved" else 1
    last = spans[-1]
    for span in row.spans:  # the sound may go on after the last frame
        if span.modality == "audio" and span.item == item:
            last = max(last, span, key=lambda s: s.start)
    return slice(spans[0].start - around, last.start + last.length + around)


def hidden(policy: Policy, row: Row, since: int) -> Tensor:
    """Logits after every token, (length, V), with all tokens before ``since`` out of sight."""
    batch = collate([row], policy.pad_token_id)
    mask = batch.attention_mask.clone()
    mask[:, :since] = 0
    with torch.no_grad():
        states = text_states(
            policy,
            batch,
            embed(policy, batch),
            attention_mask=mask,
            position_ids=positions(policy, batch).position_ids,
        ).last_hidden_state[0]
        logits: Tensor = policy.model.lm_head(states).float()
    return logits


@pytest.mark.parametrize("mode", ["off", "interleaved"])
def test_two_clips_of_different_rate_are_each_as_alone(
    either: Policy, files: dict[str, Path], mode: str
) -> None:
    """25 frames at 10 a second last 2.5 s: at 2 a second four are taken, 1.6 a second. Of 24 at 6 a
    second, which last 4 s, eight, 2 a second."""
    clips = [files["short"], files["long" if mode == "interleaved" else "mute"]]
    row, media = made(either, shown(clips, mode))
    assert [round(video.sample_fps, 9) for video in media.videos] == [1.6, 2.0]
    assert row.tensors["video_second_per_grid"].tolist() == [1.25, 1.0]
    patches = row.tensors["video_grid_thw"].prod(-1).tolist()
    pixels = torch.split(row.tensors["pixel_values_videos"], patches)
    where = positions(either, collate([row], 0)).position_ids[:, 0]
    for item, clip in enumerate(clips):
        alone, _ = made(either, shown([clip], mode))
        for key in ("video_grid_thw", "video_second_per_grid"):
            assert torch.equal(row.tensors[key][item : item + 1], alone.tensors[key])
        assert torch.equal(pixels[item], alone.tensors["pixel_values_videos"])
        here, there = block(row, item), block(alone, 0)
        assert torch.equal(row.input_ids[here], alone.input_ids[there])
        its = positions(either, collate([alone], 0)).position_ids[:, 0]
        shifted = where[:, here] - where[:, here][:, :1]
        # float32 in the second family: positions below 256 are exact to 2^-17
        torch.testing.assert_close(
            shifted, its[:, there] - its[:, there][:, :1], rtol=0, atol=2**-16
        )
        # rotary attention sees differences of positions: from the clip on, nothing differs
        ours = hidden(either, row, here.start)[here]
        theirs = hidden(either, alone, there.start)[there]
        # float32 at logits of up to 25, rotated by other angles: measured 2e-5
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("mode", ["off", "interleaved"])
def test_a_row_of_two_rates_is_what_transformers_computes_with_each_clip_s_seconds(
    either: Policy, files: dict[str, Path], mode: str
) -> None:
    row, _ = made(either, shown([files["short"], files["long"]], mode))
    found, theirs = prefill(either, collate([row], 0)), library_forward(either, row)
    assert torch.equal(found.positions.position_ids[:, 0], theirs.position_ids)
    # float32 sums in another order, as for rows alone: measured 6e-6
    torch.testing.assert_close(found.logits.values[0], theirs.logits, rtol=1e-5, atol=3e-5)


def test_only_the_clip_with_sound_is_interleaved(either: Policy, files: dict[str, Path]) -> None:
    """Each clip has its own decision; a silent one kept all others of its row from being
    interleaved."""
    sample = asked([("video", files["mute"]), ("video", files["short"]), ("video", files["mute"])])
    conversation = conversation_of(sample)
    assert conversation.audio_in_video == ("off", "interleaved", "off")
    text = conversation.messages[-1].parts[-1]
    assert isinstance(text, TextPart)
    assert text.text.startswith("You are given 3 videos, 1 of them with sound.\nWhich?")
    row, media = made(either, conversation)
    batch = collate([row], either.pad_token_id)
    assert all(c.ok for c in check_conversation(sample, conversation))
    checks = check_batch(batch, [conversation], [media], either.processor, either.family)
    assert all(check.ok for check in checks), checks
    order = [s.modality for s in row.spans if s.item == (1 if s.modality == "video" else 0)]
    assert order[:2] == ["video", "audio"]
    where, theirs = positions(either, batch), library_forward(either, row)
    assert all(check.ok for check in check_positions(either, batch, where, [theirs]))
    # a cut before a clip leaves no gap: the special token before it follows what is before
    times = where.position_ids[0, 0]
    starts = [
        first.start - 1 for first in row.spans if first.modality == "video" and first.item == 2
    ]
    assert times[starts[0]] == times[: starts[0]].max() + 1
    # positions given to transformers' own forward, which has one flag for all clips
    ours = prefill(either, batch)
    torch.testing.assert_close(ours.logits.values[0], theirs.logits, rtol=1e-5, atol=3e-5)


def test_image_video_and_several_recordings_in_the_places_of_their_marks(
    either: Policy, files: dict[str, Path], tmp_path: Path
) -> None:
    from PIL import Image

    picture = tmp_path / "p.png"
    Image.new("RGB", (84, 56), (200, 30, 30)).save(picture)
    sample = asked(
        [
            ("video", files["mute"]),
            ("image", picture),
            ("audio", files["sound"]),
            ("audio", files["short"]),
        ],
        "Is <image> from this clip? And <audio>, or <audio>?",
    )
    conversation = conversation_of(sample)
    parts = conversation.messages[-1].parts
    kinds = [p.ref.modality if isinstance(p, MediaPart) else p.text.split("\n")[0] for p in parts]
    assert kinds == [
        "video",
        "You are given an image and a video and 2 audio recordings.",
        "image",
        " from this clip? And ",
        "audio",
        ", or ",
        "audio",
        "?",
    ]
    assert all(check.ok for check in check_conversation(sample, conversation))
    row, _ = made(either, conversation)
    # 1.5 and 2.5 s of sound
    heard = [s.length for s in row.spans if s.modality == "audio"]
    assert heard[0] < heard[1]
    ours = prefill(either, collate([row], 0))
    if not either.library_joins_pictures:
        with pytest.raises(BatchError, match="images and videos in one row"):
            library_forward(either, row)
        return
    theirs = library_forward(either, row)
    assert torch.equal(ours.positions.position_ids[:, 0], theirs.position_ids)


def test_a_mark_without_a_medium_is_text() -> None:
    sample = replace(asked([]), question="What does <audio> do in HTML?")
    conversation = build_conversation(sample, tracks={})
    (text,) = conversation.messages[-1].parts
    assert isinstance(text, TextPart)
    assert "What does <audio> do in HTML?" in text.text


def test_two_turns_with_media(either: Policy, files: dict[str, Path]) -> None:
    clips = [MediaRef("video", str(files[name])) for name in ("mute", "short")]
    told = (
        Message("system", (TextPart("Be brief."),)),
        Message("user", (MediaPart(clips[0]), TextPart("What is it?"))),
        Message("assistant", (TextPart("A grey box."),)),
    )
    sample = Dialogue(
        "s",
        "And <video>?",
        "free-form",
        (),
        "<answer>x</answer>",
        tuple(clips),
        "rows.json:1",
        told,
    )
    conversation = conversation_of(sample)
    assert [message.role for message in conversation.messages] == [
        "system",
        "user",
        "assistant",
        "user",
    ]
    assert conversation.messages[0].parts == (TextPart(f"Be brief.\n{SYSTEM_PROMPT}"),)
    assert conversation.messages[1:3] == told[1:]
    last = conversation.messages[3].parts
    # one mark for the one clip of this turn
    assert last[0] == TextPart("You are given 2 videos, 1 of them with sound.\nAnd ")
    assert last[1] == MediaPart(clips[1])
    assert all(check.ok for check in check_conversation(sample, conversation))
    row, _ = made(either, conversation)
    ours, theirs = prefill(either, collate([row], 0)), library_forward(either, row)
    assert torch.equal(ours.positions.position_ids[:, 0], theirs.position_ids)


@pytest.mark.parametrize("seconds", [8, 45])
def test_only_one_family_limits_the_length_of_a_sound(either: Policy, seconds: int) -> None:
    """The checkpoints' extractors take 8 s. Qwen3-Omni's tower takes any length, a second at a
    time: 13 tokens each. transformers 4.57 cuts there nevertheless, unless told not to."""
    message = Message("user", (MediaPart(MediaRef("audio", "a.wav")), TextPart("Which?")))
    conversation = Conversation("s", (message,), "off")
    media = Media("s", (), (), (Audio(torch.rand(16_000 * seconds) - 0.5),), "made here")
    prompt = render(conversation, either.processor)
    arguments = (prompt, conversation, media, either.processor, either.family)
    if seconds > 8 and either.family.audio_limited:
        with pytest.raises(BatchError, match=r"45\.00 s of audio .* to 8 s"):
            process_row(*arguments)
        return
    (span,) = process_row(*arguments).spans
    assert span.length == seconds * (25 if either.family.audio_limited else 13)
