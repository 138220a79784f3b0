"""Everything the page shows about one sample, gathered from the stages of a trace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from omni_grpo_core.pipeline.stages import Values
from omni_grpo_core.report.html import Decode, tokens_per_cell
from omni_grpo_core.report.html.media_view import Clip, Sound, clips, sounds
from omni_grpo_core.report.html.ribbon import Run, ribbon
from omni_grpo_core.rewards.parse import parse, sections
from omni_grpo_core.types import Completion, Malformed, Parsed, Row, Sample, Score, audio_words

_MODES = {
    "interleaved": "interleaved: the track is cut into time chunks between those of its video",
    "separate": "separate: the track is a separate audio item",
    "off": "off: video soundtracks are not used",
}


Answer = tuple[Completion, Parsed | Malformed]
"""A completion and its parsed form."""


@dataclass(frozen=True, slots=True)
class SampleView:
    """One sample and its row of the batch. ``padding``: padding tokens left of the row. ``right``
    is ``None`` if accuracy was not scored. ``sampled_facts``: temperature and seed."""

    number: int
    sample: Sample
    row: Row
    padding: int
    gold: str
    mode_words: str
    tokens_per_cell: int
    clips: tuple[Clip, ...]
    sounds: tuple[Sound, ...]
    ribbon: tuple[Run, ...]
    prompt: str
    greedy: Answer | None
    right: bool | None
    rewards: Mapping[str, Score]
    sampled: tuple[Answer, ...]
    sampled_facts: str


def sample_view(values: Values, index: int, decode: Decode) -> SampleView:
    """The view of row ``index`` of the batch; later stages may be missing."""
    sample, batch = values["sample"][index], values["batch"]
    row, pad = batch.rows[index], batch.pads[index]
    positions, prompts, media = values.get("positions"), values.get("text"), values.get("media")
    rewards = {name: scores[index] for name, scores in values.get("reward", {}).items()}
    accuracy = rewards["accuracy"].value if "accuracy" in rewards else None
    sampled, sampled_facts = _sampled(values, index)
    return SampleView(
        number=index + 1,
        sample=sample,
        row=row,
        padding=pad,
        gold=_gold(sample.solution),
        mode_words=_MODES.get(audio_words(row.audio_in_video), audio_words(row.audio_in_video)),
        tokens_per_cell=tokens_per_cell(len(row.input_ids)),
        clips=() if media is None else clips(media[index], row),
        sounds=() if media is None else sounds(media[index], row),
        ribbon=ribbon(
            row, None if positions is None else positions.position_ids[:, index, pad:], decode
        ),
        prompt="" if prompts is None else prompts[index].text,
        greedy=_greedy(values, index),
        right=None if accuracy is None else accuracy == 1,
        rewards=rewards,
        sampled=sampled,
        sampled_facts=sampled_facts,
    )


def _greedy(values: Values, index: int) -> Answer | None:
    rolled, parsed = values.get("completion"), values.get("parsed")
    if rolled is None:
        return None
    completion = rolled.completions[index]
    return completion, parse(completion.text) if parsed is None else parsed[index]


def _sampled(values: Values, index: int) -> tuple[tuple[Answer, ...], str]:
    rolled = values.get("sampled")
    if rolled is None:
        return (), ""
    group = rolled.completions[index * rolled.group_size : (index + 1) * rolled.group_size]
    facts = f"temperature {rolled.temperature:g}, seed {rolled.seed}"
    return tuple((c, parse(c.text)) for c in group), facts


def _gold(solution: str) -> str:
    """The answer inside the gold's tags; a gold may consist of an answer only."""
    whole = parse(solution)
    if not isinstance(whole, Malformed):
        return whole.answer.text.strip()
    answer = sections(solution, ("answer",))
    return solution if isinstance(answer, Malformed) else answer["answer"].text.strip()
