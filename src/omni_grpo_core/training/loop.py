"""GRPO training on Accelerate: roll out, score, compare within groups, update; save, log, guard.

On one process, under DDP and FSDP2 the loop is the same: what concerns all processes goes through
:class:`~omni_grpo_core.training.distributed.AccelerateDistributed`. Every random choice is a
function of (seed, step, sample), so a resumed run needs no random state and equals one that was
never interrupted.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass
from functools import partial as applied
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from omni_grpo_core.core.policy import Policy, load_policy
from omni_grpo_core.core.rollout import rollout
from omni_grpo_core.core.sample import load_samples
from omni_grpo_core.engines.proof import Proof
from omni_grpo_core.engines.requests import Backend
from omni_grpo_core.errors import TrainError
from omni_grpo_core.fast.support import choose_fast
from omni_grpo_core.io import is_out_of_memory
from omni_grpo_core.io.atomic import write_file
from omni_grpo_core.losses.advantages import Advantages, gdpo_advantages, group_advantages
from omni_grpo_core.losses.metrics import Metrics, advantage_metrics, rollout_metrics
from omni_grpo_core.pipeline.inputs import Inputs, header, prepare, reward_arguments
from omni_grpo_core.rewards import health
from omni_grpo_core.rewards.compose import Composed
from omni_grpo_core.training import checkpointing
from omni_grpo_core.training.bundle import save_bundle, step_record, step_trace
from omni_grpo_core.training.config import TrainConfig, as_values, learning_rate
from omni_grpo_core.training.distributed import AccelerateDistributed, make_accelerator
from omni_grpo_core.training.evaluation import Evaluator, preflight
from omni_grpo_core.training.exhausted import GIB, Watch
from omni_grpo_core.training.guard import (
    Finding,
    Guard,
    StepFacts,
    failed_checks,
    not_finite,
    watch_generation,
)
from omni_grpo_core.training.liveness import Liveness
from omni_grpo_core.training.load_config import require_enough
from omni_grpo_core.training.optimizers import make_optimizer, set_rate
from omni_grpo_core.training.partial import Partial, PartialRewards
from omni_grpo_core.training.placement import share_of
from omni_grpo_core.training.rollout_engine import choose_engine
from omni_grpo_core.training.sharding import gathered, initialise_root, known_layers
from omni_grpo_core.training.state_parts import read_parts, write_part
from omni_grpo_core.training.state_parts import size as part_size
from omni_grpo_core.training.step import (
    MicroBatch,
    Scorer,
    StepPlan,
    Update,
    make_micro_batches,
    optimize,
)
from omni_grpo_core.training.trainable import choose_trainable, merged_weights
from omni_grpo_core.types import Completion, Rollout, Sample, Trace

LOG = "log.jsonl"


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
    watch: Callable[[Policy], AbstractContextManager[Any]] = lambda policy: nullcontext(),
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

    Raises ``OmniGrpoError`` for unusable input and for a machine that is too small.
    """
    stage = Watch()
    with ExitStack() as held:
        try:
            run = _Run(
                config, trace_steps, on_step, warn, tell, watch, held, stage, backend, data_changed
            )
            return run.run()
        except (RuntimeError, MemoryError, OSError) as error:
            known = stage.explain(error)
            if known is None:
                raise
            raise known from error


class _Run:
    def __init__(
        self,
        config: TrainConfig,
        trace_steps: int,
        on_step: Callable[[StepView], None],
        warn: Callable[[str], None],
        tell: Callable[[str], None],
        watch: Callable[[Policy], AbstractContextManager[Any]],
        held: ExitStack,
        stage: Watch,
        backend: Backend | None,
        data_changed: bool,
    ) -> None:
        self.config, self.trace_steps, self.on_step = config, trace_steps, on_step
        self.warn, self.tell, self.held, self.stage = warn, tell, held, stage
        self.backend, self.data_changed = backend, data_changed
        self.watch = watch
        self.out = Path(config.out)
        root = Path(config.root) if config.root else None
        self.samples = load_samples(config.data, root=root, format=config.data_format)
        require_enough(config, self.samples)
        self.rows = checkpointing.rows_hash(self.samples)
        self.reward = config.composition()
        spanned = {n: (e.span, e.weight) for n, e in config.rewards.items() if e.span is not None}
        self.partial = PartialRewards(spanned, config.scale)
        self.accelerator = make_accelerator(config)
        self.distributed = AccelerateDistributed(self.accelerator)
        rank, world = self.accelerator.process_index, self.distributed.world
        if world > 1:
            stage.others = held.enter_context(Liveness(rank, world, self.distributed.gather))
        self.share = share_of(config.prompts, config.settings.group_size, world, rank)
        self.locked = self.opened = False
        self.saved = self.distributed.agree(self._find_saved, main_only=True)
        with stage("loading"):
            self.policy = load_policy(
                config.checkpoint,
                processor=config.processor,
                device=str(self.accelerator.device),
                dtype=config.loaded_as,
            )
        stage.model = self.policy.model
        self.guard = Guard(
            config.guard,
            drift=config.drift_limit,
            eos_ids=self.policy.eos_token_ids,
            special_ids=self.policy.suppressed.nonzero().flatten().tolist(),
        )
        self.plan = StepPlan(
            loss=config.loss,
            correction=config.correction,
            iterations=config.iterations,
            max_grad_norm=config.optimizer.max_grad_norm,
            gradient_checkpointing=config.gradient_checkpointing,
        )
        self.seen: list[Finding] = []
        self.evaluator = Evaluator(config)

    # ----------------------------------------------------------------- the run

    def run(self) -> TrainResult:
        if self.saved is None and self.config.guard.preflight:
            with self.stage("checking"):
                broken = self._preflight()
            if broken is not None:
                return broken
        with self.stage("loading"):
            self._set_up()
            start = self._resume()
        end_watch = watch_generation(self.policy.model.model, self.seen.append)
        try:
            for step in range(start, self.config.steps):
                stopped = self._step(step)
                if stopped is not None:
                    return stopped
                self._save_if_due(step + 1)
            self._open(start)
        finally:
            end_watch()
            if self.config.trackers:
                self.accelerator.end_training()
        model = self.out / "model"
        self.tell(f"writing the model to {model}")
        with self.stage("saving"):
            weights = merged_weights(self.policy.model, keep=self.accelerator.is_main_process)
            self.distributed.agree(
                lambda: checkpointing.export(self.policy, model, weights), main_only=True
            )
        return TrainResult("finished", self.config.steps, (), None, model)

    def _set_up(self) -> None:
        """Choose what learns, and hand model and optimizer to Accelerate."""
        config = self.config
        self.fast = choose_fast(config.fast, self.policy, self.warn)
        self.reference = choose_trainable(self.policy, config, self.accelerator.autocast, self.fast)
        learning = [p for p in self.policy.model.parameters() if p.requires_grad]
        scorer = Scorer(
            self.policy,
            config.settings.temperature,
            self.fast.scores if self.fast else None,
            self.accelerator.autocast,
        )
        with known_layers(self.policy.text_model):
            self.scorer, self.optimizer = self.accelerator.prepare(
                scorer, make_optimizer(config, learning)
            )
        initialise_root(self.scorer)
        own = self.fast.rollout if self.fast else applied(rollout, self.policy)
        self.engine = choose_engine(config, self.policy, own, backend=self.backend, warn=self.warn)
        self.held.callback(self.engine.close)
        self.stage.optimizer = self.optimizer
        self.held.enter_context(self.watch(self.policy))

    def _find_saved(self) -> checkpointing.Saved | None:
        """On the main process. A missing folder is not created just for a lock."""
        if not self.out.exists():
            return None
        self._lock()
        saved = checkpointing.newest(self.out, self.config)
        for text in saved.skipped if saved else ():
            self.warn(f"{text}; resuming from state {saved.folder.name if saved else ''}")
        if saved:
            accepted = self.data_changed
            changed = checkpointing.check_rows(self.out, saved, self.rows, accepted=accepted)
            if changed is not None:
                self.warn(changed)
        return saved

    def _lock(self) -> None:
        handle = None if self.locked else checkpointing.lock(self.out)
        if handle is not None:
            self.held.callback(os.close, handle)
        self.locked = True

    def _open(self, step: int) -> None:
        """Called before anything is written; ``step`` is the first to be. An error from input or
        machine before that leaves nothing behind."""
        if self.opened:
            return
        self.distributed.agree(lambda: self._open_folder(step), main_only=True)
        if self.config.trackers:
            self.accelerator.init_trackers("tracker")
        self.accelerator.wait_for_everyone()
        self.opened = True

    def _open_folder(self, step: int) -> None:
        """On the main process."""
        self.out.mkdir(parents=True, exist_ok=True)
        self._lock()
        body = json.dumps(as_values(self.config), indent=1)
        write_file(self.out / "config.json", f"{body}\n".encode())
        if (unreadable := checkpointing.truncate_log(self.out / LOG, step)) is not None:
            self.warn(unreadable)

    def _resume(self) -> int:
        if self.saved is None:
            return 0
        self.tell(f"resuming from state {self.saved.folder.name}")
        self.distributed.agree(applied(self._read, self.saved))
        self.guard.remember(self.saved.guard)
        return self.saved.step

    def _read(self, saved: checkpointing.Saved) -> None:
        try:
            read_parts(saved.folder, saved.files, self.policy.model, self.optimizer.optimizer)
        except Exception as error:  # the libraries raise anything for files they cannot use
            if is_out_of_memory(error):
                raise
            raise TrainError(
                str(saved.folder),
                got=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
                want="weights and optimizer of this model",
                fix="use the checkpoint and the library versions that the run was started with",
            ) from error

    def _save_if_due(self, step: int) -> None:
        every = self.config.save_every
        if step == self.config.steps or (every and step % every == 0):
            model, optimizer = self.policy.model, self.optimizer.optimizer
            rank, world = self.accelerator.process_index, self.distributed.world
            bytes_ = sum(self.distributed.gather([part_size(model, optimizer, rank=rank)]))
            self.tell(f"saving state {step:06d}, {bytes_ / GIB:.3g} GiB")
            with self.stage("saving"):
                checkpointing.save(
                    self.out,
                    self.config,
                    step,
                    self.guard.remembered,
                    rows=self.rows,
                    write=lambda folder: write_part(
                        folder, model, optimizer, rank=rank, world=world
                    ),
                    distributed=self.distributed,
                )

    # ----------------------------------------------------------------- one step

    def _step(self, step: int) -> TrainResult | None:
        config, begin = self.config, time.perf_counter()
        inputs = prepare(self.policy, self._own_samples(step), config.settings)
        findings: list[Finding] = []
        with self.stage("sampling"), self.accelerator.autocast(), gathered(self.scorer):
            self.engine.push()
            proof = self.engine.prove(inputs, step, seed_of(config.seed, step, "proof"))
            if proof and not proof.ok:
                return self._disagreeing(step, proof)
            rolled = self.engine.rollout(
                inputs,
                group_size=len(self.share.completions),
                first=self.share.completions.start,
                max_new_tokens=config.settings.max_new_tokens,
                temperature=config.settings.temperature,
                seed=seed_of(config.seed, step),
            )
        scored = self._score(inputs, rolled)
        everyone, rewards, own = self._gather(rolled, scored)
        advantages = self._advantages(rewards)
        partial = self.partial.advantages(
            self.policy.processor.tokenizer, rolled.completions, rewards, own
        )
        window = self._window(inputs, rolled, advantages, partial, own)

        def may_step(update: Update) -> bool:
            numbers = update.loss, update.grad_norm, update.broken
            if "drift" in update.metrics.means:  # the first one on this rollout
                drift = update.metrics.peaks.get("drift_max")
                facts = StepFacts(step, everyone, rewards, drift, *numbers)
                findings.extend((*self._seen(), *self.guard.inspect(facts)))
            else:
                findings.extend(not_finite(*numbers))
            return not findings

        rate = 0.0

        def begin_update(iteration: int) -> None:
            nonlocal rate
            at = step * config.iterations + iteration
            rate = learning_rate(config.optimizer, at, config.steps * config.iterations)
            set_rate(self.optimizer, rate)
            if config.trained_weights == "bfloat16_stochastic":
                torch.manual_seed(seed_of(config.seed, at, "rounding"))

        updates = optimize(
            self.plan,
            self.distributed,
            self.scorer,
            self.policy.model,
            self.optimizer,
            window,
            reference=self._reference if self.reference else None,
            may_step=may_step,
            set_rate=begin_update,
            stage=self.stage,
        )
        if not updates:
            # no process had anything in the loss, but the rewards have to be inspected
            found = self.guard.inspect(StepFacts(step, everyone, rewards))
            findings.extend((*self._seen(), *found))
        lengths = Metrics.sum(self.distributed.gather([rollout_metrics(rolled.completions)]))
        record = step_record(step, rewards, lengths + advantage_metrics(advantages), updates)
        record |= proof.numbers if proof else {}
        record |= {"lr": rate, "seconds": time.perf_counter() - begin}
        record |= self.stage.step_costs()
        measured: Mapping[str, float] = {}
        if not findings:
            with self.stage("evaluation"), self.accelerator.autocast(), gathered(self.scorer):
                measured = self.evaluator.measure(self.policy, step)
        self._open(step)
        if step < self.trace_steps or findings:
            folder = self.out / ("stopped" if findings else "trace") / f"step-{step:06d}"
            if self.accelerator.is_main_process:
                trace = step_trace(
                    self.policy, config, inputs, rolled, scored, advantages, partial.own, record
                )
                save_bundle(folder, trace, step, findings)
        if findings:
            self.accelerator.wait_for_everyone()
            return TrainResult("stopped", step, tuple(findings), folder, None)
        record |= measured
        self._log(step, record)
        self.on_step(StepView(record, inputs, rolled, scored))
        return None

    def _advantages(self, rewards: health.Step) -> Advantages:
        if self.config.aggregation == "sum_then_normalize":
            return group_advantages(rewards.totals, rewards.group_ids, self.config.scale)
        counted = self.reward.counted(rewards.scores)
        return gdpo_advantages(counted, self.reward.weights, rewards.group_ids)

    def _reference(self, micro: MicroBatch) -> Tensor:
        assert self.reference
        with gathered(self.scorer):
            return self.reference(micro)

    def _seen(self) -> tuple[Finding, ...]:
        """What any process saw a forward do, once; all processes have to stop together."""
        return tuple(dict.fromkeys(self.distributed.gather(self.seen)))

    def _own_samples(self, step: int) -> tuple[Sample, ...]:
        """This process's share of the step's samples; a step never holds a sample twice."""
        epoch, at = divmod(step, len(self.samples) // (prompts := self.config.prompts))
        generator = torch.Generator().manual_seed(seed_of(self.config.seed, epoch, "order"))
        order = torch.randperm(len(self.samples), generator=generator).tolist()
        return tuple(self.samples[order[at * prompts + own]] for own in self.share.prompts)

    def _preflight(self) -> TrainResult | None:
        """A result if the first samples show that the pipeline is broken: nothing is sampled from
        it. Before weights are sharded."""
        found: tuple[Finding, ...] = ()
        if self.accelerator.is_main_process:
            found, trace = preflight(self.policy, self._own_samples(0), self.config.settings)
        findings = tuple(self.distributed.gather(found))
        if not findings:
            return None
        return self._stopped(0, findings, trace if self.accelerator.is_main_process else None)

    def _disagreeing(self, step: int, proof: Proof) -> TrainResult:
        """Nothing is learned from an engine that does not read or score as the trainer does."""
        trace = Trace(header(self.policy, self.config.settings), proof.records)
        return self._stopped(step, failed_checks(proof.records), trace)

    def _stopped(
        self, step: int, findings: tuple[Finding, ...], trace: Trace | None
    ) -> TrainResult:
        folder = self.out / "stopped" / f"step-{step:06d}"
        if trace is not None:
            save_bundle(folder, trace, step, findings)
        self.accelerator.wait_for_everyone()
        return TrainResult("stopped", step, findings, folder, None)

    def _score(self, inputs: Inputs, rolled: Rollout) -> Composed:
        prompts, texts, columns = reward_arguments(inputs.prompts, inputs.samples, rolled)
        return self.reward.report(prompts, texts, **columns)

    def _gather(
        self, rolled: Rollout, scored: Composed
    ) -> tuple[tuple[Completion, ...], health.Step, Tensor]:
        """All processes' completions with their rewards, as one process would have them in order:
        statistics cover the whole step. Last where this process's are among them, (N,)."""
        rank = self.accelerator.process_index
        rows = self.distributed.gather(
            [
                (
                    self.share.prompts[at // rolled.group_size],
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
        self,
        inputs: Inputs,
        rolled: Rollout,
        advantages: Advantages,
        partial: Partial,
        own: Tensor,
    ) -> tuple[MicroBatch, ...]:
        size = self.config.micro_batch_size
        if self.fast:  # a group that is split would have its prompt computed in each part
            size = max(size, self.share.most)
        if self.config.drop_zero_variance:
            kept = advantages.informative | partial.informative
        else:
            kept = advantages.usable | partial.usable
        return make_micro_batches(
            self.policy,
            inputs.batch,
            rolled,
            advantages.values[own],
            kept[own],
            size,
            partial.own,
            most=self.share.most,
        )

    def _log(self, step: int, record: Mapping[str, Any]) -> None:
        if self.accelerator.is_main_process:
            checkpointing.append_log(self.out / LOG, record)
        if self.config.trackers:
            numbers = {name: value for name, value in record.items() if value is not None}
            self.accelerator.log(numbers, step=step)


def seed_of(seed: int, step: int, use: str = "rollout") -> int:
    """A distinct seed for each use in each step.

    >>> seed_of(0, 1) == seed_of(0, 1), seed_of(0, 1) == seed_of(1, 0)
    (True, False)
    """
    digest = hashlib.sha256(f"{seed}:{step}:{use}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
