"""From a replayed case to its verdict.

Floats beyond tolerance are harmless (``benign-drift``) as long as the completions, their form and
the model's certainty are unchanged; otherwise they caused the change (``harmful``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from omni_grpo_core.golden.classify import base_stage
from omni_grpo_core.golden.generations import Sides, classify_generation, scored_of, tokens_of
from omni_grpo_core.golden.rebuild import Lost, rebuild
from omni_grpo_core.golden.replay import MODEL, Replay, Seen
from omni_grpo_core.golden.results import (
    FINE,
    CaseResult,
    Generation,
    PromptTokens,
    StageResult,
    Tokens,
    Verdict,
    worst,
)
from omni_grpo_core.golden.store import Found
from omni_grpo_core.golden.text import parse_golden
from omni_grpo_core.pipeline.stages import Scored
from omni_grpo_core.trace.divergence import Difference
from omni_grpo_core.trace.leaves import Kind, Numbers, Scalar, Spans
from omni_grpo_core.types import Batch, Rollout

NO_GOLDEN = "no golden for this platform yet"
_HARMLESS = (*FINE, "benign-drift")
_JUDGED_BY_GENERATION = re.compile(r"completions\[\d+\]\.(?:token_ids|logprobs|text|finish_reason)")


def case_result(replay: Replay, name: str) -> CaseResult:
    """Verdicts of stages and case, with the generations and prompts of both sides."""
    generations = {
        stage: _generations(replay, stage)
        for stage in replay.seen
        if base_stage(stage) == "completion" and replay.seen[stage].found
    }
    flat = tuple(g for found in generations.values() for g in found)
    # without a golden of the completions nothing shows that they are unchanged
    held = (
        all(seen.found for stage, seen in replay.seen.items() if base_stage(stage) == "completion")
        and all(g.verdict in _HARMLESS for g in flat)
        and not any(_meaning_changed(replay, stage) for stage in ("parsed", "reward"))
    )
    stages = tuple(
        _stage_result(replay, stage, seen, generations.get(stage, ()), held)
        for stage, seen in replay.seen.items()
    )
    origins = [s for s in stages if s.origin == "added"] or [
        s for s in stages if s.origin == "inherited or unknown"
    ]
    first = origins[0] if origins else None
    verdict = worst(stage.verdict for stage in stages)
    reason = _case_reason(verdict, first, stages, sum(g.first is not None for g in flat))
    new = [stage.stage for stage in stages if stage.verdict == "new"]
    if verdict == "new":
        reason = NO_GOLDEN if len(new) == len(stages) else f"{', '.join(new)}: {NO_GOLDEN}"
    elif new and any(stage.golden for stage in stages):
        reason = f"{reason}; {NO_GOLDEN}: {', '.join(new)}"
    return CaseResult(
        case=name,
        verdict=verdict,
        reason=reason,
        first=first.stage if first else None,
        stages=stages,
        prompts=_prompts(replay),
        generations=flat,
    )


def _generations(replay: Replay, stage: str) -> tuple[Generation, ...]:
    seen = replay.seen[stage]
    if seen.found is None or stage not in replay.fresh:
        return ()
    # the fresh rollout is read back from its text, like the golden: nine digits on both sides
    try:
        was, now = (rebuild(side.leaves) for side in (seen.found.golden, parse_golden(seen.text)))
        if not (isinstance(was, Rollout) and isinstance(now, Rollout) and _match(was, now)):
            return ()
        scored: list[tuple[Scored | None, Scored | None]] = [(None, None)] * len(was.completions)
        found = replay.goldens.get("scoring")
        if stage == "completion" and found is not None and "scoring" in replay.fresh:
            before = scored_of(found.golden.leaves)
            if [len(s.logprobs) for s in before] != [len(c.token_ids) for c in was.completions]:
                return ()
            scored = list(zip(before, replay.fresh["scoring"], strict=False))
    except Lost:  # then it is judged leaf by leaf
        return ()
    tolerance = replay.tolerances.of(stage).of("float")
    draw_distances = replay.draw_distances.get(stage, (None,) * len(was.completions))
    drifted = any(replay.diverges(model) for model in (*MODEL, "batch"))
    return tuple(
        classify_generation(
            replay.context.policy, Sides(a, b, *sides, draw_distance), tolerance, drifted
        )
        for a, b, sides, draw_distance in zip(
            was.completions, now.completions, scored, draw_distances, strict=False
        )
    )


def _match(was: Rollout, now: Rollout) -> bool:
    """Whether the completions can be paired, each with one logprob per token."""
    whole = all(len(c.logprobs) == len(c.token_ids) for c in (*was.completions, *now.completions))
    return whole and len(was.completions) == len(now.completions)


def _meaning_changed(replay: Replay, stage: str) -> bool:
    """Whether form or reward changed, and not only the text they were found in."""
    seen = replay.seen.get(stage)
    if seen is None or seen.found is None or not seen.diverges:
        return False
    leaves = seen.found.golden.leaves
    return any(
        isinstance(leaves.get(d.path, Kind("")), Kind) or d.path.endswith((".value", ".what"))
        for d in seen.differences
        if d.verdict == "differs"
    )


def _stage_result(
    replay: Replay, stage: str, seen: Seen, generations: Sequence[Generation], held: bool
) -> StageResult:
    if seen.found is None:
        if seen.failure:
            reason = f"the stage failed: {seen.failure} ({NO_GOLDEN})"
            return StageResult(stage, "schema", reason, "none", (), "")
        return StageResult(stage, "new", NO_GOLDEN, "none", (), "")
    if generations:
        verdict = worst(g.verdict for g in generations)
        if not seen.diverges and verdict not in FINE:
            verdict = "within"
        # the ids may agree while another field does not
        others = [
            (difference, kind)
            for difference, kind in zip(seen.differences, seen.kinds, strict=True)
            if not _JUDGED_BY_GENERATION.fullmatch(difference.path)
        ]
        rest = replace(
            seen,
            differences=tuple(difference for difference, _ in others),
            kinds=tuple(kind for _, kind in others),
        )
        verdict = worst((verdict, _verdict(stage, rest, held)))
    else:
        verdict = _verdict(stage, seen, held)
    return StageResult(
        stage=stage,
        verdict=verdict,
        reason=_reason(verdict, seen, generations),
        # a token flipped by a draw at the edge of its slice is not the stage's fault
        origin="none" if verdict in FINE else seen.origin,
        differences=tuple(_measured(seen.differences, generations)),
        golden=seen.found.file,
    )


def _measured(
    differences: Sequence[Difference], generations: Sequence[Generation]
) -> Iterator[Difference]:
    """Where a completion's tokens differ, its logprobs belong to different text, so how far they
    moved is meaningless."""
    different = tuple(
        f"completions[{at}].logprobs" for at, g in enumerate(generations) if g.first is not None
    )
    for difference in differences:
        if different and difference.path.startswith(different):
            difference = replace(difference, max_abs=None, mean_abs=None)
        yield difference


def _verdict(stage: str, seen: Seen, held: bool) -> Verdict:
    kinds = set(seen.kinds)
    if "not finite" in kinds:
        return "degenerate"
    if kinds & {"meaning", "training"}:
        soft = seen.origin == "inherited" and stage in ("parsed", "reward")
        return "benign-drift" if soft and held else "harmful"
    if "schema" in kinds:
        # a shape that changed because the ids did is not a schema change
        return "harmful" if seen.origin == "inherited" else "schema"
    if "float" in kinds:
        return "benign-drift" if held else "harmful"
    return "within" if seen.differences else "exact"


def _reason(verdict: Verdict, seen: Seen, generations: Sequence[Generation]) -> str:
    if verdict == "exact":
        return "unchanged"
    sentences = [g.sentence for g in generations if g.verdict == verdict]
    if not sentences:
        beyond = [
            (kind == "float", d.sentence)
            for d, kind in zip(seen.differences, seen.kinds, strict=True)
            if verdict == "within" or kind != "fine"
        ]
        # drift last: a person must read first what cannot be drift
        sentences = [sentence for _, sentence in sorted(beyond, key=lambda pair: pair[0])]
    more = f" (and {len(sentences) - 1} more)" if len(sentences) > 1 else ""
    return f"{sentences[0]}{more}" if sentences else "within tolerance"


def _case_reason(
    verdict: Verdict, first: StageResult | None, stages: Sequence[StageResult], flipped: int
) -> str:
    """``flipped``: completions whose tokens differ."""
    if verdict == "exact":
        return "unchanged"
    if verdict == "within":
        most = max(stages, key=lambda stage: stage.max_abs)
        reason = f"floats within tolerance, max |Δ| {most.max_abs:.2g} in {most.stage}"
        return f"{reason}; {flipped} sampled completions flipped by rounding" if flipped else reason
    if first is None:
        return next(f"{s.stage}: {s.reason}" for s in stages if s.verdict == verdict)
    reason = f"{first.stage}: {first.reason}"
    if verdict == "benign-drift":
        return f"{reason}; completions, their form and their margins held"
    worse = [s for s in stages if s.verdict == verdict and s is not first]
    if first.verdict != verdict and worse:
        return f"{reason}; {worse[0].stage}: {worse[0].reason}"
    positions = next((s for s in worse if s.stage == "positions" and s.origin == "inherited"), None)
    return f"{reason}; positions: {positions.reason}" if positions else reason


def _prompts(replay: Replay) -> tuple[PromptTokens, ...]:
    was = _golden_rows(replay, replay.goldens.get("batch"))
    now = _fresh_rows(replay)
    return tuple(PromptTokens(key, was.get(key), now.get(key)) for key in {**was, **now})


def _fresh_rows(replay: Replay) -> dict[str, Tokens]:
    batch = replay.fresh.get("batch")
    if not isinstance(batch, Batch):
        return {}
    policy = replay.context.policy
    return {
        row.sample_id: tokens_of(policy, row.input_ids.tolist(), row.spans) for row in batch.rows
    }


def _golden_rows(replay: Replay, found: Found | None) -> dict[str, Tokens]:
    rows: dict[str, Tokens] = {}
    leaves = {} if found is None else found.golden.leaves
    for number in range(len(leaves)):
        key, ids = leaves.get(f"rows[{number}].sample_id"), leaves.get(f"rows[{number}].input_ids")
        if not (isinstance(key, Scalar) and isinstance(ids, Numbers)):
            break
        spans = leaves.get(f"rows[{number}].spans")
        rows[str(key.value)] = tokens_of(
            replay.context.policy,
            ids.parts[0].flatten().tolist(),
            spans.spans if isinstance(spans, Spans) else (),
        )
    return rows
