"""The guard for transformers' ``Trainer`` and TRL's ``GRPOTrainer``: a callback and a reward watch.

::

    guard = OmniGrpoGuard("out/guard", processing_class=processor)
    trainer = GRPOTrainer(..., reward_funcs=guard.watch([accuracy, format]), callbacks=[guard])

The callback sees the model: generation in train mode under gradient checkpointing is stopped before
its second token; a non-finite gradient, before any optimizer step uses it, on all processes at
once. ``watch`` sees completions and rewards: garbage stops the run at the step where it occurs, a
dead reward after ``patience`` steps.

Not checked: gradients in float16, where the loss scaler itself skips such a step and goes on with
a smaller scale, and under DeepSpeed, whose engine has stepped before any callback is called.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback

from omni_grpo_core.errors import TrainError
from omni_grpo_core.rewards import health, plain_text
from omni_grpo_core.rewards.call import RewardFunction, name_of, values_of
from omni_grpo_core.training.config import GuardConfig
from omni_grpo_core.training.guard import (
    Finding,
    Guard,
    StepFacts,
    advised,
    doctor_command,
    save_bundle,
    watch_generation,
)
from omni_grpo_core.types import Completion, Score, Stage, StageRecord, Trace


class GuardStop(TrainError):
    """The guard stopped the run; ``findings``, one or more, say why, and the first names the stage;
    ``bundle`` is the folder with the trace."""

    def __init__(self, step: int, findings: Sequence[Finding], bundle: Path) -> None:
        super().__init__(
            f"step {step}",
            got="; ".join(map(str, findings)),
            want="a run that can learn",
            fix=f"run {doctor_command(bundle)}",
        )
        self.step = step
        self.findings = tuple(findings)
        self.bundle = bundle

    @property
    def where(self) -> Stage:
        return self.findings[0].stage

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (GuardStop, (self.step, self.findings, self.bundle))


class OmniGrpoGuard(TrainerCallback):  # type: ignore[misc]
    """Stops a run by raising :class:`GuardStop`, before the step's update.

    ``out``: folder for the ``step-NNNNNN`` folders. ``processing_class``: the run's processor or
    tokenizer; its eos and special tokens distinguish an ending from a stray ``<|im_start|>``.
    """

    def __init__(
        self, out: str | Path, *, processing_class: Any, config: GuardConfig | None = None
    ) -> None:
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        self._tokenizer = tokenizer
        self._out = Path(out)
        self._eos = {tokenizer.eos_token_id} - {None}
        self._guard = Guard(
            config or GuardConfig(), eos_ids=self._eos, special_ids=tokenizer.all_special_ids
        )
        self._step = 0
        self._end_watch: Callable[[], None] | None = None
        self._names: list[str] = []
        self._scores: dict[str, list[float | None]] = {}

    # ----------------------------------------------------------------- the trainer's events

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step = int(state.global_step)
        if kwargs.get("model") is not None:
            self.attach(kwargs["model"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step = int(state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer, model = kwargs.get("optimizer"), kwargs.get("model")
        if optimizer is None or args.fp16:
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        broken = _with_nonfinite_gradient(parameters)
        if not _any_process(bool(broken), parameters[0].device):
            return
        names = {id(p): name for name, p in model.named_parameters()} if model is not None else {}
        where = ", ".join(names.get(id(parameter), "a parameter") for parameter in broken[:3])
        detail = f"the gradient of {where or 'parameters of another process'} is not finite"
        self._stop([advised("not a number", "gradient", detail)], ())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.detach()

    def attach(self, model: Any) -> None:
        """Watch a model's forwards; for trainers that call no callbacks."""
        self.detach()
        self._end_watch = watch_generation(model, self._stop_generation)

    def detach(self) -> None:
        """Stop watching."""
        if self._end_watch is not None:
            self._end_watch()
            self._end_watch = None

    def _stop_generation(self, finding: Finding) -> None:
        self._stop([finding], ())

    # ----------------------------------------------------------------- rewards

    def watch(self, functions: Sequence[RewardFunction]) -> list[RewardFunction]:
        """The same reward functions, with their values observed; the guard decides after the last.

        The trainer must call them one after another with the completions of one step.
        """
        self._names = [name_of(function) for function in functions]
        return [self._watched(function) for function in functions]

    def _watched(self, function: RewardFunction) -> RewardFunction:
        name = name_of(function)

        @functools.wraps(function, updated=())
        def watched(prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
            values = values_of(function, prompts, completions, columns)
            self._scores[name] = values
            if set(self._scores) == set(self._names):
                self._decide(prompts, completions, columns)
            return values

        watched.__name__ = name
        return watched

    def _decide(self, prompts: Any, completions: Any, columns: dict[str, Any]) -> None:
        scores, self._scores = self._scores, {}
        texts = [plain_text(text, f"completion {at}") for at, text in enumerate(completions)]
        groups = [
            json.dumps(prompt, sort_keys=True, default=repr)
            if not isinstance(prompt, str)
            else prompt
            for prompt in prompts
        ]
        sampled = self._completions(texts, groups, columns.get("completion_ids"))
        totals = [health.mean(row) for row in zip(*scores.values(), strict=True)]
        capped = [completion.finish_reason == "length" for completion in sampled]
        facts = StepFacts(self._step, sampled, health.Step(scores, totals, groups, capped))
        findings = self._guard.inspect(facts)
        if findings:
            rewards = {
                name: tuple(Score(value, "from the trainer") for value in column)
                for name, column in scores.items()
            }
            self._stop(
                findings,
                (
                    StageRecord("completion", sampled, (), 0.0),
                    StageRecord("reward", rewards, (), 0.0),
                ),
            )

    def _completions(
        self, texts: list[str], groups: list[str], ids: Sequence[Sequence[int]] | None
    ) -> tuple[Completion, ...]:
        if ids is None:
            ids = [self._tokenizer(text)["input_ids"] for text in texts]
            ended = [True] * len(texts)  # unknown: do not count it as capped
        else:
            ended = [bool(row) and int(row[-1]) in self._eos for row in ids]
        return tuple(
            Completion(group, at, tuple(map(int, row)), text, "stop" if end else "length", ())
            for at, (group, row, text, end) in enumerate(
                zip(groups, ids, texts, ended, strict=True)
            )
        )

    def _stop(self, findings: Sequence[Finding], records: tuple[StageRecord[object], ...]) -> None:
        rank = distributed.get_rank() if _is_distributed() else 0
        name = f"step-{self._step:06d}" + (f"-rank{rank}" if rank else "")
        trace = Trace({"trainer": "transformers"}, records)
        folder = save_bundle(self._out / name, trace, self._step, findings)
        self.detach()
        raise GuardStop(self._step, findings, folder)


def _with_nonfinite_gradient(parameters: Sequence[Any]) -> list[Any]:
    """Only this process's shards are checked; one transfer from the device."""
    learning = [parameter for parameter in parameters if parameter.grad is not None]
    own = [getattr(p.grad, "to_local", lambda p=p: p.grad)() for p in learning]
    flags = [gradient.isfinite().all().to(own[0].device) for gradient in own]
    finite = torch.stack(flags).tolist() if flags else []
    return [parameter for parameter, fine in zip(learning, finite, strict=True) if not fine]


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _any_process(found: bool, device: torch.device) -> bool:
    """Whether any process found it: each sees only its shard of a gradient."""
    if not _is_distributed():
        return found
    flag = torch.tensor(int(found), device=device)
    distributed.all_reduce(flag, op=distributed.ReduceOp.MAX)
    return bool(flag)
