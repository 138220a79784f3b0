"""Who samples a training run's completions: the policy itself, or an engine beside it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from omni_grpo_core.core.batch import placeholder_ids
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.engines.ids import compare_ids
from omni_grpo_core.engines.proof import Proof, prove
from omni_grpo_core.engines.requests import (
    Backend,
    EngineLost,
    as_rollout,
    make_requests,
    sampling_of,
)
from omni_grpo_core.engines.sides import Sides
from omni_grpo_core.engines.weights import Adapter, write_adapter, write_checkpoint
from omni_grpo_core.errors import BatchError, CheckpointError
from omni_grpo_core.pipeline.inputs import Inputs
from omni_grpo_core.pipeline.settings import Settings
from omni_grpo_core.tolerances import Limit
from omni_grpo_core.types import Batch, Rollout

T = TypeVar("T")


class RolloutEngine(Protocol):
    """Samples completions of prepared rows: same batch in, same kind of rollout out."""

    def push(self) -> None:
        """Take over the policy's weights as they are now."""

    def prove(self, inputs: Inputs, step: int, seed: int) -> Proof | None:
        """Compare engine and policy, where it is due; ``None``: not now, or nothing to compare."""

    def rollout(
        self,
        inputs: Inputs,
        *,
        group_size: int,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        first: int = 0,
    ) -> Rollout:
        """As :func:`omni_grpo_core.core.rollout.rollout`."""

    def close(self) -> None:
        """End what was started."""


class OwnEngine:
    """transformers': the policy samples by itself. ``sample``: the plain or the fast rollout."""

    def __init__(self, sample: Callable[..., Rollout]) -> None:
        self._sample = sample

    def push(self) -> None:
        """The weights are the same ones."""

    def prove(self, inputs: Inputs, step: int, seed: int) -> Proof | None:
        return None

    def rollout(self, inputs: Inputs, **settings: Any) -> Rollout:
        batch: Batch = inputs.batch
        return self._sample(batch, **settings)

    def close(self) -> None:
        """Nothing was started."""


class SeparateEngine:
    """An engine with weights of its own.

    ``weights``: the policy's as they are now, by plain names; adapters merged, or sent by
    themselves, as ``adapter``: then all else is sent once. ``every``: steps between two proofs.
    ``lane``: how far logprobs may be apart. ``others``: see
    :class:`~omni_grpo_core.engines.sides.Sides`. A call that fails because the engine is lost is
    made once more after a restart: a rollout depends on weights, rows and seed alone, so the run
    goes on as if nothing had happened.
    """

    def __init__(
        self,
        policy: Policy,
        backend: Backend,
        settings: Settings,
        lane: Limit,
        weights: Callable[[], Mapping[str, Any]],
        *,
        adapter: Adapter | None = None,
        processor: Path | None = None,
        every: int = 50,
        others: Mapping[str, Callable[[], AbstractContextManager[Any]]] | None = None,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._policy, self._backend, self._weights = policy, backend, weights
        self._adapter, self._processor = adapter, processor
        self._every, self._warn = every, warn
        self._sides = Sides(policy, backend, settings, lane, others or {})
        self._place = tempfile.TemporaryDirectory(prefix="omni-grpo-weights-")
        self._sent: list[Path] = []
        self._written, self._proved = "", set[str]()

    def push(self) -> None:
        """Write the weights, have them read, and compare fingerprints.

        Raises ``CheckpointError`` if the engine did not read what was written, ``EngineLost``.
        """
        checkpoint, adapter = (Path(self._place.name) / name for name in ("checkpoint", "adapter"))
        self._again(self._backend.wake)
        if self._adapter is None or not self._sent:
            weights = self._weights()
            written = write_checkpoint(self._policy, weights, checkpoint, processor=self._processor)
            self._send(checkpoint, written)
        if self._adapter is not None:
            self._send(adapter, write_adapter(self._adapter, adapter))

    def _send(self, folder: Path, written: str) -> None:
        self._written = written
        read = self._again(lambda: self._backend.load(folder))
        if folder not in self._sent:
            self._sent.append(folder)
        if read != written:
            raise CheckpointError(
                self._backend.name,
                got=f"weights with the fingerprint {read[:12]} in the engine",
                want=f"the trainer's, {written[:12]}: others would sample another policy",
                fix="look at what keeps the engine from loading: stale weights are never sampled "
                "from",
            )

    def prove(self, inputs: Inputs, step: int, seed: int) -> Proof | None:
        """Before the first step of a run, also of a resumed one, again with the first weights that
        learned something, and every so many: before that an engine that keeps the checkpoint's
        weights, or leaves out an adapter that is still 0, samples as it should."""
        known = self._written in self._proved or len(self._proved) > 1
        if known and step % self._every:
            return None
        proof = self._again(lambda: prove(self._sides, inputs, seed))
        self._proved.add(self._written)
        return proof

    def rollout(
        self,
        inputs: Inputs,
        *,
        group_size: int,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        first: int = 0,
    ) -> Rollout:
        """Raises ``EngineLost`` if the engine fails twice, ``BatchError`` if it read other ids than
        the batch's: a proof takes some rows, this is about each. ``first`` is 0: the engine serves
        one process, which samples whole groups."""
        sampling = sampling_of(self._policy, group_size, max_new_tokens, temperature)
        requests = make_requests(inputs, seed)
        answers = self._again(lambda: self._backend.generate(requests, sampling))
        self._backend.sleep()
        read = [answer.prompt_ids for answer in answers]
        wrong = compare_ids(inputs.batch.rows, read, placeholder_ids(self._policy.processor))
        if wrong:
            raise BatchError(
                self._backend.name,
                got=wrong[0].detail,
                want=wrong[0].name,
                fix="leave the row out, or set rollout: own",
            )
        return as_rollout(self._policy, inputs, answers, sampling, seed)

    def close(self) -> None:
        self._backend.close()
        self._place.cleanup()

    def _again(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except EngineLost as lost:
            self._warn(f"the rollout engine is started again: {lost}")
            self._backend.restart()
            for folder in self._sent:
                self._backend.load(folder)
            return call()
