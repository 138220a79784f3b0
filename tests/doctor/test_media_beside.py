"""Media that are passed beside the messages, as TRL and R1-V do: ``{"type": "video"}`` names no
file, and the path is a column that only the rewards get. Or no column has it, and the loop opened
the file before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from doctor_recordings import medium, steps_with

from omni_grpo_core import tiny
from omni_grpo_core.doctor.checks import content, frame_rate
from omni_grpo_core.doctor.diagnose import diagnose
from omni_grpo_core.doctor.evidence import Case, noted_missing
from omni_grpo_core.doctor.media_similarity import array
from omni_grpo_core.doctor.replay.media import read_file
from omni_grpo_core.trace.calls import ProcessorCall, RewardCall, TemplateCall
from omni_grpo_core.types import MediaRef

FOLDER = tiny.data_file().parent
COLOURS = torch.tensor([0.299, 0.587, 0.114])


def beside(
    change: Callable[[torch.Tensor], torch.Tensor],
    *,
    columns: bool = True,
    opened: tuple[str, ...] | None = None,
) -> Case:
    """Two rows whose messages name no file; ``change`` of every clip before the processor.
    ``opened``: the loop opened the right files, and then these."""
    step = steps_with()[0]
    paths = [
        part["video"]
        for call in step.templates
        for message in call.messages
        for part in message["content"]
        if isinstance(part, dict) and part["type"] == "video"
    ]

    def without_path(value: Any) -> Any:
        if isinstance(value, TemplateCall):
            return replace(value, messages=tuple(map(_bare, value.messages)))
        if isinstance(value, ProcessorCall):
            clips = [array(one) for one in value.videos]
            changed = [change(clip).clone() for clip in clips if clip is not None]
            return replace(
                value,
                videos=tuple(medium("video", clip) for clip in changed),
                opened=() if opened is None else (*paths, *opened),
            )
        if isinstance(value, RewardCall) and columns:
            copies = len(value.completions) // len(paths)
            column = tuple(path for path in paths for _ in range(copies))
            return replace(value, columns={**value.columns, "path": column})
        return value

    stages = tuple(
        replace(record, value=without_path(record.value)) for record in step.trace.stages
    )
    return Case(replace(step.trace, stages=stages), step.reference)


def _bare(message: Any) -> Any:
    if isinstance(message["content"], str):
        return message
    parts = tuple({k: v for k, v in p.items() if k != "video"} for p in message["content"])
    return {**message, "content": parts}


def same(clip: torch.Tensor) -> torch.Tensor:
    return clip


def grey(clip: torch.Tensor) -> torch.Tensor:
    return torch.einsum("tchw,c->thw", clip, COLOURS).round()[:, None].expand(-1, 3, -1, -1)


def test_the_files_of_columns_are_what_the_processor_got() -> None:
    step = beside(same)
    assert list(content.look_content(step)) == []
    assert noted_missing(step) == ()
    assert "media" in step.judged


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda clip: clip.flip(1), "with red and blue swapped"),
        (lambda clip: clip.flip(-1), "mirrored left to right"),
        (lambda clip: clip.flip(-2), "upside down"),
        (grey, "in grey: its colours became their luminance"),
    ],
)
def test_a_picture_changed_before_the_processor(change: Any, said: str) -> None:
    """All of these passed as sound, with exit code 0: no content had been compared. Luminance was
    said to be "channels 1 1 1", which it is nearly for one of the pictures."""
    found = list(content.look_content(beside(change)))
    assert [one.severity for one in found] == ["breaks"] * 2
    assert all(one.sentence.endswith(said) for one in found)


def test_another_file_of_the_folder() -> None:
    """The file was said to be sampled at another rate; it is none of the step's, and lies beside
    the right one."""
    stranger = read_file(MediaRef("video", str(FOLDER / "clip-03.mp4")), beside(same))
    assert stranger is not None
    other = beside(lambda _: stranger.videos[0].frames)
    found = list(content.look_content(other))
    assert {one.fact for one in found} == {"media-swapped"}
    assert {one.values["shown"] for one in found} == {"clip-03.mp4"}
    assert list(frame_rate.look_rate(other)) == []


def test_without_a_file_media_are_not_called_sound() -> None:
    """It said ✓ and, beside it, that files were missing which nobody had named."""
    diagnosis = diagnose(beside(grey, columns=False))
    assert diagnosis.state("media") == "unjudged"
    (why,) = [one.why for one in diagnosis.coverage if one.stage == "media"]
    assert why.startswith("no video or audio was compared with its file: neither the messages nor")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda clip: clip.flip(0), "with its frames in reverse order: 7 5 2 0 of 8"),
        (lambda clip: clip.flip(1), "with red and blue swapped"),
        (lambda clip: clip / 255, "divided by 255 (divided by 255 once more)"),
    ],
)
def test_arrays_of_files_that_the_loop_opened(change: Any, said: str) -> None:
    """A loop with its own decoder and hand-written prompts names no file anywhere: all of this was
    "nothing is wrong". Frames darker than all of the file's were compared with its darkest."""
    found = list(content.look_content(beside(change, columns=False, opened=())))
    assert [one.severity for one in found] == ["breaks"] * 2
    assert all(one.sentence.endswith(said) for one in found)


def test_a_file_opened_besides_is_no_medium_of_the_call() -> None:
    """What is one of the files is known by its content, and nothing is swapped: nobody said which
    file a row should have."""
    step = beside(same, columns=False, opened=(str(FOLDER / "clip-03.mp4"),))
    assert list(content.look_content(step)) == []
    assert "media" in step.judged


def test_pictures_of_no_file_that_was_opened_are_a_recipe() -> None:
    """Noise may be meant: it is shown, and does not break the run."""

    def noisy(clip: torch.Tensor) -> torch.Tensor:
        order = torch.randperm(clip.numel(), generator=torch.Generator().manual_seed(0))
        return clip.flatten()[order].reshape(clip.shape)

    found = list(content.look_content(beside(noisy, columns=False, opened=())))
    assert {(one.fact, one.severity) for one in found} == {("content-differs", "differs")}
