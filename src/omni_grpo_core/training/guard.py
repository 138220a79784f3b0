"""Is this run worth continuing? Facts of one step in, findings out; any finding stops the run.

Garbage, an engine that disagrees with the trainer, and non-finite values are reported at the step
where they occur, before it changes a weight; a dead reward after ``patience`` steps.
"""

from __future__ import annotations

import math
import shlex
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omni_grpo_core.core.dialect import cache_among, length_of
from omni_grpo_core.core.observers import SKIPS_DECODING
from omni_grpo_core.io.atomic import write_file
from omni_grpo_core.pipeline.hints import advice
from omni_grpo_core.rewards import health
from omni_grpo_core.rewards.degenerate import degenerates
from omni_grpo_core.tolerances import DRIFT
from omni_grpo_core.trace.jsontext import dumps
from omni_grpo_core.trace.store import save_trace
from omni_grpo_core.training.config import GuardConfig
from omni_grpo_core.types import Check, Completion, Stage, StageRecord, Trace

NEAR_TOP = 0.9
"""Mean reward from which equal rewards raise no alarm: nearly everything is right."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One reason to stop: what (``name``), at which stage, and what was seen."""

    name: str
    stage: Stage
    detail: str

    def __str__(self) -> str:
        return f"{self.stage}: {self.name}: {self.detail}"


def advised(name: str, stage: Stage, seen: str = "") -> Finding:
    """A finding that states what was ``seen``, what it means and what to do."""
    return Finding(name, stage, "; ".join(filter(None, (seen, advice(stage, name)))))


@dataclass(frozen=True, slots=True)
class StepFacts:
    """The results of one step over all processes, before its update. ``drift_max``: nats, ``None``
    if unknown. ``loss``, ``grad_norm``: ``None`` if no completion was in the loss. ``broken``:
    values from which no loss could be computed."""

    step: int
    completions: tuple[Completion, ...]
    rewards: health.Step
    drift_max: float | None = None
    loss: float | None = None
    grad_norm: float | None = None
    broken: tuple[str, ...] = ()


class Guard:
    """Remembers the last steps. ``eos_ids``, ``special_ids``: of the policy's tokenizer. ``drift``
    replaces ``config``'s, which may leave it to the precision."""

    def __init__(
        self,
        config: GuardConfig,
        *,
        eos_ids: Collection[int],
        special_ids: Collection[int] = (),
        drift: float | None = None,
    ) -> None:
        self._config = config
        self._drift_limit = drift or config.drift or DRIFT["float32"]
        self._eos_ids = frozenset(eos_ids)
        self._special_ids = frozenset(special_ids)
        self._steps: deque[health.Step] = deque(maxlen=config.patience)

    def remember(self, steps: Sequence[health.Step]) -> None:
        """Steps from before a resume, so that patience is not counted from 0 again."""
        self._steps.extend(steps)

    @property
    def remembered(self) -> tuple[health.Step, ...]:
        return tuple(self._steps)

    def inspect(self, facts: StepFacts) -> tuple[Finding, ...]:
        """Findings of this step; empty if the run may continue."""
        self._steps.append(facts.rewards)
        found = [self._garbage(facts), self._drift(facts)]
        numbers = not_finite(facts.loss, facts.grad_norm, facts.broken)
        return tuple(one for one in found if one) + numbers + self._dead()

    def _garbage(self, facts: StepFacts) -> Finding | None:
        broken = degenerates(
            facts.completions, eos_ids=self._eos_ids, special_ids=self._special_ids
        )
        if not broken or len(broken) < self._config.garbage * len(facts.completions):
            return None
        worst, reason = broken[0]
        return advised(
            "garbage",
            "completion",
            f"{len(broken)} of {len(facts.completions)} completions are degenerate; {reason} in "
            f"{worst.group_id}: {worst.text[:80]!r}",
        )

    def _drift(self, facts: StepFacts) -> Finding | None:
        if facts.drift_max is None or facts.drift_max <= self._drift_limit:
            return None
        return advised(
            "sampling and scoring disagree",
            "logits",
            f"a token's logprob differs by {facts.drift_max:.3g} nats between the forward that "
            f"sampled it and the one that scores it, before any update (up to "
            f"{self._drift_limit:g} is allowed)",
        )

    def _dead(self) -> tuple[Finding, ...]:
        window = tuple(self._steps)
        mean = health.mean(total for step in window for total in step.totals)
        near_top = mean is not None and mean >= NEAR_TOP
        return tuple(
            advised(alarm.name, "reward", f"{alarm.reward or 'all rewards'}: {alarm.detail}")
            for alarm in health.alarms(window, patience=self._config.patience)
            if not (near_top and alarm.name in ("zero-variance", "constant"))
        )


def not_finite(
    loss: float | None, grad_norm: float | None, broken: Sequence[str] = ()
) -> tuple[Finding, ...]:
    """Findings of an update whose loss or gradient is non-finite: it must not be made.

    >>> [str(finding).partition(";")[0] for finding in not_finite(0.5, float("inf"))]
    ['gradient: not a number: gradient is inf']
    """
    source = f", from {', '.join(broken[:3])}" if broken else ""
    values: tuple[tuple[Stage, float | None, str], ...] = (
        ("loss", loss, f"loss is {loss}{source}"),
        ("gradient", grad_norm, f"gradient is {grad_norm}"),
    )
    return tuple(
        advised("not a number", stage, detail)
        for stage, value, detail in values
        if value is not None and not math.isfinite(value)
    )


def failed_checks(records: Sequence[StageRecord[object]]) -> tuple[Finding, ...]:
    """The failed stage checks of a trace as findings, in the order of the stages: start with the
    first."""
    return tuple(
        advised(check.name, record.stage, check.detail)
        for record in records
        for check in record.checks
        if not check.ok
    )


def save_bundle(folder: Path, trace: Trace, step: int, findings: Sequence[Finding]) -> Path:
    """The trace and, if the run was stopped, ``report.json``, which says why; findings are also
    failed checks of the trace's stages, as the doctor reads them. Returns where it is: a second
    bundle of the same step gets a numbered name."""
    place, copy = folder, 1
    while place.exists():
        copy += 1
        place = folder.with_name(f"{folder.name}-{copy}")
    stages = {record.stage: record for record in trace.stages}
    for stage in dict.fromkeys(finding.stage for finding in findings):
        old = stages.get(stage) or StageRecord(stage, {}, (), 0.0)
        checks = (
            *(check for check in old.checks if check.ok),
            *(Check(f.name, False, f.detail) for f in findings if f.stage == stage),
        )
        stages[stage] = StageRecord(stage, old.value, checks, old.seconds)
    save_trace(Trace(trace.header, tuple(stages.values())), place)
    if findings:
        body = {"step": step, "findings": [asdict(finding) for finding in findings]}
        text = f"{dumps(body)}\n".encode("utf-8", "surrogatepass")
        write_file(place / "report.json", text)
    return place


def doctor_command(bundle: Path) -> str:
    """What shows a stopped step.

    >>> doctor_command(Path("my run/stopped/step-000000"))
    "omni-grpo doctor 'my run/stopped/step-000000'"
    """
    return f"omni-grpo doctor {shlex.quote(str(bundle))}"


def watch_generation(model: Any, found: Callable[[Finding], None]) -> Callable[[], None]:
    """Call ``found`` when a forward of ``model`` in train mode under checkpointing leaves the cache
    empty that it should fill.

    That is the incident, caught as it happens: blocks that checkpoint in train mode get no cache. A
    version that passes it to them anyway does no harm, and is not reported. Returns a function that
    ends the watch. ``model``: any transformers model with ``gradient_checkpointing`` blocks, such
    as the thinker.
    """
    blocks = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]

    def look(_module: Any, _args: Any, keywords: dict[str, Any], output: Any) -> None:
        if not any(m.gradient_checkpointing and m.training for m in blocks):
            return
        cache = cache_among(keywords)
        if cache is None and keywords.get("use_cache") and isinstance(output, Mapping):
            cache = cache_among(output)
        if cache is not None and length_of(cache) == 0:
            found(advised("generation in train mode under checkpointing", "completion"))

    # a graph samples in eval mode, without transformers' cache
    setattr(look, SKIPS_DECODING, True)
    hook = model.register_forward_hook(look, with_kwargs=True)
    end: Callable[[], None] = hook.remove
    return end
