"""Questions, target completions, splits of clips."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from omni_grpo_core.rewards.parse import parse
from omni_grpo_core.tiny.clips import ALL, SPLITS, Clip, Split, combinations
from omni_grpo_core.tiny.evaluate import exam
from omni_grpo_core.tiny.examples import draw_clips
from omni_grpo_core.tiny.questions import CARRIES, TOPICS, VALUES, Carry, Question, ask, topics_of
from omni_grpo_core.types import Parsed

CLIP = Clip(ALL[0], seed=0)


@pytest.mark.parametrize("carry", CARRIES)
def test_the_letter_precedes_the_right_value(carry: Carry) -> None:
    rng = np.random.default_rng(0)
    topics = set()
    for attributes in ALL:
        question = ask(Clip(attributes, seed=0), carry, rng)
        assert f"{question.letter}. {question.value}" in question.options
        parsed = parse(question.completion)
        assert isinstance(parsed, Parsed)
        assert parsed.answer.text == question.letter
        topics.add(question.topic)
    assert topics == set(topics_of(carry))


@pytest.mark.parametrize("split", SPLITS)
def test_every_letter_is_right_equally_often_in_every_split(split: Split) -> None:
    """The order of the options is fixed, so guessing one letter must not pay."""
    letters = Counter(
        (topic, Question(Clip(attributes, 0), "text", topic, 0).letter)
        for attributes in combinations(split)
        for topic in TOPICS
    )
    assert len(letters) == 12
    assert set(letters.values()) == {len(combinations(split)) // 4}


@pytest.mark.parametrize(
    ("carry", "context"),
    [
        ("interleaved", "The bar is red and moves left. The tone is low."),
        ("separate", "The bar is red and moves left. The tone is low."),
        ("off", "The bar is red and moves left. No sound."),
        ("image", "The bar is red. No sound."),
        ("audio", "No picture. The tone is low."),
        ("text", "No picture. No sound."),
    ],
)
def test_the_context_states_what_is_absent(carry: Carry, context: str) -> None:
    topic = topics_of(carry)[0]
    parsed = parse(Question(CLIP, carry, topic, 0).completion)
    assert isinstance(parsed, Parsed)
    assert parsed.context.text == context


def test_clips_of_two_splits_share_neither_combination_nor_seed() -> None:
    drawn = {split: draw_clips(split, 80, seed=0) for split in SPLITS}
    for split, some in drawn.items():
        assert {c.attributes for c in some} == set(combinations(split))
    seeds = [{c.seed for c in some} for some in drawn.values()]
    assert len(set().union(*seeds)) == 240
    assert {c.seconds for c in drawn["train"]} == {1, 2, 3}


def test_an_exam_asks_everything_about_every_clip() -> None:
    questions = exam("held-out", clips=16)
    # interleaved 3, separate 3, off 2, image 1, audio 1, text 3
    assert len(questions) == 16 * 13
    assert {q.clip.attributes for q in questions} == set(combinations("held-out"))
    assert {q.value for q in questions} == {v for values in VALUES.values() for v in values}
