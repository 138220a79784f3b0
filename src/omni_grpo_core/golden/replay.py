"""One case, stage by stage: made afresh, compared, and where it diverges made again from the
golden's own inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

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
from omni_grpo_core.golden.steps import Slips, grpo_steps, stages_of, step_names
from omni_grpo_core.golden.store import Found
from omni_grpo_core.golden.text import Golden, compare_goldens, format_golden, parse_golden
from omni_grpo_core.golden.tolerances import Lanes
from omni_grpo_core.pipeline.stages import GRAPH, Context, make
from omni_grpo_core.trace.divergence import Difference
from omni_grpo_core.trace.leaves import Leaf, leaves
from omni_grpo_core.types import Batch, Rollout

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
class Walk:
    """A case on its way: ``fresh`` and ``golden`` values and what was ``seen``, by stage. A value
    that could not be made, or that its golden does not hold, is not there. ``slips``: of sampled
    completions, by stage."""

    context: Context
    goldens: Mapping[str, Found]
    lanes: Lanes
    header: Mapping[str, str]
    sidecar: Path | None = None
    fresh: dict[str, Any] = field(default_factory=dict)
    golden: dict[str, Any] = field(default_factory=dict)
    seen: dict[str, Seen] = field(default_factory=dict)
    slips: dict[str, Slips] = field(default_factory=dict)

    def diverges(self, stage: str) -> bool:
        return stage in self.seen and self.seen[stage].diverges


@dataclass(frozen=True, slots=True, eq=False)
class _Made:
    """A stage's value, or why there is none."""

    value: Any = None
    failure: str = ""


def walk_case(
    context: Context,
    goldens: Mapping[str, Found],
    lanes: Lanes,
    header: Mapping[str, str],
    sidecar: Path | None = None,
) -> Walk:
    """Every stage of a case. Without goldens it is only made."""
    walk = Walk(context, goldens, lanes, header, sidecar)
    for stage in stages_of(context.steps):
        if stage == "scoring":
            _say(walk)
        made = _make(walk, stage, walk.fresh)
        _see(walk, stage, made)
    if context.steps:
        for stage, made in _steps(walk):
            _see(walk, stage, made)
    return walk


def own_header(context: Context, stage: str) -> dict[str, str]:
    """What one stage alone was made from: the media files, the weights."""
    if stage == "media":
        paths = dict.fromkeys(ref.path for sample in context.samples for ref in sample.media)
        return {f"file {Path(path).name}": file_hash(Path(path)) for path in paths}
    if stage == "embeddings":
        return {"weights": weights_hash(Path(context.policy.checkpoint))}
    return {}


def kept(value: Any) -> Any:
    """What a golden holds of a value: of a batch the rows' tensors, not once more side by side."""
    return replace(value, tensors={}) if isinstance(value, Batch) else value


def _whole(value: Any) -> Any:
    """Back from :func:`kept`."""
    if isinstance(value, Batch):
        return replace(value, tensors=collate(value.rows, 0).tensors)
    return value


def _make(walk: Walk, stage: str, values: Mapping[str, Any]) -> _Made:
    missing = next((need for need in GRAPH[stage].needs if need not in values), None)
    if missing is not None:
        return _Made(failure=f"there is no {missing} to make it from")
    try:
        return _Made(make(walk.context, stage, values))
    except Exception as error:  # whatever an upgrade makes a library raise is a finding
        return _Made(failure=f"{type(error).__name__}: {error}")


def _say(walk: Walk) -> None:
    """The completion that is scored: the golden's, or the fresh one where there is none."""
    found = walk.goldens.get("completion")
    if found is None:
        said = _make(walk, "completion", walk.fresh).value
    else:
        try:
            said = rebuild(found.golden.leaves)
        except Lost:
            return
    if isinstance(said, Rollout):
        walk.fresh["said"] = walk.golden["said"] = said


def _see(walk: Walk, stage: str, made: _Made) -> None:
    decode = walk.context.policy.decode
    found = walk.goldens.get(stage)
    text = ""
    if not made.failure:
        walk.fresh[stage] = made.value
        head = {**walk.header, **own_header(walk.context, stage)}
        text = format_golden(stage, kept(made.value), head, decode)
    if found is None:
        walk.golden.update({stage: made.value} if not made.failure else {})
        walk.seen[stage] = Seen(None, text, (), (), "none")
        return
    differences: tuple[Difference, ...]
    kinds: tuple[Kinds, ...]
    now: Golden | None = None
    if made.failure:
        differences = (Difference("self", "differs", f"it fails: {made.failure}"),)
        kinds = ("meaning",)
    else:
        now = parse_golden(text)
        differences = _compare(walk, stage, found.golden, now)
        kinds = tuple(kind_of(stage, d, found.golden.leaves, now.leaves) for d in differences)
    if all(kind == "fine" for kind in kinds):
        walk.golden[stage] = made.value
        walk.seen[stage] = Seen(found, text, differences, kinds, "none")
        return
    origin = _origin(walk, stage, found.golden)
    if stage not in walk.golden:
        _rebuild(walk, stage, found.golden, now)
    walk.seen[stage] = Seen(found, text, differences, kinds, origin)


def _compare(walk: Walk, stage: str, was: Golden, now: Golden) -> tuple[Difference, ...]:
    if stage == "scoring" and "said" in walk.golden:
        said = walk.golden["said"].completions
        lane = walk.lanes.of(stage).lane("float")
        with suppress(Lost):
            before, after = scored_of(was.leaves), scored_of(now.leaves)
            if len(before) == len(after) == len(said):
                return tuple(scoring_differences(before, after, said, lane))
    decode = words_of(walk.context.policy)
    return compare_goldens(was, now, walk.lanes.of(stage), decode).differences


def _rebuild(walk: Walk, stage: str, was: Golden, now: Golden | None) -> None:
    """The golden's value, with fresh tensors where its sketches say that they are the same."""
    stand_ins: dict[str, Leaf] = {}
    if walk.sidecar is not None:
        stand_ins |= fetch(walk.sidecar, was.header)
    if now is not None:
        moved = {d.path for d in _compare(walk, stage, was, now) if d.verdict == "differs"}
        stand_ins |= {
            path: leaf
            for path, leaf in leaves(kept(walk.fresh[stage])).items()
            if path in was.leaves and path in now.leaves and path not in moved
        }
    try:
        walk.golden[stage] = _whole(rebuild(was.leaves, stand_ins))
    except Lost:  # it cannot be replayed
        return


def _origin(walk: Walk, stage: str, was: Golden) -> Origin:
    if stage == "completion":
        return _completion_origin(walk)
    if stage not in GRAPH:
        return _step_origin(walk, stage)
    needs = GRAPH[stage].needs
    if not any(walk.diverges(need) for need in needs):
        return "added"
    if any(need not in walk.golden for need in needs):
        return "inherited or unknown"
    again = _make(walk, stage, walk.golden)
    if again.failure:
        return "added"
    text = format_golden(stage, kept(again.value), {}, walk.context.policy.decode)
    now = parse_golden(text)
    if any(d.verdict == "differs" for d in _compare(walk, stage, was, now)):
        return "added"
    walk.golden[stage] = again.value
    return "inherited"


def _completion_origin(walk: Walk) -> Origin:
    """A completion follows from the scores when each side's first other token is what the fresh
    scoring forward, given the golden's tokens so far, finds likeliest."""
    if not any(walk.diverges(stage) for stage in ("batch", *MODEL)):
        return "added"
    if "scoring" not in walk.fresh or "completion" not in walk.fresh:
        return "inherited or unknown"
    said, now = walk.fresh["said"].completions, walk.fresh["completion"].completions
    for was, again, scored in zip(said, now, walk.fresh["scoring"], strict=False):
        at = first_difference(was.token_ids, again.token_ids)
        if at is None:
            continue
        if at >= min(len(was.token_ids), len(again.token_ids)):
            return "added"  # where it stops is not the scores' doing
        if again.token_ids[at] != int(scored.top_ids[at][0]):
            return "added"
    return "inherited"


def _step_origin(walk: Walk, stage: str) -> Origin:
    """Rewards and advantages are made from the golden's completions and rewards alone. The others
    meet the weights too, which what diverged before may have changed."""
    if base_stage(stage) in ("reward", "advantage"):
        inputs = ("text", "sample") if base_stage(stage) == "reward" else ()
        unsure = any(walk.diverges(need) and need not in walk.golden for need in inputs)
        return "inherited or unknown" if unsure else "added"
    if "batch" not in walk.golden:
        return "inherited or unknown"
    tainted = any(
        seen.origin in ("added", "inherited or unknown")
        for before, seen in walk.seen.items()
        if before in MODEL or base_stage(before) in ("loss", "gradient")
    )
    return "inherited or unknown" if tainted else "added"


def _steps(walk: Walk) -> Iterator[tuple[str, _Made]]:
    """Stages of the GRPO steps; after a failure the rest has nothing to be made from."""
    names = list(step_names(walk.context.steps))
    values = {**walk.fresh, **walk.golden}

    def golden(stage: str, fresh: Any) -> Any:
        return walk.golden.get(stage, fresh)

    failure = next(
        (f"there is no {need}" for need in ("sample", "text", "batch") if need not in values), ""
    )
    if not failure:
        try:
            for name, value in grpo_steps(walk.context, values, golden, walk.slips.__setitem__):
                names.remove(name)
                yield name, _Made(value)
        except Exception as error:  # whatever an upgrade makes a library raise is a finding
            failure = f"{type(error).__name__}: {error}"
    for name in names:
        yield name, _Made(failure=failure)
