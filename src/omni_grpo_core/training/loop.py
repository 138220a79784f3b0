"""GRPO training on Accelerate: roll out, score, compare within groups, update; log, guard.

On one process, under DDP and FSDP2 the loop is the same: what concerns all processes goes through
:class:`~omni_grpo_core.training.distributed.AccelerateDistributed`. Every random choice is a
function of (seed, step, sample), so a resumed run needs no random state and equals one that was
never interrupted.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from functools import partial as applied
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from omni_grpo_core.core.policy import Policy
from omni_grpo_core.engines.proof import Proof
from omni_grpo_core.engines.requests import Backend
from omni_grpo_core.errors import ConfigError
from omni_grpo_core.losses.advantages import Advantages, gdpo_advantages, group_advantages
from omni_grpo_core.losses.metrics import Metrics, advantage_metrics, rollout_metrics
from omni_grpo_core.pipeline.inputs import Inputs, header, prepare, reward_arguments
from omni_grpo_core.rewards import health
from omni_grpo_core.rewards.compose import Composed
from omni_grpo_core.training import checkpointing
from omni_grpo_core.training.bundle import step_record, step_trace
from omni_grpo_core.training.config import TrainConfig, learning_rate
from omni_grpo_core.training.evaluation import preflight
from omni_grpo_core.training.exhausted import Watch
from omni_grpo_core.training.guard import (
    Finding,
    StepFacts,
    failed_checks,
    not_finite,
    save_bundle,
    watch_generation,
)
from omni_grpo_core.training.micro_batches import MicroBatch, make_micro_batches
from omni_grpo_core.training.optimizers import set_rate
from omni_grpo_core.training.partial import Partial
from omni_grpo_core.training.run import Run
from omni_grpo_core.training.sharding import gathered, reshard
from omni_grpo_core.training.step import Update, optimize
from omni_grpo_core.training.trainable import merged_weights
from omni_grpo_core.types import Completion, Rollout, Sample, Trace


@dataclass(frozen=True, slots=True)
class TrainResult:
    """``finished``: every step was taken. ``stopped``: the guard ended the run at ``step``, before
    the update in which it found something; ``bundle`` is the folder with the trace of that step and
    the report."""

    status: Literal["finished", "stopped"]
    step: int
    findings: tuple[Finding, ...]
    bundle: Path | None
    model: Path | None

    def to_json(self) -> dict[str, Any]:
        """The one object that ``--json`` prints."""
        return {
            "status": self.status,
            "step": self.step,
            "findings": [asdict(finding) for finding in self.findings],
            "bundle": self.bundle and str(self.bundle),
            "model": self.model and str(self.model),
        }


@dataclass(frozen=True, slots=True, eq=False)
class StepView:
    """Passed to ``on_step``: the log line, and this process's completions with rewards."""

    record: Mapping[str, Any]
    inputs: Inputs
    rolled: Rollout
    scored: Composed


def train(
    config: TrainConfig,
    *,
    trace_steps: int = 0,
    on_step: Callable[[StepView], None] = lambda view: None,
    warn: Callable[[str], None] = lambda text: None,
    tell: Callable[[str], None] = lambda text: None,
    backend: Backend | None = None,
    watch: Callable[[Policy], AbstractContextManager[Any]] | None = None,
    data_changed: bool = False,
) -> TrainResult:
    """Train from the newest saved state under ``config.out``, or from the start.

    ``config`` has passed :mod:`~omni_grpo_core.training.load_config`. ``trace_steps``: how many of
    the first steps are recorded as traces under ``out/trace``. ``warn`` is called, on the main
    process, with what could not be used of an earlier run, ``tell`` with what takes long.
    ``backend``: a rollout engine in place of the configured one. ``watch``: entered before the
    first step, with the policy as it will learn; for example :func:`~omni_grpo_core.record`.
    ``data_changed``: whether a run may go on with other rows than it was started with. SIGTERM and
    SIGKILL end the run at once; the steps since the last saved state are lost.

    Raises ``OmniGrpoError`` for unusable input and for a machine that is too small, ``ConfigError``
    for a ``watch`` over a run whose gradients are offloaded.
    """
    if watch is not None and config.offload_gradients:
        raise ConfigError(
            "offload_gradients",
            got="true in a run that is recorded",
            want="gradients on the device, where a recorder reads them after each backward pass",
            fix="remove it, which changes no number, or record a run of a smaller model",
        )
    stage = Watch()
    with ExitStack() as held:
        try:
            run = Run(config, held, stage, warn, tell, watch, backend, data_changed)
            return _train(run, trace_steps, on_step)
        except (RuntimeError, MemoryError, OSError) as error:
            known = stage.explain(error)
            if known is None:
                raise
            raise known from error


def _train(run: Run, trace_steps: int, on_step: Callable[[StepView], None]) -> TrainResult:
    if run.saved is None and run.config.guard.preflight:
        with run.stage("checking"):
            broken = _preflight(run)
        if broken is not None:
            return broken
    with run.stage("loading"):
        run.set_up()
        start = run.resume()
    end_watch = watch_generation(run.policy.model.model, run.seen.append)
    try:
        for step in range(start, run.config.steps):
            outcome = _step(run, step, traced=step < trace_steps)
            if isinstance(outcome, TrainResult):
                return outcome
            on_step(outcome)
            run.save_if_due(step + 1)
        run.open(start)
    finally:
        end_watch()
        for tracker in run.accelerator.trackers:
            tracker.finish()  # Accelerate's end_training also ends the group of the processes
    model = run.out / "model"
    run.tell(f"writing the model to {model}")
    with run.stage("saving"):
        weights = merged_weights(run.policy.model, keep=run.accelerator.is_main_process)
        run.distributed.agree(
            lambda: checkpointing.export(run.policy, model, weights), main_only=True
        )
    return TrainResult("finished", run.config.steps, (), None, model)


def _step(run: Run, step: int, *, traced: bool) -> StepView | TrainResult:
    """A result if the run ends here."""
    config, begin = run.config, time.perf_counter()
    inputs = prepare(run.policy, _own_samples(run, step), config.settings)
    findings: list[Finding] = []
    keep = run.distributed.keeps_whole
    with run.stage("sampling"), run.accelerator.autocast(), gathered(run.scorer, keep=keep):
        run.engine.push()
        proof = run.engine.prove(inputs, step, seed_of(config.seed, step, "proof"))
        if proof and not proof.ok:
            return _disagreeing(run, step, proof)
        rolled = run.engine.rollout(
            inputs,
            group_size=len(run.share.completions),
            first=run.share.completions.start,
            max_new_tokens=config.settings.max_new_tokens,
            temperature=config.settings.temperature,
            seed=seed_of(config.seed, step),
        )
    scored = _score(run, inputs, rolled)
    everyone, rewards, own = _gather(run, rolled, scored)
    advantages = _advantages(run, rewards)
    partial = run.partial.advantages(
        run.policy.processor.tokenizer, rolled.completions, rewards, own
    )
    window = _window(run, inputs, rolled, advantages, partial, own)

    def may_step(update: Update) -> bool:
        numbers = update.loss, update.grad_norm, update.broken
        if "drift" in update.metrics.means:  # the first one on this rollout
            drift = update.metrics.peaks.get("drift_max")
            facts = StepFacts(step, everyone, rewards, drift, *numbers)
            findings.extend((*_seen(run), *run.guard.inspect(facts)))
        else:
            findings.extend(not_finite(*numbers))
        return not findings

    rate = 0.0

    def begin_update(iteration: int) -> None:
        nonlocal rate
        at = step * config.iterations + iteration
        rate = learning_rate(config.optimizer, at, config.steps * config.iterations)
        set_rate(run.optimizer, rate)
        if config.trained_weights == "bfloat16_stochastic":
            torch.manual_seed(seed_of(config.seed, at, "rounding"))

    updates = optimize(
        run.plan,
        run.distributed,
        run.scorer,
        run.policy.model,
        run.optimizer,
        window,
        reference=applied(_reference, run) if run.reference else None,
        may_step=may_step,
        set_rate=begin_update,
        stage=run.stage,
        host=run.host,
    )
    reshard(run.scorer)  # without an update no backward pass has done it
    if not updates:
        # no process had anything in the loss, but the rewards have to be inspected
        found = run.guard.inspect(StepFacts(step, everyone, rewards))
        findings.extend((*_seen(run), *found))
    lengths = Metrics.sum(run.distributed.gather([rollout_metrics(rolled.completions)]))
    record = step_record(step, rewards, lengths + advantage_metrics(advantages), updates)
    record |= proof.numbers if proof else {}
    record |= {"lr": rate, "seconds": time.perf_counter() - begin}
    record |= run.stage.step_costs()
    measured: Mapping[str, float] = {}
    if not findings and run.evaluator.due(step):
        with run.stage("evaluation"), run.accelerator.autocast(), gathered(run.scorer):
            measured = run.evaluator.accuracy(run.policy)
    run.open(step)
    trace = None
    if (traced or findings) and run.accelerator.is_main_process:
        trace = step_trace(
            run.policy, config, inputs, rolled, scored, advantages, partial.own, record
        )
    if findings:
        return _stopped(run, step, tuple(findings), trace)
    if trace is not None:
        save_bundle(run.out / "trace" / f"step-{step:06d}", trace, step, ())
    record |= measured
    run.log(step, record)
    return StepView(record, inputs, rolled, scored)


def _advantages(run: Run, rewards: health.Step) -> Advantages:
    if run.config.aggregation == "sum_then_normalize":
        return group_advantages(rewards.totals, rewards.group_ids, run.config.scale)
    counted = run.reward.counted(rewards.scores)
    return gdpo_advantages(counted, run.reward.weights, rewards.group_ids)


def _reference(run: Run, micro: MicroBatch) -> Tensor:
    assert run.reference
    with gathered(run.scorer):
        return run.reference(micro)


def _seen(run: Run) -> tuple[Finding, ...]:
    """What any process saw a forward do, once; all processes have to stop together."""
    return tuple(dict.fromkeys(run.distributed.gather(run.seen)))


def _own_samples(run: Run, step: int) -> tuple[Sample, ...]:
    """This process's share of the step's samples; a step never holds a sample twice."""
    epoch, at = divmod(step, len(run.samples) // (prompts := run.config.prompts))
    generator = torch.Generator().manual_seed(seed_of(run.config.seed, epoch, "order"))
    order = torch.randperm(len(run.samples), generator=generator).tolist()
    return tuple(run.samples[order[at * prompts + own]] for own in run.share.prompts)


def _preflight(run: Run) -> TrainResult | None:
    """A result if the first samples show that the pipeline is broken: nothing is sampled from
    it. Before weights are sharded."""
    found: tuple[Finding, ...] = ()
    if run.accelerator.is_main_process:
        found, trace = preflight(run.policy, _own_samples(run, 0), run.config.settings)
    findings = tuple(run.distributed.gather(found))
    if not findings:
        return None
    return _stopped(run, 0, findings, trace if run.accelerator.is_main_process else None)


def _disagreeing(run: Run, step: int, proof: Proof) -> TrainResult:
    """Nothing is learned from an engine that does not read or score as the trainer does."""
    ran = {**header(run.policy, run.config.settings), "checkpoint": run.policy.checkpoint}
    trace = Trace(ran, proof.records)
    return _stopped(run, step, failed_checks(proof.records), trace)


def _stopped(
    run: Run, step: int, findings: tuple[Finding, ...], trace: Trace | None
) -> TrainResult:
    """``trace``: on the process that writes."""
    folder = run.out / "stopped" / f"step-{step:06d}"
    if trace is not None:
        folder = save_bundle(folder, trace, step, findings)
    run.accelerator.wait_for_everyone()
    return TrainResult("stopped", step, findings, folder, None)


def _score(run: Run, inputs: Inputs, rolled: Rollout) -> Composed:
    prompts, texts, columns = reward_arguments(inputs.prompts, inputs.samples, rolled)
    return run.reward.report(prompts, texts, **columns)


def _gather(
    run: Run, rolled: Rollout, scored: Composed
) -> tuple[tuple[Completion, ...], health.Step, Tensor]:
    """All processes' completions with their rewards, as one process would have them in order:
    statistics cover the whole step. Last where this process's are among them, (N,)."""
    rank = run.accelerator.process_index
    rows = run.distributed.gather(
        [
            (
                run.share.prompts[at // rolled.group_size],
                completion,
                scored.total[at].value,
                {name: scores[at].value for name, scores in scored.scores.items()},
                rank,
            )
            for at, completion in enumerate(rolled.completions)
        ]
    )
    rows.sort(key=lambda row: (row[0], row[1].index))
    rewards = health.Step(
        scores={name: [row[3][name] for row in rows] for name in scored.scores},
        totals=[row[2] for row in rows],
        group_ids=[row[1].group_id for row in rows],
        capped=[row[1].finish_reason == "length" for row in rows],
    )
    own = torch.tensor([at for at, row in enumerate(rows) if row[4] == rank])
    return tuple(row[1] for row in rows), rewards, own


def _window(
    run: Run,
    inputs: Inputs,
    rolled: Rollout,
    advantages: Advantages,
    partial: Partial,
    own: Tensor,
) -> tuple[MicroBatch, ...]:
    size = run.config.micro_batch_size
    if run.fast:  # a group that is split would have its prompt computed in each part
        size = max(size, run.share.most)
    if run.config.drop_zero_variance:
        kept = advantages.informative | partial.informative
    else:
        kept = advantages.usable | partial.usable
    return make_micro_batches(
        run.policy,
        inputs.batch,
        rolled,
        advantages.values[own],
        kept[own],
        size,
        partial.own,
        most=run.share.most,
    )


def seed_of(seed: int, step: int, use: str = "rollout") -> int:
    """A distinct seed for each use in each step.

    >>> seed_of(0, 1) == seed_of(0, 1), seed_of(0, 1) == seed_of(1, 0)
    (True, False)
    """
    digest = hashlib.sha256(f"{seed}:{step}:{use}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
