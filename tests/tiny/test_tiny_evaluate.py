"""The shipped policy looks and listens: spoilt media cost exactly the questions about them."""

from __future__ import annotations

import pytest
import torch

from omni_grpo_core.core.policy import Policy
from omni_grpo_core.tiny.clips import Clip, combinations
from omni_grpo_core.tiny.evaluate import (
    SPOILS,
    answer,
    donors,
    evaluate,
    exam,
    prepare,
    spoiled,
    summary,
)
from omni_grpo_core.tiny.examples import Example
from omni_grpo_core.tiny.questions import TOPICS, Question


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    """Two clips that differ in every attribute, each asked about all three."""
    pool = combinations("held-out")
    chosen = [pool[0], next(a for a in pool if _apart(a, pool[0]))]
    return prepare(
        [
            Question(Clip(attributes, 3_000_000 + i), "interleaved", topic, 0)
            for i, attributes in enumerate(chosen)
            for topic in TOPICS
        ]
    )


def _apart(one: object, other: object) -> bool:
    return all(getattr(one, n) != getattr(other, n) for n in ("colour", "motion", "pitch"))


def test_spoiling_changes_only_what_it_names(examples: list[Example]) -> None:
    mine, donor = examples[0], donors(examples)[0]
    for spoil in SPOILS:
        media = spoiled(mine, spoil, donor).media
        frames_same = torch.equal(media.videos[0].frames, mine.media.videos[0].frames)
        sound_same = torch.equal(media.audios[0].samples, mine.media.audios[0].samples)
        assert frames_same == (not spoil.startswith("frames")), spoil
        assert sound_same == (not spoil.startswith("sound")), spoil
        assert media.audios[0].from_video == 0


def test_a_donor_differs_in_everything_but_the_carry(examples: list[Example]) -> None:
    for mine, donor in zip(examples, donors(examples), strict=True):
        assert _apart(mine.question.clip.attributes, donor.question.clip.attributes)


def test_held_out_clips_are_answered_to_the_letter(policy: Policy, examples: list[Example]) -> None:
    outcomes = answer(policy, examples, "as it is")
    assert [o.text for o in outcomes] == [e.question.completion for e in examples]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["policy", "qwen3_policy"])
def test_each_answer_uses_its_modality_only(family: str, request: pytest.FixtureRequest) -> None:
    result = summary(evaluate(request.getfixturevalue(family), clips=32))
    for topic in TOPICS:
        assert result[f"as it is/{topic}"] >= 0.95
    assert result["as it is/format"] == 1.0
    seen, heard = ("colour", "motion"), ("pitch",)
    for spoil, lost, kept in (
        ("frames blanked", seen, heard),
        ("frames swapped", seen, heard),
        ("sound silenced", heard, seen),
        ("sound swapped", heard, seen),
    ):
        # chance is .25; with 64 questions per topic .45 is 3.7 standard deviations above it
        assert all(result[f"{spoil}/{topic}"] <= 0.45 for topic in lost), (spoil, result)
        assert all(result[f"{spoil}/{topic}"] >= 0.95 for topic in kept), (spoil, result)
    # one frame shows the axis, never the direction: .5, and 64 questions scatter by .06
    assert result["frames frozen/motion"] <= 0.7
    assert result["frames frozen/colour"] >= 0.95


def test_the_exam_has_a_donor_for_every_question() -> None:
    for clips in (16, 32):
        spoilt = [
            q for q in exam("held-out", clips=clips) if q.carry in ("interleaved", "separate")
        ]
        for question in spoilt:
            assert any(
                q.carry == question.carry and _apart(q.clip.attributes, question.clip.attributes)
                for q in spoilt
            )
