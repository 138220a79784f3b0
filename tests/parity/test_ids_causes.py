"""Each way in which a prompt's ids go wrong is named, on ids short enough to read.

Ids: 1 image, 2 video, 3 audio; 10 and 11 around vision, 20 and 21 around sound; from 50 on text.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from omni_grpo_core.core.family import QWEN2_5_OMNI
from omni_grpo_core.parity.ids_causes import Prompts, explain_ids
from omni_grpo_core.parity.layout import Names, described, parse
from omni_grpo_core.types import Row

NAMES = Names({"image": 1, "video": 2, "audio": 3}, (10, 11), (20, 21), padding=0)
HEAD, TAIL = [50, 51], [52]
SOUND = [20, 3, 3, 3, 21]
PICTURE = [10, 1, 1, 11]
CLIP = [10, 2, 2, 2, 2, 11]
WHOLE = [*HEAD, *PICTURE, *SOUND, *TAIL]
# 4 pairs of frames, one token and half a second each, and 60 tokens of sound
INSIDE = [*HEAD, 10, 20, *[2] * 4, *[3] * 60, 21, 11, *TAIL]
GRIDS = {
    "video_grid_thw": torch.tensor([[4, 2, 2]]),
    "video_second_per_grid": torch.tensor([0.5]),
}


def causes(
    a: list[int],
    b: list[int],
    own: Mapping[str, Tensor] | None = None,
    theirs: Mapping[str, Tensor] | None = None,
    *,
    reworded: bool = False,
) -> list[str]:
    rows = [
        Row("row", torch.tensor(ids), "off", (), dict(tensors or {}))
        for ids, tensors in ((a, own), (b, theirs if theirs is not None else own))
    ]
    prompts = Prompts(rows[0], rows[1], NAMES, QWEN2_5_OMNI, 2)
    return [c.name for c in explain_ids(prompts, reworded=reworded)]


def test_pieces_are_text_and_media_with_their_marks() -> None:
    assert [(p.kind, list(p.ids)) for p in parse(INSIDE, NAMES)] == [
        ("text", HEAD),
        ("both", INSIDE[2:-1]),
        ("text", TAIL),
    ]
    assert [p.kind for p in parse([*PICTURE, *SOUND], NAMES)] == ["image", "audio"]
    assert described(INSIDE, NAMES) == "4 video, 60 audio"


@pytest.mark.parametrize(
    ("ids", "cause"),
    [
        ([*HEAD, *PICTURE, *TAIL], ["dropped"]),
        ([*HEAD, *PICTURE, 20, 21, *TAIL], ["dropped"]),
        ([*HEAD, *TAIL], ["dropped"]),
        ([*HEAD, 1, 1, *SOUND, *TAIL], ["marks-dropped"]),
        ([*HEAD, 10, 1, 1, *SOUND, *TAIL], ["marks-dropped"]),
        ([*HEAD, 10, 1, 1, 11, 3, 3, 3, *TAIL], ["marks-dropped"]),
        ([*HEAD, 10, 1, 11, 20, 3, 21, *TAIL], ["not-expanded"]),
        ([*HEAD, 10, 1, 11, *SOUND, *TAIL], ["not-expanded", "off-by-one"]),
        # the first of two placeholders, and of three, taken for one that is not expanded yet
        ([*HEAD, 10, *[1] * 3, 11, 20, *[3] * 5, 21, *TAIL], ["expanded-twice"]),
        # each of them
        ([*HEAD, 10, *[1] * 4, 11, 20, *[3] * 9, 21, *TAIL], ["expanded-twice"]),
        ([*HEAD, 10, *[1] * 2, 11, 20, *[3] * 9, 21, *TAIL], ["expanded-twice"]),
        ([*HEAD, *SOUND, *PICTURE, *TAIL], ["reordered"]),
        ([*HEAD, *PICTURE, 20, 3, 3, 21, *TAIL], ["off-by-one"]),
        ([*HEAD, 10, 2, 2, 11, *SOUND, *TAIL], ["wrong-placeholder"]),
        (WHOLE[3:], ["truncated"]),
        (WHOLE[:-2], ["truncated"]),
        ([0, 0, 0, *WHOLE], ["padded"]),
        # two mistakes, one after the other
        ([*HEAD, 1, *TAIL], ["dropped", "not-expanded", "marks-dropped"]),
    ],
)
def test_a_prompt_with_a_picture_and_a_sound(ids: list[int], cause: list[str]) -> None:
    found = causes(WHOLE, ids)
    if len(cause) < 3:
        assert found == cause
    else:  # three are not searched for: nothing is claimed
        assert found == []


@pytest.mark.parametrize(
    ("body", "cause"),
    [
        # as if a pair of frames lasted a second: two pairs in each chunk of 2 s
        ([20, 2, 2, *[3] * 50, 2, 2, *[3] * 10, 21], "seconds-per-grid"),
        # two seconds: one
        ([20, 2, *[3] * 50, 2, *[3] * 10, 2, 2, 21], "seconds-per-grid"),
        # chunks of 1 s
        ([20, 2, 2, *[3] * 25, 2, 2, *[3] * 35, 21], "seconds-per-chunk"),
        ([20, *[3] * 60, *[2] * 4, 21], "audio-appended"),
        # each run of frames or sound for itself
        ([20, *[2] * 7, *[3] * 119, 21], "expanded-twice"),
        ([20, *[2] * 3, *[3] * 59, 21], "off-by-one"),
        # four placeholders were sent: the first is expanded, with its sound, and three stay behind
        ([20, *[2] * 4, *[3] * 60, 21, 2, 2, 2], "expanded-twice"),
        ([20, *[2] * 7, *[3] * 60, 21], "expanded-twice"),
        ([*[2] * 4], "flag-lost"),
        ([20, 21], "dropped"),
    ],
)
def test_a_clip_with_its_sound_inside(body: list[int], cause: str) -> None:
    # 4 pairs of half a second are one chunk: 4 video, 50 audio, and the rest of the sound
    right = [*HEAD, 10, 20, *[2] * 4, *[3] * 60, 21, 11, *TAIL]
    assert causes(right, [*HEAD, 10, *body, 11, *TAIL], GRIDS) == [cause]


def test_a_track_that_follows_its_clip_as_an_item() -> None:
    apart = [*HEAD, 10, *[2] * 4, 11, 20, *[3] * 60, 21, *TAIL]
    assert causes(INSIDE, apart, GRIDS) == ["audio-appended"]


def test_other_media_need_another_number_of_placeholders() -> None:
    """Six pairs of frames where the first side has four: the ids only follow from the media."""
    theirs = {**GRIDS, "video_grid_thw": torch.tensor([[6, 2, 2]])}
    a, b = ([*HEAD, 10, *[2] * count, 11, *TAIL] for count in (4, 6))
    assert causes(a, b, GRIDS, theirs) == ["media"]


def test_media_between_other_words() -> None:
    """The words have a cause of their own; what happened to the media is found all the same."""
    b = [60, 61, 62, 10, 1, 11, 20, 3, 21, 63]
    assert causes(WHOLE, b) == []
    assert causes(WHOLE, b, reworded=True) == ["not-expanded"]
    assert causes(WHOLE, [60, *PICTURE, *SOUND], reworded=True) == []  # other media: no such pieces
    assert causes(WHOLE, [60, *PICTURE, *SOUND, 61], reworded=True) == []  # nothing but words


def test_nothing_is_claimed_of_what_no_change_gives() -> None:
    assert causes(WHOLE, [*HEAD, *PICTURE, 78, *SOUND, 79]) == []
    assert causes(WHOLE, WHOLE) == []
    # two changes are tried, the first of which may leave the clip without a single frame
    assert causes(INSIDE, [99, *INSIDE[1:]], GRIDS) == []
