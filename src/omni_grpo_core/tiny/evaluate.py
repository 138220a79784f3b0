"""Does the tiny policy look, and does it listen? Greedy answers on intact and on spoilt clips.

Whole completions are judged: teacher-forced reasoning would leak the answer letter.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch

from omni_grpo_core.core.batch import collate
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.core.rollout import rollout
from omni_grpo_core.rewards.parse import parse
from omni_grpo_core.tiny.clips import Split
from omni_grpo_core.tiny.examples import Example, draw_clips, make_example, make_row
from omni_grpo_core.tiny.make import QWEN2_5, Make, make_of
from omni_grpo_core.tiny.questions import CARRIES, PHRASES, TOPICS, Carry, Question, topics_of
from omni_grpo_core.types import Media, Parsed

Spoil = Literal[
    "as it is",
    "frames blanked",
    "frames frozen",
    "frames swapped",
    "sound silenced",
    "sound swapped",
]

SPOILS: tuple[Spoil, ...] = get_args(Spoil)
MAX_NEW_TOKENS = 64
"""The longest target completion has 40 tokens."""
_BATCH = 48


@dataclass(frozen=True, slots=True)
class Outcome:
    """One question answered under one spoil. ``named``: the value after ``is`` in the reasoning is
    right; ``right``: well formed, ended with an eos, and the letter is right; ``exact``: the
    completion equals the target, character by character."""

    question: Question
    spoil: Spoil
    text: str
    well_formed: bool
    named: bool
    right: bool
    exact: bool


def exam(
    split: Split, *, clips: int, seed: int = 0, carries: Sequence[Carry] = CARRIES
) -> list[Question]:
    """Every topic of every carry, on each of ``clips`` clips of a split."""
    rng = np.random.default_rng([seed, clips])
    return [
        Question(clip, carry, topic, int(rng.integers(len(PHRASES[topic]))))
        for clip in draw_clips(split, clips, seed=seed)
        for carry in carries
        for topic in topics_of(carry)
    ]


def prepare(questions: Sequence[Question], make: Make = QWEN2_5) -> list[Example]:
    """Write and decode the clips of the questions."""
    with tempfile.TemporaryDirectory() as folder:
        return [make_example(question, Path(folder), make) for question in questions]


def spoiled(example: Example, spoil: Spoil, donor: Example) -> Example:
    """The example with some media blanked or taken from ``donor``; the prompt is unchanged."""
    return replace(example, media=_spoiled_media(example.media, spoil, donor.media))


def _spoiled_media(media: Media, spoil: Spoil, donor: Media) -> Media:
    if spoil == "as it is":
        return media
    if spoil == "frames blanked":
        dark = [replace(v, frames=torch.zeros_like(v.frames)) for v in media.videos]
        return replace(media, videos=tuple(dark))
    if spoil == "frames frozen":
        still = [replace(v, frames=v.frames[:1].expand_as(v.frames)) for v in media.videos]
        return replace(media, videos=tuple(still))
    if spoil == "frames swapped":
        return replace(media, videos=donor.videos)
    if spoil == "sound silenced":
        mute = [replace(a, samples=torch.zeros_like(a.samples)) for a in media.audios]
        return replace(media, audios=tuple(mute))
    pairs = zip(media.audios, donor.audios, strict=True)
    return replace(media, audios=tuple(replace(a, samples=d.samples) for a, d in pairs))


def donors(examples: Sequence[Example]) -> list[Example]:
    """For each example the next one, cyclically, with the same carry and different colour, motion
    and pitch."""
    return [
        next(
            other
            for other in (*examples[index:], *examples[:index])
            if _differs(example.question, other.question)
        )
        for index, example in enumerate(examples)
    ]


def _differs(one: Question, other: Question) -> bool:
    mine, its = one.clip.attributes, other.clip.attributes
    return (
        one.carry == other.carry
        and mine.colour != its.colour
        and mine.motion != its.motion
        and mine.pitch != its.pitch
    )


def answer(policy: Policy, examples: Sequence[Example], spoil: Spoil) -> list[Outcome]:
    """Greedy completions of the examples, in mixed batches."""
    outcomes: list[Outcome] = []
    for start in range(0, len(examples), _BATCH):
        part = examples[start : start + _BATCH]
        rows = [
            replace(make_row(example, policy), sample_id=str(start + index))
            for index, example in enumerate(part)
        ]
        batch = collate(rows, policy.pad_token_id)
        given = rollout(policy, batch, group_size=1, max_new_tokens=MAX_NEW_TOKENS, temperature=0.0)
        for example, completion in zip(part, given.completions, strict=True):
            stopped = completion.finish_reason == "stop"
            outcomes.append(_outcome(example.question, spoil, completion.text, stopped))
    return outcomes


def _outcome(question: Question, spoil: Spoil, text: str, stopped: bool) -> Outcome:
    parsed = parse(text)
    well_formed = stopped and isinstance(parsed, Parsed)
    return Outcome(
        question=question,
        spoil=spoil,
        text=text,
        well_formed=well_formed,
        named=f"The {question.topic} is {question.value} " in text,
        right=well_formed and isinstance(parsed, Parsed) and parsed.answer.text == question.letter,
        exact=stopped and text == question.completion,
    )


def evaluate(
    policy: Policy,
    *,
    split: Split = "held-out",
    clips: int = 32,
    seed: int = 0,
    spoils: Sequence[Spoil] = SPOILS,
) -> list[Outcome]:
    """Every question of the split's exam as it is; those on clips with sound also spoilt."""
    questions = exam(split, clips=clips, seed=seed)
    examples = prepare(questions, make_of(policy.family))
    outcomes = answer(policy, examples, "as it is")
    spoilt = [e for e in examples if e.question.carry in ("interleaved", "separate")]
    given = donors(spoilt)
    for spoil in spoils:
        if spoil != "as it is":
            pairs = zip(spoilt, given, strict=True)
            outcomes += answer(policy, [spoiled(e, spoil, d) for e, d in pairs], spoil)
    return outcomes


def summary(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Shares by ``spoil / topic`` and, for intact clips, by ``carry``; 1.0 is every question.

    Keys are ``"<spoil>/<topic>"``, ``"carry/<carry>"``, ``"<spoil>/format"``, ``"exact"``.
    """
    result: dict[str, float] = {}
    for spoil in SPOILS:
        under = [o for o in outcomes if o.spoil == spoil]
        if under:
            result[f"{spoil}/format"] = _share(under, lambda o: o.well_formed)
        for topic in TOPICS:
            about = [o for o in under if o.question.topic == topic]
            if about:
                result[f"{spoil}/{topic}"] = _share(about, lambda o: o.right)
    plain = [o for o in outcomes if o.spoil == "as it is"]
    for carry in CARRIES:
        carried = [o for o in plain if o.question.carry == carry]
        if carried:
            result[f"carry/{carry}"] = _share(carried, lambda o: o.right)
    result["exact"] = _share(plain, lambda o: o.exact)
    return result


def _share(outcomes: Sequence[Outcome], holds: Callable[[Outcome], bool]) -> float:
    return sum(holds(outcome) for outcome in outcomes) / len(outcomes)
