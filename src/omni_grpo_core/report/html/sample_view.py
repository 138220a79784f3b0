"""Everything the page shows of one sample, gathered from the stages of a trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from omni_grpo_core.pipeline.stages import Values
from omni_grpo_core.report.html.media_view import Clip, Sound, clips, sounds
from omni_grpo_core.report.html.ribbon import Run, ribbon, tokens_a_cell
from omni_grpo_core.report.text import Piece, pieces
from omni_grpo_core.rewards.parse import parse, sections
from omni_grpo_core.types import Completion, Malformed, Parsed, Score

_MODES = {
    "interleaved": "interleaved: the track rides inside its video, cut into chunks of time",
    "separate": "separate: the track is an audio item of its own",
    "off": "off: no track of a video is used",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """A completion to show. ``facts``: length and how it ended. ``answer``: what stands in its
    answer section, empty when malformed."""

    pieces: tuple[Piece, ...]
    facts: str
    well_formed: bool
    answer: str


@dataclass(frozen=True, slots=True)
class Reward:
    name: str
    score: Score


@dataclass(frozen=True, slots=True)
class SampleView:
    """One sample. ``right`` is ``None`` when no accuracy was scored."""

    number: int
    sample_id: str
    question: str
    options: tuple[str, ...]
    problem_type: str
    origin: str
    gold: str
    solution: str
    mode: str
    mode_words: str
    tokens: int
    padding: int
    tokens_a_cell: int
    clips: tuple[Clip, ...]
    sounds: tuple[Sound, ...]
    ribbon: tuple[Run, ...]
    prompt: str
    greedy: Answer | None
    right: bool | None
    rewards: tuple[Reward, ...]
    sampled: tuple[Answer, ...]
    sampled_facts: str


def sample_view(values: Values, index: int, decode: Callable[[Sequence[int]], str]) -> SampleView:
    """The view of row ``index`` of a pass's batch; later stages may be missing."""
    sample, batch = values["sample"][index], values["batch"]
    row, pad = batch.rows[index], batch.pads[index]
    positions, prompts, media = values.get("positions"), values.get("text"), values.get("media")
    rewards = tuple(
        Reward(name, scores[index]) for name, scores in values.get("reward", {}).items()
    )
    right = [
        r.score.value == 1 for r in rewards if r.name == "accuracy" and r.score.value is not None
    ]
    sampled, sampled_facts = _sampled(values, index)
    return SampleView(
        number=index + 1,
        sample_id=sample.sample_id,
        question=sample.question,
        options=sample.options,
        problem_type=sample.problem_type,
        origin=sample.origin,
        gold=_gold(sample.solution),
        solution=sample.solution,
        mode=row.audio_in_video,
        mode_words=_MODES.get(row.audio_in_video, row.audio_in_video),
        tokens=len(row.input_ids),
        padding=pad,
        tokens_a_cell=tokens_a_cell(len(row.input_ids)),
        clips=() if media is None else clips(media[index], row),
        sounds=() if media is None else sounds(media[index], row),
        ribbon=ribbon(
            row, None if positions is None else positions.position_ids[:, index, pad:], decode
        ),
        prompt="" if prompts is None else prompts[index].text,
        greedy=_greedy(values, index),
        right=right[0] if right else None,
        rewards=rewards,
        sampled=sampled,
        sampled_facts=sampled_facts,
    )


def _greedy(values: Values, index: int) -> Answer | None:
    rolled, parsed = values.get("completion"), values.get("parsed")
    if rolled is None:
        return None
    completion = rolled.completions[index]
    return _answer(completion, parse(completion.text) if parsed is None else parsed[index])


def _sampled(values: Values, index: int) -> tuple[tuple[Answer, ...], str]:
    rolled = values.get("sampled")
    if rolled is None:
        return (), ""
    group = rolled.completions[index * rolled.group_size : (index + 1) * rolled.group_size]
    facts = f"temperature {rolled.temperature:g}, seed {rolled.seed}"
    return tuple(_answer(c, parse(c.text)) for c in group), facts


def _answer(completion: Completion, parsed: Parsed | Malformed) -> Answer:
    ended = "ended by itself" if completion.finish_reason == "stop" else "cut off at the limit"
    return Answer(
        pieces(completion.text, parsed),
        f"{len(completion.token_ids)} tokens, {ended}",
        not isinstance(parsed, Malformed),
        "" if isinstance(parsed, Malformed) else parsed.answer.text.strip(),
    )


def _gold(solution: str) -> str:
    """The answer inside the gold's tags; a gold may have an answer only."""
    whole = parse(solution)
    if not isinstance(whole, Malformed):
        return whole.answer.text.strip()
    answer = sections(solution, ("answer",))
    return solution if isinstance(answer, Malformed) else answer["answer"].text.strip()
