"""Looks at media: by hand where no model is needed, on shipped clips where files are read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from doctor_recordings import SYSTEM, case, facts, medium, only, processed, rendered, template, user

from omni_grpo_core import tiny
from omni_grpo_core.core.media import load_media
from omni_grpo_core.core.media_config import MediaConfig
from omni_grpo_core.doctor.checks import content, frame_rate
from omni_grpo_core.doctor.checks import media as looks
from omni_grpo_core.doctor.evidence import Case, noted_missing
from omni_grpo_core.faults.trial import reference
from omni_grpo_core.pipeline.settings import load_settings
from omni_grpo_core.recorder.media import media_seen
from omni_grpo_core.types import Conversation, MediaPart, MediaRef, Message

FOLDER = tiny.data_file().parent
CLIPS = tuple(str(FOLDER / f"clip-0{n}.mp4") for n in (0, 3))


def frames(path: str, config: MediaConfig | None = None) -> torch.Tensor:
    ref = MediaRef("video", path)
    asked = Conversation("a", (Message("user", (MediaPart(ref),)),), "off")
    settings = load_settings(tiny.checkpoint_dir())
    return load_media(asked, config or settings.media).videos[0].frames


def step(*given: torch.Tensor, fps: float | None = 4.0, **call: Any) -> Case:
    """Two conversations on two shipped clips, and the frames passed for them."""
    asked = [(SYSTEM, user(f"video {path}", question=f"Where does {path} go?")) for path in CLIPS]
    keywords = {"fps": fps} if fps else {}
    return case(
        *(template(*messages) for messages in asked),
        processed(
            *(rendered(messages) for messages in asked),
            videos=tuple(medium("video", values) for values in given),
            keywords={**keywords, **call.pop("keywords", {})},
            **call,
        ),
        reference=reference("float32"),
    )


def test_the_files_own_frames_are_right() -> None:
    assert [e for look in looks.LOOKS for e in look(step(*map(frames, CLIPS)))] == []


def test_another_samples_clip() -> None:
    swapped = step(frames(CLIPS[1]), frames(CLIPS[0]))
    first, second = content.look_content(swapped)
    assert {first.fact, second.fact} == {"media-swapped"}
    assert first.values["shown"] == "clip-03.mp4"
    assert first.values["file"] == "clip-00.mp4"


@pytest.mark.parametrize(
    ("change", "fact", "said"),
    [
        (torch.zeros_like, "medium-blank", "is blank"),
        (lambda clip: clip.flip(1), "content-changed", "clip-00.mp4 with red and blue swapped"),
        (lambda clip: clip.flip(-1), "content-changed", "clip-00.mp4 mirrored left to right"),
        (lambda clip: clip / 255, "content-changed", "clip-00.mp4 divided by 255"),
        (lambda clip: clip.flip(0), "frames-order", "its frames in reverse order: 7 5 2 0 of 8"),
        (lambda clip: clip[[0, 2, 1, 3]], "frames-order", "with frames 1 and 2 swapped"),
        # half of the clip, twice: not "frames 1 and 2 swapped" of a clip that stood still
        (lambda clip: clip[[0, 1, 0, 1]], "frames-order", "2 times over along its frames: 0 2 0 2"),
        (lambda clip: clip[:1].expand_as(clip), "frames-frozen", "all 4 frames of video 0"),
        (lambda clip: torch.rand_like(clip) * 255, "content-differs", "off the nearest of clip-00"),
    ],
)
def test_frames_that_are_not_the_files(change: Any, fact: str, said: str) -> None:
    odd = step(change(frames(CLIPS[0])), frames(CLIPS[1]))
    found = only(content.look_content, odd)
    assert (found.fact, found.severity) == (fact, "breaks")
    assert said in found.sentence


@pytest.mark.parametrize(
    ("numbers", "how"),
    [([0, 2, 4, 6], "library"), ([0, 0, 2, 5], "one-before"), ([1, 3, 5, 7], ""), ([2, 5], "")],
)
def test_other_frames_of_the_file_are_another_recipe(numbers: list[int], how: str) -> None:
    """Of 8 frames qwen-omni-utils takes 0 2 5 7. Another decoder, rate or stride is no error."""
    every = replace(load_settings(tiny.checkpoint_dir()).media, fps=8.0)
    clip = frames(CLIPS[0], every)
    assert len(clip) == 8
    found = list(content.look_content(step(clip[numbers], frames(CLIPS[1]))))
    # at even steps, or of another number: a sampler of somebody's own
    assert [(one.values["how"], one.severity) for one in found] == [(how, "differs")] * bool(how)
    shown = f"frames {' '.join(map(str, numbers))} of the 8"
    assert all(shown in one.sentence for one in found)


def test_frames_shown_twice_where_the_file_has_others() -> None:
    clip = frames(CLIPS[0])
    found = only(content.look_content, step(clip[[0, 0, 2, 2]], frames(CLIPS[1])))
    assert (found.fact, found.severity) == ("frames-repeated", "breaks")
    # "sampled at 12 per second" was said first
    assert list(frame_rate.look_rate(step(clip[[0, 0, 2, 2]], frames(CLIPS[1])))) == []
    assert "each of its 2 frames 2 times: 0 0 5 5 of 8" in found.sentence


@pytest.mark.parametrize("size", [(84, 84), (28, 56)])
def test_frames_resized_by_the_loops_own_code_are_another_recipe(size: tuple[int, int]) -> None:
    clip = torch.nn.functional.interpolate(frames(CLIPS[0]), size, mode="bilinear", antialias=True)
    found = list(content.look_content(step(clip, frames(CLIPS[1]))))
    assert {one.severity for one in found} == {"differs"}
    assert "picture-size" in {one.fact for one in found}


def test_a_path_is_not_compared_with_its_content() -> None:
    path = media_seen("video", [CLIPS[0]], lambda tensor: True)
    messages = (SYSTEM, user(f"video {CLIPS[0]}"))
    given = case(
        template(*messages),
        processed(rendered(messages), videos=path),
        reference=reference("float32"),
    )
    assert facts(content.look_content, given) == []
    assert any("paths" in note for note in noted_missing(given))


def test_a_decoder_that_rounds_differently_is_accepted() -> None:
    clips = [frames(path) + 0.4 for path in CLIPS]  # less than half a grey level
    assert facts(content.look_content, step(*clips)) == []


def test_a_frame_rate_that_was_not_passed() -> None:
    clips = [frames(path) for path in CLIPS]
    found = next(iter(frame_rate.look_rate(step(*clips, fps=None))))
    assert found.values == {"told": None, "took": 2.0, "true": 4.0}
    assert facts(frame_rate.look_rate, step(*clips, keywords={"fps": [4.0]})) == []


def test_the_rounding_of_the_official_sampler_is_no_other_rate() -> None:
    """qwen-omni-utils takes frames evenly from the first to the last, and tells frames by the
    clip's length. Counting steps by the time between them gave every healthy run the headline "4
    frames were sampled at 3.4 per second, but the processor got fps=4"."""
    every = replace(load_settings(tiny.checkpoint_dir()).media, fps=8.0)
    clips = [frames(path, every)[[0, 2, 5, 7]] for path in CLIPS]
    assert facts(frame_rate.look_rate, step(*clips, fps=4.0)) == []
    # the first half alone is another rate, whatever the clip's length says
    half = [frames(path, every)[:4] for path in CLIPS]
    assert only(frame_rate.look_rate, step(*half, fps=4.0)).values["true"] == 8.0


def sounds(change: Any) -> Case:
    """One recording, its track changed by ``change``."""
    ref = MediaRef("audio", CLIPS[0])
    heard = load_media(Conversation("a", (Message("user", (MediaPart(ref),)),), "off"))
    messages = (SYSTEM, user(f"audio {CLIPS[0]}"))
    given = (medium("audio", change(heard.audios[0].samples)),)
    call = processed(rendered(messages), audios=given)
    return case(template(*messages), call, reference=reference("float32"))


@pytest.mark.parametrize(
    ("change", "severity", "said"),
    [
        (lambda x: x * 32768, "breaks", "times 32768 (int16 samples never divided by 32768)"),
        (lambda x: x.flip(0), "breaks", "with its samples in reverse order"),
        (lambda x: x[::2], "breaks", "with only every second of its samples"),
        (lambda x: torch.cat([x[:6000] * 0, x[:-6000]]), "breaks", "0.375 s later"),
        (lambda x: x[300:] * 32767, "breaks", "times 32767"),  # another reader's priming
        (lambda x: x[:8000], "differs", "without its last"),
        (lambda x: x * 0.5, "differs", "times 0.5"),
        (lambda x: torch.cat([x[:1000] * 0, x]), "differs", "with 0 in 1000 samples before it"),
    ],
)
def test_a_sound_that_is_not_the_files(change: Any, severity: str, said: str) -> None:
    found = list(content.look_content(sounds(change)))[-1]
    assert (found.fact, found.severity) == ("sound-changed", severity)
    assert said in found.sentence


def test_whole_numbers_are_no_sound() -> None:
    """Without files: int16 samples as floats. The processor takes them for a very loud sound."""
    loud = (medium("audio", torch.arange(-800, 800.0)),)
    found = only(content.look_content, case(processed("", audios=loud)))
    assert found.fact == "never-divided"
    (soft,) = (medium("audio", torch.arange(-800, 800.0) / 32768),)
    assert facts(content.look_content, case(processed("", audios=(soft,)))) == []


def test_all_silent_without_files(tmp_path: Path) -> None:
    zeros = (medium("audio", torch.zeros(1600)),) * 2
    text = rendered((user("audio x.wav"),))
    silent = only(content.look_content, case(processed(text, text, audios=zeros)))
    assert (silent.fact, silent.origin) == ("medium-silent", "unknown")
    one = (zeros[0], medium("audio"))  # one silent recording may be in the data
    assert facts(content.look_content, case(processed(text, text, audios=one))) == []


def test_media_of_the_messages_that_are_not_passed() -> None:
    messages = (SYSTEM, user("video a.mp4"))
    gone = only(looks.look_counts, case(template(*messages), processed(rendered(messages))))
    assert (gone.fact, gone.values["modality"]) == ("media-missing", "video")


def test_limits_without_effect() -> None:
    clips = [frames(path) for path in CLIPS]
    limited = step(*clips, keywords={"max_frames": 2, "max_pixels": 56 * 56})
    found = only(looks.look_limits, limited)
    assert found.values == {"limit": "max_frames", "told": 2, "got": 4}
    # the processor may enforce a limit itself: then its grids are smaller
    kept = {"video_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]])}
    assert facts(looks.look_limits, step(*clips, keywords={"max_frames": 2}, outputs=kept)) == []
