"""A trainer's own input path with one mistake in it: ``parity`` names the stage and the mistake.

The path is a user's function of messages and processor. Without a mistake it does what our batch
does, by the checkpoint's own processor, and nothing differs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from omni_grpo_core import tiny
from omni_grpo_core.core.family import QWEN2_5_OMNI
from omni_grpo_core.core.media import load_media, probe
from omni_grpo_core.parity.compare import compare_paths
from omni_grpo_core.parity.given import Setup, row_reader, setup_of
from omni_grpo_core.parity.results import RowResult
from omni_grpo_core.parity.run import run_path
from omni_grpo_core.pipeline.settings import Settings
from omni_grpo_core.types import (
    Audio,
    Conversation,
    Media,
    MediaPart,
    MediaRef,
    Message,
    Sample,
    Trace,
    Video,
)

Output = dict[str, Any]
Path = Callable[[list[dict[str, Any]], Any], Output]
# rows of the shipped data: a clip of 3 s with its sound inside, one of 2 s with it apart, a
# picture, a recording, and text alone
INSIDE, APART, PICTURE, SOUND, TEXT = 13, 11, 17, 19, 21


@pytest.fixture(scope="module")
def setup(settings: Settings) -> Setup:
    return setup_of(tiny.checkpoint_dir(), settings)


@pytest.fixture(scope="module")
def rows(samples: Sequence[Sample]) -> dict[int, Sample]:
    return {number: samples[number - 1] for number in (INSIDE, APART, PICTURE, SOUND, TEXT)}


@pytest.fixture(scope="module")
def ours(setup: Setup, rows: Mapping[int, Sample]) -> dict[int, Trace]:
    return dict(zip(rows, run_path("ours", setup, list(rows.values())), strict=True))


@pytest.fixture
def compared(
    setup: Setup, rows: Mapping[int, Sample], ours: Mapping[int, Trace]
) -> Callable[[int, Path], RowResult]:
    """A row by our path and by another."""

    def compare(number: int, path: Path) -> RowResult:
        theirs = run_path(path, setup, [rows[number]])
        reader = row_reader(setup, [rows[number]])
        (row,) = compare_paths([ours[number]], theirs, setup, reader).rows
        return row

    return compare


def sound_path(setup: Setup, change: Callable[[Media], Media] = lambda media: media) -> Path:
    """What a careful trainer does: reads the files, renders, and calls the processor."""

    def path(messages: list[dict[str, Any]], processor: Any) -> Output:
        refs = [
            MediaRef(part["type"], part[part["type"]])
            for message in messages
            for part in message["content"]
            if part["type"] != "text"
        ]
        inside = [ref.modality for ref in refs] == ["video"] and probe(refs[0].path).has_audio
        message = Message("user", tuple(MediaPart(ref) for ref in refs))
        wanted = Conversation("row", (message,), "interleaved" if inside else "off")
        media = change(load_media(wanted, setup.settings.media))
        flags: Output = {}
        if inside and hasattr(processor, "load_audio_from_video"):
            flags = {"load_audio_from_video": True, "audio_from_video_indices": [0]}
        elif inside:
            flags = {"use_audio_in_video": True}
        output = processor(
            text=processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            ),
            images=[image.pixels.numpy() for image in media.images] or None,
            videos=[video.frames for video in media.videos] or None,
            audio=[audio.samples.numpy() for audio in media.audios] or None,
            fps=media.videos[0].sample_fps if media.videos else None,
            do_resize=False,
            return_tensors="pt",
            **flags,
        )
        return dict(output)

    return path


def on_clips(change: Callable[[Video], Video]) -> Callable[[Media], Media]:
    return lambda media: replace(media, videos=tuple(map(change, media.videos)))


def on_sounds(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Media], Media]:
    def changed(audio: Audio) -> Audio:
        return replace(audio, samples=change(audio.samples))

    return lambda media: replace(media, audios=tuple(map(changed, media.audios)))


def with_ids(setup: Setup, change: Callable[[list[int], dict[str, int]], list[int]]) -> Path:
    """The careful path, and then a change of its ids. Names of tokens: ``V``, ``A``, ``I``, the
    begins ``<v``, ``<a`` and the ends ``v>``, ``a>``."""
    whole = sound_path(setup)

    def path(messages: list[dict[str, Any]], processor: Any) -> Output:
        output = whole(messages, processor)
        tokens = {
            "V": processor.video_token, "A": processor.audio_token, "I": processor.image_token,
            "<v": processor.vision_bos_token, "v>": processor.vision_eos_token,
            "<a": processor.audio_bos_token, "a>": processor.audio_eos_token,
        }  # fmt: skip
        ids = {key: processor.tokenizer.convert_tokens_to_ids(t) for key, t in tokens.items()}
        changed = change(output["input_ids"][0].tolist(), ids)
        return {**output, "input_ids": [changed], "attention_mask": [[1] * len(changed)]}

    return path


@pytest.mark.parametrize("number", [INSIDE, APART, PICTURE, SOUND, TEXT])
def test_a_careful_path_is_equal(
    number: int, setup: Setup, compared: Callable[[int, Path], RowResult]
) -> None:
    row = compared(number, sound_path(setup))
    assert (row.verdict, row.stage, row.causes) == ("equal", "", ())
    # 4 tokens a pair of frames, 6 pairs at 4 frames a second; 25 tokens a second of sound
    media = {
        INSIDE: "16 video, 50 audio, 8 video, 25 audio", APART: "16 video, 51 audio",
        PICTURE: "4 image", SOUND: "25 audio", TEXT: "no media",
    }  # fmt: skip
    assert row.a_media == media[number]


def without(*names: str) -> Callable[[list[int], dict[str, int]], list[int]]:
    return lambda ids, t: [i for i in ids if i not in {t[name] for name in names}]


def appended(ids: list[int], t: dict[str, int]) -> list[int]:
    """All frames, then all of the sound."""
    kept = [i for i in ids if i != t["A"]]
    end = kept.index(t["a>"])
    return kept[:end] + [t["A"]] * ids.count(t["A"]) + kept[end:]


def as_at_two_frames(ids: list[int], t: dict[str, int]) -> list[int]:
    """6 pairs of frames, 4 tokens each, as if a pair lasted a second: two in each chunk."""
    start, end = ids.index(t["V"]), ids.index(t["a>"])
    laid = [t["V"]] * 8 + [t["A"]] * 50 + [t["V"]] * 8 + [t["A"]] * 25 + [t["V"]] * 8
    return ids[:start] + laid + ids[end:]


def again(ids: list[int], t: dict[str, int]) -> list[int]:
    """The engine gets expanded ids and expands the first placeholder of the picture again."""
    at = ids.index(t["I"])
    return ids[:at] + [t["I"]] * ids.count(t["I"]) + ids[at + 1 :]


@pytest.mark.parametrize(
    ("number", "change", "stage", "cause"),
    [
        (INSIDE, appended, "batch", "audio-appended"),
        (INSIDE, as_at_two_frames, "batch", "seconds-per-grid"),
        (INSIDE, without("A", "<a", "a>"), "batch", "flag-lost"),
        (INSIDE, without("<a"), "batch", "marks-dropped"),
        (INSIDE, without("a>", "v>"), "text", "marks-dropped"),
        (PICTURE, again, "batch", "expanded-twice"),
        (APART, without("A", "<a", "a>"), "text", "dropped"),
        (APART, without("V", "A", "<v", "v>", "<a", "a>"), "text", "dropped"),
        (SOUND, lambda ids, t: ids[:20] + ids[21:], "text", "other-system"),
        (SOUND, lambda ids, t: ids[:-20] + ids[-19:], "text", "text"),
        (SOUND, lambda ids, t: ids[:-3], "text", "truncated"),
    ],
)
def test_mistakes_in_the_ids(
    number: int,
    change: Callable[[list[int], dict[str, int]], list[int]],
    stage: str,
    cause: str,
    setup: Setup,
    compared: Callable[[int, Path], RowResult],
) -> None:
    row = compared(number, with_ids(setup, change))
    assert (row.verdict, row.stage) == ("differs", stage)
    assert cause in [found.name for found in row.causes]
    assert row.token is not None


def test_the_order_is_judged_by_the_models_definition(
    setup: Setup, compared: Callable[[int, Path], RowResult]
) -> None:
    row = compared(INSIDE, with_ids(setup, as_at_two_frames))
    assert row.right == "a"
    assert "6 grids of 0.5 s" in row.why
    assert "16 video, 50 audio, 8 video, 25 audio" in row.why
    assert row.b_media == "8 video, 50 audio, 8 video, 25 audio, 8 video"


def one_frame_more(clip: Video) -> Video:
    return replace(clip, frames=torch.cat([clip.frames, clip.frames[-1:]]))


def taller(clip: Video) -> Video:
    wide = torch.nn.functional.interpolate(clip.frames, (84, 56), mode="bilinear")
    return replace(clip, frames=wide)


def slower(samples: torch.Tensor) -> torch.Tensor:
    """As 22,050 samples a second, taken for 16,000."""
    size = len(samples) * 22_050 // 16_000
    wave = torch.nn.functional.interpolate(samples[None, None], size, mode="linear")
    return wave[0, 0]


@pytest.mark.parametrize(
    ("number", "change", "cause"),
    [
        (
            APART,
            on_clips(lambda clip: replace(clip, frames=clip.frames.flip(1))),
            "video-channels-swapped",
        ),
        (APART, on_clips(one_frame_more), "other-frames"),
        (APART, on_clips(lambda clip: replace(clip, frames=clip.frames[:4])), "other-frames"),
        (APART, on_clips(taller), "video-resized"),
        (APART, on_sounds(slower), "audio-resampled"),
        (SOUND, on_sounds(lambda samples: samples[:8000]), "audio-last-dropped"),
        (SOUND, on_sounds(torch.zeros_like), "audio-zero"),
        (SOUND, on_sounds(lambda samples: samples * 32768), "audio-times"),
    ],
)
def test_mistakes_in_the_media(
    number: int,
    change: Callable[[Media], Media],
    cause: str,
    setup: Setup,
    compared: Callable[[int, Path], RowResult],
) -> None:
    row = compared(number, sound_path(setup, change))
    assert (row.verdict, row.stage) == ("differs", "media")
    assert cause in [found.name for found in row.causes]


def test_media_that_never_reach_the_model(
    setup: Setup, compared: Callable[[int, Path], RowResult]
) -> None:
    """Images are passed on, videos and sounds are not: their placeholders stay, unexpanded."""

    def images_only(messages: list[dict[str, Any]], processor: Any) -> Output:
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return dict(processor.tokenizer([text] if isinstance(text, str) else text))

    row = compared(APART, images_only)
    names = [cause.name for cause in row.causes]
    assert row.stage == "media"
    assert {"video-missing", "audio-missing", "not-expanded", "features-missing"} <= {*names}
    assert row.b_media == "1 video, 1 audio"


def test_a_rate_that_is_not_passed_on(
    setup: Setup, compared: Callable[[int, Path], RowResult]
) -> None:
    """Without ``fps`` the processor assumes 2 frames a second; the clip has 4. Ids and pixels are
    right, and each pair of frames seems to last a second."""
    slow = on_clips(lambda clip: replace(clip, sample_fps=2.0))
    row = compared(APART, sound_path(setup, slow))
    assert row.stage == "batch"
    (cause,) = row.causes
    assert cause.name == "frame-rate"
    assert cause.sentence == "a grid lasts 1 s to it, where the first has 0.5 s"


def test_a_prompt_without_its_generation_prompt_and_one_with_a_system_message(
    setup: Setup, compared: Callable[[int, Path], RowResult]
) -> None:
    def bare(messages: list[dict[str, Any]], processor: Any) -> Output:
        text = processor.apply_chat_template(messages, tokenize=False)
        return dict(processor.tokenizer([text] if isinstance(text, str) else text))

    def longer(messages: list[dict[str, Any]], processor: Any) -> Output:
        return dict(processor.tokenizer([f"Be brief.\n{text_of(messages, processor)}"]))

    def text_of(messages: list[dict[str, Any]], processor: Any) -> str:
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return text if isinstance(text, str) else str(text[0])

    row = compared(TEXT, bare)
    assert (row.stage, row.causes[0].name) == ("text", "no-generation-prompt")
    row = compared(TEXT, longer)
    assert (row.stage, row.causes[0].sentence) == ("text", "with 'Be brief.\\n' at character 0")


def test_frames_are_named_by_their_number_in_the_file(
    setup: Setup, compared: Callable[[int, Path], RowResult]
) -> None:
    """The clip has 16 frames at 8 a second. Ours takes 8 of them spread to the last; the change
    leaves the first four of those."""
    short = on_clips(lambda clip: replace(clip, frames=clip.frames[:4]))
    (cause, *_) = compared(APART, sound_path(setup, short)).causes
    assert cause.sentence == (
        "video 0: 4 frames instead of 8, frames 0 2 4 6 of the file's 16, where the first takes "
        "0 2 4 6 9 11 13 15"
    )


def test_another_rows_prompt_and_another_rows_sound(
    setup: Setup, rows: Mapping[int, Sample], ours: Mapping[int, Trace], samples: Sequence[Sample]
) -> None:
    """Answers of an engine taken for those of another request, and a list of sounds that is one
    off: rows 19 and 20 have recordings of one second each."""
    pair = [rows[SOUND], samples[SOUND]]
    first = run_path("ours", setup, pair)
    swapped = [Trace({**b.header, "sample_id": a.header["sample_id"]}, b.stages)
               for a, b in zip(first, first[::-1], strict=True)]  # fmt: skip
    found = compare_paths(first, swapped, setup).rows
    assert [[c.name for c in row.causes] for row in found] == [["another-row"]] * 2
    assert found[0].causes[0].sentence == "the ids are those of row samples.json:20"

    other = load_media(
        Conversation("row", (Message("user", (MediaPart(samples[SOUND].media[0]),)),), "off"),
        setup.settings.media,
    )
    theirs = run_path(
        sound_path(setup, lambda media: replace(media, audios=other.audios)), setup, pair
    )
    (row, _) = compare_paths(first, theirs, setup, row_reader(setup, pair)).rows
    assert [c.name for c in row.causes] == ["audio-swapped-with"]
    assert row.causes[0].sentence.endswith("of audio 0 of row samples.json:20 instead")


def test_positions_by_hand(setup: Setup) -> None:
    """25 a second: pairs of frames half a second apart are 12 (12.5 cut off) and 13 apart."""
    assert QWEN2_5_OMNI.audio_tokens(100) == 25
    assert [int(pair * 0.5 * 25) for pair in range(4)] == [0, 12, 25, 37]


def test_a_mistake_of_the_first_side_has_the_same_name(
    setup: Setup, rows: Mapping[int, Sample], ours: Mapping[int, Trace]
) -> None:
    """``parity my:collate ours``: what is missing there is not called added here."""
    theirs = run_path(with_ids(setup, without("<a")), setup, [rows[INSIDE]])
    (row,) = compare_paths(theirs, [ours[INSIDE]], setup).rows
    assert [(c.name, c.sentence) for c in row.causes] == [
        ("marks-dropped", "with the two exchanged: begin of audio dropped")
    ]
