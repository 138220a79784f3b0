"""What the trainers that descend from TRL's ``GRPOTrainer`` have in common.

One method turns rows into completions and advantages, one scores tokens, one computes the loss.
Their inputs and outputs give the rows, the advantages and the loss, which no call of a model or
processor shows.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from omni_grpo_core.recorder.adapters.adapter import Adapter
from omni_grpo_core.recorder.hooks import Patches
from omni_grpo_core.recorder.step_buffer import StepBuffer
from omni_grpo_core.rewards.call import name_of
from omni_grpo_core.trace.calls import AdvantageSeen, LossSeen, RewardCall, SamplesSeen

SETTINGS = frozenset(
    {
        *("per_device_train_batch_size", "gradient_accumulation_steps"),
        *("generation_batch_size", "steps_per_generation", "num_generations", "num_iterations"),
        *("max_prompt_length", "max_completion_length", "temperature", "top_p", "top_k"),
        *("min_p", "repetition_penalty", "beta", "epsilon", "epsilon_high", "delta"),
        *("loss_type", "importance_sampling_level", "scale_rewards", "reward_weights"),
        *("mask_truncated_completions", "learning_rate", "lr_scheduler_type", "warmup_ratio"),
        *("max_grad_norm", "weight_decay", "bf16", "fp16", "seed", "gradient_checkpointing"),
        *("gradient_checkpointing_kwargs", "use_vllm", "max_steps", "num_train_epochs"),
    }
)
"""Trainer arguments that a step depends on."""


def settings_of(trainer: Any) -> dict[str, Any]:
    """The arguments in ``SETTINGS`` that this trainer has."""
    arguments = getattr(trainer, "args", None)
    return {name: getattr(arguments, name) for name in sorted(SETTINGS) if hasattr(arguments, name)}


class TrainerWatch:
    """Watches one trainer's own methods. ``stop`` is called when its ``train`` ends."""

    def __init__(
        self,
        trainer: Any,
        adapter: Adapter,
        buffer: StepBuffer,
        end: Callable[[BaseException | None], None],
    ) -> None:
        self._trainer, self._adapter, self._buffer, self._end = trainer, adapter, buffer, end
        self._scores: Tensor | None = None
        self._scored: Tensor | None = None
        parts = getattr(getattr(trainer, "args", None), "gradient_accumulation_steps", 1)
        # as many as a trainer buffers, to take up again in a later update
        self._made: deque[Mapping[str, Any]] = deque(maxlen=max(1, int(parts)))

    def start(self, patches: Patches) -> None:
        for name, around in (
            (self._adapter.rollout, self._rollout),
            (self._adapter.scores, self._score),
            (self._adapter.loss, self._loss),
            ("train", self._train),
        ):
            if hasattr(self._trainer, name):
                patches.set(self._trainer, name, _instead(getattr(self._trainer, name), around))

    def stop(self) -> None:
        self._scores = self._scored = None
        self._made.clear()

    def _train(self, call: Callable[..., Any], args: Any, keywords: Any) -> Any:
        error: BaseException | None = None
        try:
            return call(*args, **keywords)
        except BaseException as raised:
            error = raised
            raise
        finally:
            self._end(error)

    # ------------------------------------------------------------------ rows to advantages

    def _rollout(self, call: Callable[..., Any], args: Any, keywords: Any) -> Any:
        rows: Sequence[Any] = args[0] if args else next(iter(keywords.values()))
        groups: tuple[str, ...] = ()
        with self._buffer.guarded("rows"):
            size = max(1, int(getattr(self._trainer, "num_generations", 1)))
            groups = self._note_rows(rows, size)
        before = len(self._buffer.records)
        made = call(*args, **keywords)
        if isinstance(made, Mapping):
            self._made.append(made)
        with self._buffer.guarded("advantages"):
            called = [call for call, _ in self._buffer.records[before:]]
            rewards = [c for c in called if isinstance(c, RewardCall)]
            self._note_advantages(rewards, self._adapter.named(made, None), groups)
        return made

    def _note_rows(self, rows: Sequence[Any], size: int) -> tuple[str, ...]:
        """The rows' group ids, assigned by position as these trainers do: ``size`` rows each."""
        plain = [self._buffer.plain.mapping(row) for row in rows]
        groups = tuple(str(place // size) for place in range(len(plain)))
        repeated = all(row == plain[place - place % size] for place, row in enumerate(plain))
        step = size if repeated else 1
        self._buffer.add(SamplesSeen(tuple(plain[::step]), groups[::step]))
        return groups

    def _note_advantages(
        self, called: Sequence[RewardCall], made: Mapping[str, Any], groups: tuple[str, ...]
    ) -> None:
        weights = self._weights()
        partial = made.get(self._adapter.partial) or ()
        spans = {entry["name"]: entry["mask"] for entry in partial}
        added = {entry["name"]: entry["reward"] for entry in partial if "reward" in entry}
        values = [
            weights.get(call.name, 1.0)
            * torch.tensor([torch.nan if v is None else v for v in call.values])
            for call in called
            if call.name not in spans
        ]
        if not values or "advantages" not in made:
            return
        scale = str(getattr(getattr(self._trainer, "args", None), "scale_rewards", ""))
        seen = AdvantageSeen(
            rewards=torch.stack(values).nansum(0),
            group_ids=groups,
            advantages=made["advantages"],
            scale={"True": "group", "False": "none"}.get(scale, scale),
            weights=weights,
            spans=spans,
            partial=added,
        )
        self._buffer.add(self._buffer.own(seen))

    def _weights(self) -> dict[str, float]:
        functions = getattr(self._trainer, "reward_funcs", ())
        weights = getattr(self._trainer, "reward_weights", None)
        given = [1.0] * len(functions) if weights is None else [float(w) for w in weights]
        return {name_of(f): weight for f, weight in zip(functions, given, strict=True)}

    # ------------------------------------------------------------------ loss

    def _score(self, call: Callable[..., Any], args: Any, keywords: Any) -> Any:
        made = call(*args, **keywords)
        first = made[0] if isinstance(made, tuple) else made
        self._scores = first if isinstance(first, Tensor) else None
        ids = keywords.get("input_ids", args[1] if len(args) > 1 else None)
        self._scored = ids if isinstance(ids, Tensor) else None
        return made

    def _loss(self, call: Callable[..., Any], args: Any, keywords: Any) -> Any:
        self._scores = self._scored = None
        inputs = keywords.get("inputs", args[1] if len(args) > 1 else None)
        if not self._adapter.rollout:
            with self._buffer.guarded("rows"):
                self._note_rows(inputs, 1)
        made = call(*args, **keywords)
        with self._buffer.guarded("loss"):
            held = inputs if isinstance(inputs, Mapping) else self._rolled_out()
            loss = made[0] if isinstance(made, tuple) else made
            if held is not None and isinstance(loss, Tensor):
                self._note_loss(self._adapter.named(held, self._scores), loss)
        self._scores = self._scored = None
        return made

    def _rolled_out(self) -> Mapping[str, Any] | None:
        """Of a loss that takes rows, the rollout that it made, or took up again, and scored."""
        return next((made for made in self._made if self._scores_of(made)), None)

    def _scores_of(self, made: Mapping[str, Any]) -> bool:
        ids, scored = made.get("completion_ids"), self._scored
        if scored is None or not isinstance(ids, Tensor):
            return False
        return torch.equal(scored[:, -ids.shape[1] :], ids)

    def _note_loss(self, inputs: Mapping[str, Any], loss: Tensor) -> None:
        ids, scores = inputs.get("completion_ids"), inputs.get("logprobs")
        if self._adapter.whole and isinstance(ids, Tensor) and scores is not None:
            scores = scores[:, -ids.shape[1] :]
        seen = LossSeen(
            completion_ids=ids,
            mask=inputs.get("completion_mask"),
            logprobs=scores,
            old_logprobs=inputs.get("old_per_token_logps"),
            ref_logprobs=inputs.get("ref_per_token_logps"),
            advantages=inputs.get("advantages"),
            loss=float(loss.detach()),
            requires_grad=loss.requires_grad,
            settings=settings_of(self._trainer),
            metrics=self._metrics(),
        )
        self._buffer.add(self._buffer.own(seen))

    def _metrics(self) -> dict[str, float]:
        """The latest value of each list that these trainers average when logging."""
        logged = getattr(self._trainer, "_metrics", {})
        latest = logged.get("train", logged)
        return {
            name: float(values[-1])
            for name, values in latest.items()
            if isinstance(values, list) and values and isinstance(values[-1], int | float)
        }


def _instead(
    original: Callable[..., Any], around: Callable[[Callable[..., Any], Any, Any], Any]
) -> Callable[..., Any]:
    @functools.wraps(original)
    def instead(*args: Any, **keywords: Any) -> Any:
        return around(original, args, keywords)

    return instead
