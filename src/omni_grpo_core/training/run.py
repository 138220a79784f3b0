"""The state of a run: what is loaded and set up once, and its folder with log and saved states."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial as applied
from pathlib import Path
from typing import Any

from omni_grpo_core.core.policy import Policy, load_policy
from omni_grpo_core.core.rollout import rollout
from omni_grpo_core.core.sample import load_samples
from omni_grpo_core.engines.requests import Backend
from omni_grpo_core.errors import TrainError, one_line
from omni_grpo_core.fast.support import choose_fast
from omni_grpo_core.io import is_out_of_memory
from omni_grpo_core.io.atomic import write_file
from omni_grpo_core.training import checkpointing
from omni_grpo_core.training.config import TrainConfig, as_values
from omni_grpo_core.training.determinism import repeatable
from omni_grpo_core.training.distributed import AccelerateDistributed, make_accelerator
from omni_grpo_core.training.evaluation import Evaluator
from omni_grpo_core.training.exhausted import GIB, Watch
from omni_grpo_core.training.guard import Finding, Guard
from omni_grpo_core.training.host_gradients import HostGradients
from omni_grpo_core.training.liveness import Liveness
from omni_grpo_core.training.load_config import require_enough
from omni_grpo_core.training.optimizers import make_optimizer
from omni_grpo_core.training.partial import PartialRewards
from omni_grpo_core.training.placement import share_of
from omni_grpo_core.training.rollout_engine import choose_engine
from omni_grpo_core.training.sharding import initialise_root, known_layers
from omni_grpo_core.training.state_parts import read_parts, write_part
from omni_grpo_core.training.state_parts import size as part_size
from omni_grpo_core.training.step import Scorer, StepPlan
from omni_grpo_core.training.trainable import choose_trainable

LOG = "log.jsonl"


@dataclass(eq=False)
class Run:
    """What a call of :func:`~omni_grpo_core.training.loop.train` works with, from its arguments.

    ``held``: closed when the run ends. ``stage``: around each stage. Model and data are loaded at
    once; what learns, the optimizer and the engine exist after :meth:`set_up`. ``saved``: the state
    from which the run goes on. ``seen``: findings of this process's forwards.
    """

    config: TrainConfig
    held: ExitStack
    stage: Watch
    warn: Callable[[str], None]
    tell: Callable[[str], None]
    watch: Callable[[Policy], AbstractContextManager[Any]] | None
    backend: Backend | None
    data_changed: bool

    def __post_init__(self) -> None:
        config, stage = self.config, self.stage
        self.held.enter_context(repeatable(config.full_determinism))
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
            stage.others = self.held.enter_context(Liveness(rank, world, self.distributed.gather))
        self.share = share_of(config.prompts, config.settings.group_size, world, rank)
        self._locked = self._opened = False
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
            full_determinism=config.full_determinism,
        )
        self.seen: list[Finding] = []
        self.evaluator = Evaluator(config)

    def set_up(self) -> None:
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
        if self.watch is not None:
            self.held.enter_context(self.watch(self.policy))
        self.host = HostGradients(learning) if config.offload_gradients else None
        if self.host is not None:
            self.held.enter_context(self.host.attached())

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
        handle = None if self._locked else checkpointing.lock(self.out)
        if handle is not None:
            self.held.callback(os.close, handle)
        self._locked = True

    def open(self, step: int) -> None:
        """Called before anything is written; ``step`` is the first to be. An error from input or
        machine before that leaves nothing behind."""
        if self._opened:
            return
        self.distributed.agree(lambda: self._open_folder(step), main_only=True)
        if self.config.trackers:
            self.accelerator.init_trackers("tracker")
        self.accelerator.wait_for_everyone()
        self._opened = True

    def _open_folder(self, step: int) -> None:
        """On the main process."""
        self.out.mkdir(parents=True, exist_ok=True)
        self._lock()
        body = json.dumps(as_values(self.config), indent=1)
        write_file(self.out / "config.json", f"{body}\n".encode())
        if (unreadable := checkpointing.truncate_log(self.out / LOG, step)) is not None:
            self.warn(unreadable)

    def resume(self) -> int:
        """Read the saved state; the step to begin with."""
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
                got=f"{type(error).__name__}: {one_line(error)}",
                want="weights and optimizer of this model",
                fix="use the checkpoint and the library versions that the run was started with",
            ) from error

    def save_if_due(self, step: int) -> None:
        """``step``: the next one."""
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

    def log(self, step: int, record: Mapping[str, Any]) -> None:
        if self.accelerator.is_main_process:
            checkpointing.append_log(self.out / LOG, record)
        if self.config.trackers:
            numbers = {name: value for name, value in record.items() if value is not None}
            self.accelerator.log(numbers, step=step)
