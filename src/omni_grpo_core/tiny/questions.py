"""Questions about clips, and the completions that answer them.

A question is about one attribute, its options always in the same order: reading letters off
shuffled options takes an attention pattern over two layers, which a model this small did not learn
reliably in the minutes the recipe takes. The completion states what is seen and heard, or that
there is nothing to see or hear.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from omni_grpo_core.tiny.clips import ALL, COLOURS, MOTIONS, PITCHES, Clip

Topic = Literal["colour", "motion", "pitch"]
Carry = Literal["interleaved", "separate", "off", "image", "audio", "text"]

TOPICS: tuple[Topic, ...] = get_args(Topic)
CARRIES: tuple[Carry, ...] = get_args(Carry)
"""How a clip reaches the model: as a video in one of the three audio-in-video modes, as its first
frame only, as its sound only, or described in words."""

VALUES: dict[Topic, tuple[str, ...]] = {"colour": COLOURS, "motion": MOTIONS, "pitch": PITCHES}
PHRASES: dict[Topic, tuple[str, ...]] = {
    "colour": ("Which colour is the bar?", "What colour can be seen?"),
    "motion": ("Which way does the bar move?", "Where is the bar going?"),
    "pitch": ("Which pitch has the tone?", "How high is the tone?"),
}
_TOPICS_OF: dict[Carry, tuple[Topic, ...]] = {
    "interleaved": TOPICS,
    "separate": TOPICS,
    "off": ("colour", "motion"),
    "image": ("colour",),
    "audio": ("pitch",),
    "text": TOPICS,
}


@dataclass(frozen=True, slots=True)
class Question:
    """One question on one clip."""

    clip: Clip
    carry: Carry
    topic: Topic
    phrase: int

    @property
    def value(self) -> str:
        """The right value, such as ``"red"``."""
        return str(getattr(self.clip.attributes, self.topic))

    @property
    def letter(self) -> str:
        """The letter of the right option."""
        return "ABCD"[VALUES[self.topic].index(self.value)]

    @property
    def options(self) -> tuple[str, ...]:
        r"""The four options as the row shows them.

        >>> clip = Clip(ALL[0], seed=1)
        >>> question = Question(clip, "image", "colour", 0)
        >>> question.options
        ('A. red', 'B. green', 'C. blue', 'D. yellow')
        >>> print(question.completion.replace("><", ">\n<"))
        <context>The bar is red. No sound.</context>
        <think>The colour is red A.</think>
        <answer>A</answer>
        """
        return tuple(f"{a}. {v}" for a, v in zip("ABCD", VALUES[self.topic], strict=True))

    @property
    def text(self) -> str:
        """The question itself; for ``text``, after a description of the clip."""
        asked = PHRASES[self.topic][self.phrase]
        return (
            f"{moving(self.clip)} {sounding(self.clip)} {asked}" if self.carry == "text" else asked
        )

    @property
    def completion(self) -> str:
        """The target completion, without the final eos."""
        seen, heard = "No picture.", "No sound."
        if self.carry in ("interleaved", "separate", "off"):
            seen = moving(self.clip)
        elif self.carry == "image":
            seen = f"The bar is {self.clip.attributes.colour}."
        if self.carry in ("interleaved", "separate", "audio"):
            heard = sounding(self.clip)
        return (
            f"<context>{seen} {heard}</context>"
            f"<think>{reason(self.topic, self.value, self.letter)}</think>"
            f"<answer>{self.letter}</answer>"
        )


def reason(topic: Topic, value: str, letter: str) -> str:
    """The reasoning: the value, and its letter among the options."""
    return f"The {topic} is {value} {letter}."


def moving(clip: Clip) -> str:
    """What a clip shows, in words."""
    return f"The bar is {clip.attributes.colour} and moves {clip.attributes.motion}."


def sounding(clip: Clip) -> str:
    """What a clip sounds like, in words."""
    return f"The tone is {clip.attributes.pitch}."


def topics_of(carry: Carry) -> tuple[Topic, ...]:
    """What can be asked about a clip that reaches the model this way.

    >>> topics_of("off")
    ('colour', 'motion')
    """
    return _TOPICS_OF[carry]


def ask(
    clip: Clip, carry: Carry, rng: np.random.Generator, topics: Sequence[Topic] = TOPICS
) -> Question:
    """A random question among ``topics`` that the clip, carried this way, can answer."""
    possible = [topic for topic in topics_of(carry) if topic in topics]
    topic = possible[int(rng.integers(len(possible)))]
    return Question(clip, carry, topic, int(rng.integers(len(PHRASES[topic]))))


def corpus() -> list[str]:
    """All words of questions and completions, for the tokenizer. Tags and letters are separate, so
    that no merge joins a tag's bracket with the letter of an answer."""
    texts = [f"{moving(Clip(a, 0))} {sounding(Clip(a, 0))}" for a in ALL]
    texts += [f"The bar is {colour}. No picture. No sound." for colour in COLOURS]
    for topic, values in VALUES.items():
        texts += PHRASES[topic]
        texts += [reason(topic, v, a) for v in values for a in "ABCD"]
        texts += [f"{a}. {v}" for v in values for a in "ABCD"]
    texts += [f"<{end}{tag}>" for tag in ("context", "think", "answer") for end in ("", "/")]
    return texts
