"""One case, stage by stage: made afresh, compared, and where it diverges made again from the
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
    first_difference,
    scored_of,
    scoring_differences,
    words_of,
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
    """One stage: what was made, as golden text, and how it differs from the golden (``found``,
    ``None`` where there is none)."""

    found: Found | None
    text: str
    differences: tuple[Difference, ...]
    kinds: tuple[Kinds, ...]
    origin: Origin

    @property
    def diverges(self) -> bool:
        return self.origin != "none"


@dataclass(frozen=True, slots=True, eq=False)
class Replay:
    """A case on its way: ``fresh`` and ``golden`` values and what was ``seen``, by stage. A value
    that could not be made, or that its golden does not hold, is not there. ``draw_distances``: of
    sampled completions, by stage."""

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
    """A stage's value, or why there is none."""

    value: object = None
    failure: str = ""


def replay_case(
    context: Context,
    goldens: Mapping[str, Found],
    tolerances: StageTolerances,
    header: Mapping[str, str],
    sidecar: Path | None = None,
) -> Replay:
    """Every stage of a case. Without goldens it is only made."""
    replay = Replay(context, goldens, tolerances, header, sidecar)
    for stage in stages_of(context.steps):
        if stage == "scoring":
            _say(replay)
        made = _make(replay, stage, replay.fresh)
        _see(replay, stage, made)
    if context.steps:
        for stage, made in _steps(replay):
            _see(replay, stage, made)
    return replay


def own_header(context: Context, stage: str) -> dict[str, str]:
    """What one stage alone was made from: the media files, the weights."""
    if stage == "media":
        paths = dict.fromkeys(ref.path for sample in context.samples for ref in sample.media)
        return {f"file {Path(path).name}": file_hash(Path(path)) for path in paths}
    if stage == "embeddings":
        return {"weights": weights_hash(Path(context.policy.checkpoint))}
    return {}


def kept(value: object) -> object:
    """What a golden holds of a value: of a batch the rows' tensors, not once more side by side."""
    return replace(value, tensors={}) if isinstance(value, Batch) else value


def _whole(value: object) -> object:
    """Back from :func:`kept`."""
    if isinstance(value, Batch):
        return replace(value, tensors=collate(value.rows, 0).tensors)
    return value


def _make(replay: Replay, stage: str, values: Values) -> _Made:
    missing = next((need for need in GRAPH[stage].needs if need not in values), None)
    if missing is not None:
        return _Made(failure=f"there is no {missing} to make it from")
    try:
        return _Made(make(replay.context, stage, values))
    except Exception as error:  # whatever an upgrade makes a library raise is a finding
        return _Made(failure=f"{type(error).__name__}: {error}")


def _say(replay: Replay) -> None:
    """The completion that is scored: the golden's, or the fresh one where there is none."""
    found = replay.goldens.get("completion")
    if found is None:
        said = _make(replay, "completion", replay.fresh).value
    else:
        try:
            said = rebuild(found.golden.leaves)
        except Lost:
            return
    if isinstance(said, Rollout):
        replay.fresh["said"] = replay.golden["said"] = said


def _see(replay: Replay, stage: str, made: _Made) -> None:
    decode = replay.context.policy.decode
    found = replay.goldens.get(stage)
    text = ""
    if not made.failure:
        put(replay.fresh, stage, made.value)
        head = {**replay.header, **own_header(replay.context, stage)}
        text = format_golden(stage, kept(made.value), head, decode)
    if found is None:
        if not made.failure:
            put(replay.golden, stage, made.value)
        replay.seen[stage] = Seen(None, text, (), (), "none")
        return
    differences: tuple[Difference, ...]
    kinds: tuple[Kinds, ...]
    now: Golden | None = None
    if made.failure:
        differences = (Difference("self", "differs", f"it fails: {made.failure}"),)
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
    if stage == "scoring" and "said" in replay.golden:
        said = replay.golden["said"].completions
        tolerance = replay.tolerances.of(stage).of("float")
        with suppress(Lost):
            before, after = scored_of(was.leaves), scored_of(now.leaves)
            if len(before) == len(after) == len(said):
                return tuple(scoring_differences(before, after, said, tolerance))
    decode = words_of(replay.context.policy)
    return compare_goldens(was, now, replay.tolerances.of(stage), decode).differences


def _rebuild(replay: Replay, stage: str, was: Golden, now: Golden | None) -> None:
    """The golden's value, with fresh tensors where its fingerprints say that they are the same."""
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
    """A completion follows from the scores when each side's first other token is what the fresh
    scoring forward, given the golden's tokens so far, finds likeliest."""
    if not any(replay.diverges(stage) for stage in ("batch", *MODEL)):
        return "added"
    if "scoring" not in replay.fresh or "completion" not in replay.fresh:
        return "inherited or unknown"
    said, now = replay.fresh["said"].completions, replay.fresh["completion"].completions
    for was, again, scored in zip(said, now, replay.fresh["scoring"], strict=False):
        at = first_difference(was.token_ids, again.token_ids)
        if at is None:
            continue
        if at >= min(len(was.token_ids), len(again.token_ids)):
            return "added"  # where it stops is not the scores' doing
        if again.token_ids[at] != int(scored.top_ids[at][0]):
            return "added"
    return "inherited"


def _step_origin(replay: Replay, stage: str) -> Origin:
    """Rewards and advantages are made from the golden's completions and rewards alone. The others
    meet the weights too, which what diverged before may have changed."""
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
    """Stages of the GRPO steps; after a failure the rest has nothing to be made from."""
    names = list(step_names(replay.context.steps))
    values: Values = {**replay.fresh, **replay.golden}

    def golden(stage: str, fresh: T) -> T:
        return cast(T, replay.golden.get(stage, fresh))

    failure = next(
        (f"there is no {need}" for need in ("sample", "text", "batch") if need not in values), ""
    )
    if not failure:
        try:
            for name, value in grpo_steps(
                replay.context, values, golden, replay.draw_distances.__setitem__
            ):
                names.remove(name)
                yield name, _Made(value)
        except Exception as error:  # whatever an upgrade makes a library raise is a finding
            failure = f"{type(error).__name__}: {error}"
    for name in names:
        yield name, _Made(failure=failure)
