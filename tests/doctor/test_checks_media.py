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
    first, second = looks.look_content(swapped)
    assert {first.fact, second.fact} == {"media-swapped"}
    assert first.values["shown"] == "clip-03.mp4"
    assert first.values["file"] == "clip-00.mp4"


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        (torch.zeros_like, "medium-blank"),
        (lambda clip: clip.flip(1), "content-differs"),
        (lambda clip: torch.cat([clip[:1], clip[:-1]]), "content-differs"),
    ],
)
def test_frames_that_are_not_the_files(change: Any, fact: str) -> None:
    odd = step(change(frames(CLIPS[0])), frames(CLIPS[1]))
    assert facts(looks.look_content, odd) == [fact]


def test_frames_that_the_library_sampled() -> None:
    """A clip passed to the processor as a path is decoded by whatever is installed, at other
    times: of 8 frames 0 2 4 6, where qwen-omni-utils takes 0 2 5 7."""
    every = replace(load_settings(tiny.checkpoint_dir()).media, fps=8.0)
    clip = frames(CLIPS[0], every)
    assert len(clip) == 8
    found = only(looks.look_content, step(clip[::2], frames(CLIPS[1])))
    assert found.values["how"] == "library"
    assert "0, 2, 4, 6" in found.sentence
    other = only(looks.look_content, step(clip[1::2], frames(CLIPS[1])))
    assert "how" not in other.values, "no known reader samples frames 1 3 5 7"


def test_a_path_is_not_compared_with_its_content() -> None:
    path = media_seen("video", [CLIPS[0]], lambda tensor: True)
    messages = (SYSTEM, user(f"video {CLIPS[0]}"))
    given = case(
        template(*messages),
        processed(rendered(messages), videos=path),
        reference=reference("float32"),
    )
    assert facts(looks.look_content, given) == []
    assert any("paths" in note for note in noted_missing(given))


def test_a_decoder_that_rounds_differently_is_accepted() -> None:
    clips = [frames(path) + 0.4 for path in CLIPS]  # less than half a grey level
    assert facts(looks.look_content, step(*clips)) == []


def test_a_frame_rate_that_was_not_passed() -> None:
    clips = [frames(path) for path in CLIPS]
    found = next(iter(looks.look_rate(step(*clips, fps=None))))
    assert found.values == {"told": None, "took": 2.0, "true": 4.0}
    assert facts(looks.look_rate, step(*clips, keywords={"fps": [4.0]})) == []


def test_all_silent_without_files(tmp_path: Path) -> None:
    zeros = (medium("audio", torch.zeros(1600)),) * 2
    text = rendered((user("audio x.wav"),))
    silent = only(looks.look_content, case(processed(text, text, audios=zeros)))
    assert (silent.fact, silent.origin) == ("medium-silent", "unknown")
    one = (zeros[0], medium("audio"))  # one silent recording may be in the data
    assert facts(looks.look_content, case(processed(text, text, audios=one))) == []


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
