"""The proof that an engine reads, scores and samples as the trainer does, before anything is
learned from it.

The engine is called to sample at the run's temperature (ids span by span, logprobs against ours),
at a high one (nothing cut off the distribution), and with each modality inverted (media move the
engine's output as they move ours).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from omni_grpo_core.core.batch import placeholder_ids
from omni_grpo_core.engines.causes import explain
from omni_grpo_core.engines.draws import WHOLE, malformed, otherwise, repeated, truncation
from omni_grpo_core.engines.ids import compare_ids
from omni_grpo_core.engines.requests import Answer
from omni_grpo_core.engines.sides import Sampled, Sides
from omni_grpo_core.pipeline.ablation import negative
from omni_grpo_core.pipeline.inputs import Inputs
from omni_grpo_core.types import (
    MODALITIES,
    Check,
    Disagreement,
    EngineSeen,
    Modality,
    RowSeen,
    Stage,
    StageRecord,
)

ROWS = 8
"""Rows of a proof, as different ones as the step has."""
TOKENS = 64
"""Most tokens of a completion."""
HOT = 2.0
"""Temperature at which tokens far down the distribution are drawn: a top-k shows at once. vLLM
takes none above."""
HOT_TOKENS = 16
"""Most tokens of a completion at it: 1,000 in all."""


@dataclass(frozen=True, slots=True, eq=False)
class Proof:
    """``records``: the stages that were compared, with their checks. ``numbers``: how far engine
    and trainer are apart, for the log."""

    records: tuple[StageRecord[object], ...]
    numbers: Mapping[str, float]

    @property
    def ok(self) -> bool:
        """Whether everything agrees."""
        return all(record.ok for record in self.records)


def prove(sides: Sides, inputs: Inputs, seed: int) -> Proof:
    """Compare engine and policy on some rows of ``inputs``. Whatever differs is a failed check at
    the stage to blame, with the cause that reproduces it."""
    inputs = _some(sides, inputs)
    temperature = sides.settings.temperature
    length = min(TOKENS, sides.settings.max_new_tokens)
    answers = sides.ask(inputs, seed, temperature, length)
    read = [answer.prompt_ids for answer in answers]
    placeholders = placeholder_ids(sides.policy.processor)
    wrong = compare_ids(inputs.batch.rows, read, placeholders, sides.policy.decode)
    if wrong:
        return Proof(_records(sides, inputs, answers, None, wrong), {})
    high, short = max(HOT, temperature), min(HOT_TOKENS, length)
    drawn_hot = sides.ask(inputs, seed, high, short)
    wrong = malformed(sides, inputs, answers, length) or malformed(sides, inputs, drawn_hot, short)
    if wrong:
        return Proof(_records(sides, inputs, answers, None, wrong), {})
    sampled = sides.read(inputs, answers, temperature, length)
    hot = sides.read(inputs, drawn_hot, high, short)
    copies, cut = repeated(sides, hot), truncation(sides, hot)
    # a confident policy's logprobs are near 0 whatever is wrong: what is drawn hot shows the cause
    off = [one for one in (hot, sampled) if not sides.agree(one.gap, one.tokens)]
    if copies is not None:
        wrong = [copies]
    elif off:
        wrong = [_explained(sides, off[0], seed, cut)]
    elif drawn := cut or otherwise(sides, hot):
        wrong = [drawn]
    else:
        wrong = _media(sides, sampled, seed, length)
    return Proof(_records(sides, inputs, answers, sampled, wrong), _numbers(sampled))


def _explained(sides: Sides, sampled: Sampled, seed: int, cut: Disagreement | None) -> Disagreement:
    """The cause of a gap, with the token of every row at which it is largest."""
    found = explain(sides, sampled, seed, cut)
    rows = (_widest(sides, sampled, row) for row in range(len(sampled.answers)))
    return replace(found, rows=found.rows or tuple(filter(None, rows)))


def _widest(sides: Sides, sampled: Sampled, row: int) -> RowSeen | None:
    """The token of a row whose gap is the largest; ``None`` where all are within the lane."""
    tokens, size = sampled.tokens, len(sampled.gap) // len(sampled.answers)
    group = slice(row * size, (row + 1) * size)
    gap = sampled.gap[group].abs()
    if gap.max() <= sides.lane.worst:
        return None
    one, token = divmod(int(gap.argmax()), gap.shape[1])
    at = row * size + one
    sample = sampled.inputs.samples[row].sample_id
    text = sides.policy.decode([int(tokens.ids[at, token])])
    engine = float(tokens.logprobs[at, token])
    trainer = engine - float(sampled.gap[at, token])
    mean = float(gap[tokens.mask[group]].mean())
    return RowSeen(
        row,
        f"{sample}: token {token} of completion {one}, {text!r}, has the logprob {engine:.5g} to "
        f"the engine, {trainer:.5g} to the trainer; {mean:.2g} nats apart on average",
        {
            "sample": sample, "completion": one, "token": token, "text": text,
            "engine": engine, "trainer": trainer, "mean": mean,
        },
    )  # fmt: skip


def _media(sides: Sides, sampled: Sampled, seed: int, length: int) -> list[Disagreement]:
    """Inverted media: the engine's logprobs are those of the inverted ones, not of the old."""
    found = []
    for modality in MODALITIES:
        rows = with_modality(sampled.inputs, modality)
        if not rows:
            continue
        other = sides.changed(sampled.inputs, rows, partial(negative, modality=modality))
        answers = sides.ask(other, seed, sampled.temperature, length)
        moved = sides.read(other, answers, sampled.temperature, length)
        if not sides.agree(moved.gap, moved.tokens):
            found.append(_explained(sides, moved, seed, None))
    return found


def with_modality(inputs: Inputs, modality: Modality) -> list[int]:
    """The rows that have a modality."""
    return [
        index
        for index, row in enumerate(inputs.batch.rows)
        if any(span.modality == modality for span in row.spans)
    ]


def _some(sides: Sides, inputs: Inputs) -> Inputs:
    """At most ``ROWS`` rows; of each kind (modalities and audio-in-video) one before a second."""
    seen: dict[object, int] = {}
    order = []
    for index, row in enumerate(inputs.batch.rows):
        kind = (row.audio_in_video, frozenset(span.modality for span in row.spans))
        seen[kind] = seen.get(kind, 0) + 1
        order.append((seen[kind], index))
    return sides.chosen(inputs, sorted(index for _, index in sorted(order)[:ROWS]))


def _numbers(sampled: Sampled) -> dict[str, float]:
    """``engine/ratio``: mean of exp |gap|, 1 where they agree; ``engine/gap_max``: nats;
    ``engine/gap_first`` … ``_last``: mean |gap| in each third of a completion."""
    gap, mask = sampled.gap.abs(), sampled.tokens.mask
    place = torch.arange(gap.shape[1]) / mask.sum(1, keepdim=True)
    numbers = {
        "engine/ratio": float(gap[mask].exp().mean()),
        "engine/gap_max": float(gap.max()),
        "engine/completions": float(len(gap)),
    }
    for third, name in enumerate(("first", "middle", "last")):
        inside = mask & (place >= third / 3) & (place < (third + 1) / 3)
        if inside.any():
            numbers[f"engine/gap_{name}"] = float(gap[inside].mean())
    return numbers


def _records(
    sides: Sides,
    inputs: Inputs,
    answers: Sequence[Answer],
    sampled: Sampled | None,
    wrong: Sequence[Disagreement],
) -> tuple[StageRecord[object], ...]:
    """``sampled``: ``None`` where ids or completions are such that nothing was scored."""
    read = tuple(answer.prompt_ids for answer in answers)
    values: dict[Stage, object] = {
        "sample": inputs.samples,
        "conversation": inputs.conversations,
        "text": inputs.prompts,
        "media": {"decoder": inputs.media[0].decoder},
        "batch": inputs.batch,
        "policy": EngineSeen(sides.backend.name, read, tuple(wrong)),
        "logits": {} if sampled is None else _numbers(sampled),
    }
    checks: dict[Stage, list[Check]] = {stage: [] for stage in (*values, "completion")}
    if list(read) == [tuple(row.input_ids.tolist()) for row in inputs.batch.rows]:
        checks["batch"].append(Check("the engine reads the batch's ids", True, f"{len(read)} rows"))
    if sampled is not None:
        values["completion"] = sampled.rolled
    for one in wrong:
        values.setdefault(one.stage, {})
        checks.setdefault(one.stage, []).append(Check(one.name, False, one.detail))
    if sampled is not None and not wrong:
        gap = float(sampled.gap.abs().max())
        worst = f"up to {gap:.2g} nats, {sides.lane.worst:g} allowed"
        checks["logits"].append(Check("the engine scores as the trainer does", True, worst))
        checks["completion"].append(Check(WHOLE, True, f"at temperature {HOT:g}"))
    return tuple(
        StageRecord(stage, value, tuple(checks[stage]), 0.0) for stage, value in values.items()
    )
