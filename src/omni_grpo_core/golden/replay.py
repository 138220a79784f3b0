"""One case, stage by stage: computed, compared, and where it diverges computed again from the
golden's own inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar, cast

from omni_grpo_core.core.batch import collate
from omni_grpo_core.golden.classify import Kinds, base_stage, kind_of
from omni_grpo_core.golden.environment import file_hash, weights_hash
from omni_grpo_core.golden.generations import (
    decoder,
    first_difference,
    scored_of,
    scoring_differences,
)
from omni_grpo_core.golden.rebuild import Lost, rebuild
from omni_grpo_core.golden.results import Origin
from omni_grpo_core.golden.sidecar import fetch
from omni_grpo_core.golden.steps import DrawDistances, grpo_steps, stages_of, step_names
from omni_grpo_core.golden.store import Found
from omni_grpo_core.golden.text import Golden, compare_goldens, format_golden, parse_golden
from omni_grpo_core.golden.tolerances import StageTolerances
from omni_grpo_core.pipeline.stages import GRAPH, Context, Values, make, put
from omni_grpo_core.trace.divergence import Difference
from omni_grpo_core.trace.leaves import Leaf, leaves
from omni_grpo_core.types import Batch, Rollout

T = TypeVar("T")
MODEL = ("embeddings", "positions", "logits", "scoring")


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """One stage: its fresh value as golden text, and how that differs from the golden (``found``,
    ``None`` if there is none). ``failure``: why there is no fresh value."""

    found: Found | None
    text: str
    differences: tuple[Difference, ...]
    kinds: tuple[Kinds, ...]
    origin: Origin
    failure: str = ""

    @property
    def diverges(self) -> bool:
        return self.origin != "none"


@dataclass(frozen=True, slots=True, eq=False)
class Replay:
    """The state of a case's replay: ``fresh`` and ``golden`` values and what was ``seen``, by
    stage. A value that could not be computed or rebuilt is missing. ``draw_distances``: of sampled
    completions, by stage."""

    context: Context
    goldens: Mapping[str, Found]
    tolerances: StageTolerances
    header: Mapping[str, str]
    sidecar: Path | None = None
    fresh: Values = field(default_factory=Values)
    golden: Values = field(default_factory=Values)
    seen: dict[str, Seen] = field(default_factory=dict)
    draw_distances: dict[str, DrawDistances] = field(default_factory=dict)

    def diverges(self, stage: str) -> bool:
        return stage in self.seen and self.seen[stage].diverges


@dataclass(frozen=True, slots=True, eq=False)
class _Made:
    """A stage's value, or why it has none."""

    value: object = None
    failure: str = ""


def replay_case(
    context: Context,
    goldens: Mapping[str, Found],
    tolerances: StageTolerances,
    header: Mapping[str, str],
    sidecar: Path | None = None,
) -> Replay:
    """Every stage of a case. Without goldens it is only computed."""
    replay = Replay(context, goldens, tolerances, header, sidecar)
    for stage in stages_of(context.steps):
        if stage == "scoring":
            _put_scored_completion(replay)
        scored = replay.fresh.get("completion") if stage == "completion" else None
        made = _make(replay, stage, replay.fresh) if scored is None else _Made(scored)
        _record(replay, stage, made)
    if context.steps:
        for stage, made in _steps(replay):
            _record(replay, stage, made)
    return replay


def stage_header(context: Context, stage: str) -> dict[str, str]:
    """Header entries of one stage: hashes of the media files or of the weights."""
    if stage == "media":
        paths = dict.fromkeys(ref.path for sample in context.samples for ref in sample.media)
        return {f"file {Path(path).name}": file_hash(Path(path)) for path in paths}
    if stage == "embeddings":
        return {"weights": weights_hash(Path(context.policy.checkpoint))}
    return {}


def kept(value: object) -> object:
    """What a golden stores of a value: a batch's rows, without their collated copy."""
    return replace(value, tensors={}) if isinstance(value, Batch) else value


def _whole(value: object) -> object:
    """The inverse of :func:`kept`."""
    if isinstance(value, Batch):
        return replace(value, tensors=collate(value.rows, 0).tensors)
    return value


def _make(replay: Replay, stage: str, values: Values) -> _Made:
    missing = next((need for need in GRAPH[stage].needs if need not in values), None)
    if missing is not None:
        return _Made(failure=f"its input {missing} is missing")
    try:
        return _Made(make(replay.context, stage, values))
    except Exception as error:  # anything a library raises after an upgrade is a finding
        return _Made(failure=f"{type(error).__name__}: {error}")


def _put_scored_completion(replay: Replay) -> None:
    """The completion to score: the golden's, or if there is no golden the fresh one, which is kept:
    to generate it again takes longer than all else."""
    found = replay.goldens.get("completion")
    if found is None:
        rollout = _make(replay, "completion", replay.fresh).value
        if rollout is not None:
            put(replay.fresh, "completion", rollout)
    else:
        try:
            rollout = rebuild(found.golden.leaves)
        except Lost:
            return
    if isinstance(rollout, Rollout):
        replay.fresh["to_score"] = replay.golden["to_score"] = rollout


def _record(replay: Replay, stage: str, made: _Made) -> None:
    decode = replay.context.policy.decode
    found = replay.goldens.get(stage)
    text = ""
    if not made.failure:
        put(replay.fresh, stage, made.value)
        head = {**replay.header, **stage_header(replay.context, stage)}
        text = format_golden(stage, kept(made.value), head, decode)
    if found is None:
        if not made.failure:
            put(replay.golden, stage, made.value)
        replay.seen[stage] = Seen(None, text, (), (), "none", made.failure)
        return
    differences: tuple[Difference, ...]
    kinds: tuple[Kinds, ...]
    now: Golden | None = None
    if made.failure:
        differences = (Difference("self", "differs", f"the stage failed: {made.failure}"),)
        kinds = ("meaning",)
    else:
        now = parse_golden(text)
        differences = _compare(replay, stage, found.golden, now)
        kinds = tuple(kind_of(stage, d, found.golden.leaves, now.leaves) for d in differences)
    if all(kind == "fine" for kind in kinds):
        put(replay.golden, stage, made.value)
        replay.seen[stage] = Seen(found, text, differences, kinds, "none")
        return
    origin = _origin(replay, stage, found.golden)
    if stage not in replay.golden:
        _rebuild(replay, stage, found.golden, now)
    replay.seen[stage] = Seen(found, text, differences, kinds, origin)


def _compare(replay: Replay, stage: str, was: Golden, now: Golden) -> tuple[Difference, ...]:
    if stage == "scoring" and "to_score" in replay.golden:
        completions = replay.golden["to_score"].completions
        tolerance = replay.tolerances.of(stage).of("float")
        with suppress(Lost):
            before, after = scored_of(was.leaves), scored_of(now.leaves)
            if len(before) == len(after) == len(completions):
                return tuple(scoring_differences(before, after, completions, tolerance))
    decode = decoder(replay.context.policy)
    return compare_goldens(was, now, replay.tolerances.of(stage), decode).differences


def _rebuild(replay: Replay, stage: str, was: Golden, now: Golden | None) -> None:
    """The golden's value, with fresh tensors where the fingerprints match."""
    stand_ins: dict[str, Leaf] = {}
    if replay.sidecar is not None:
        stand_ins |= fetch(replay.sidecar, was.header)
    if now is not None:
        moved = {d.path for d in _compare(replay, stage, was, now) if d.verdict == "differs"}
        stand_ins |= {
            path: leaf
            for path, leaf in leaves(kept(replay.fresh.get(stage))).items()
            if path in was.leaves and path in now.leaves and path not in moved
        }
    try:
        put(replay.golden, stage, _whole(rebuild(was.leaves, stand_ins)))
    except Lost:  # it cannot be replayed
        return


def _origin(replay: Replay, stage: str, was: Golden) -> Origin:
    if stage == "completion":
        return _completion_origin(replay)
    if stage not in GRAPH:
        return _step_origin(replay, stage)
    needs = GRAPH[stage].needs
    if not any(replay.diverges(need) for need in needs):
        return "added"
    if any(need not in replay.golden for need in needs):
        return "inherited or unknown"
    again = _make(replay, stage, replay.golden)
    if again.failure:
        return "added"
    text = format_golden(stage, kept(again.value), {}, replay.context.policy.decode)
    now = parse_golden(text)
    if any(d.verdict == "differs" for d in _compare(replay, stage, was, now)):
        return "added"
    put(replay.golden, stage, again.value)
    return "inherited"


def _completion_origin(replay: Replay) -> Origin:
    """A completion's divergence is inherited from the scores if its first differing token is the
    likeliest one of the fresh scoring forward, given the golden's tokens up to there."""
    if not any(replay.diverges(stage) for stage in ("batch", *MODEL)):
        return "added"
    if "scoring" not in replay.fresh or "completion" not in replay.fresh:
        return "inherited or unknown"
    before, now = replay.fresh["to_score"].completions, replay.fresh["completion"].completions
    for was, again, scored in zip(before, now, replay.fresh["scoring"], strict=False):
        at = first_difference(was.token_ids, again.token_ids)
        if at is None:
            continue
        if at >= min(len(was.token_ids), len(again.token_ids)):
            return "added"  # the scores do not explain where it stops
        if again.token_ids[at] != int(scored.top_ids[at][0]):
            return "added"
    return "inherited"


def _step_origin(replay: Replay, stage: str) -> Origin:
    """Rewards and advantages depend only on the golden's completions and rewards. Other stages also
    depend on the weights, which an earlier divergence may have changed."""
    if base_stage(stage) in ("reward", "advantage"):
        inputs = ("text", "sample") if base_stage(stage) == "reward" else ()
        unsure = any(replay.diverges(need) and need not in replay.golden for need in inputs)
        return "inherited or unknown" if unsure else "added"
    if "batch" not in replay.golden:
        return "inherited or unknown"
    tainted = any(
        seen.origin in ("added", "inherited or unknown")
        for before, seen in replay.seen.items()
        if before in MODEL or base_stage(before) in ("loss", "gradient")
    )
    return "inherited or unknown" if tainted else "added"


def _steps(replay: Replay) -> Iterator[tuple[str, _Made]]:
    """Stages of the GRPO steps; after a failure the rest fail with the same message."""
    names = list(step_names(replay.context.steps))
    values: Values = {**replay.fresh, **replay.golden}

    def golden(stage: str, fresh: T) -> T:
        return cast(T, replay.golden.get(stage, fresh))

    failure = next(
        (f"{need} is missing" for need in ("sample", "text", "batch") if need not in values), ""
    )
    if not failure:
        try:
            for name, value in grpo_steps(
                replay.context, values, golden, replay.draw_distances.__setitem__
            ):
                names.remove(name)
                yield name, _Made(value)
        except Exception as error:  # anything a library raises after an upgrade is a finding
            failure = f"{type(error).__name__}: {error}"
    for name in names:
        yield name, _Made(failure=failure)
