"""The stages of a run: the memory that each takes, and one message if there is not enough, or if
another process ended."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from omni_grpo_core.errors import ConfigError, OmniGrpoError, TrainError, one_line
from omni_grpo_core.io import is_out_of_memory
from omni_grpo_core.training.liveness import Liveness

GIB = 2**30
NOTICED = 1.0
"""Seconds in which the end of another process is noticed: a collective may fail before that."""

Stage = Literal[
    "loading", "checking", "sampling", "reference", "update", "optimizer", "evaluation", "saving"
]
_SMALLER_WEIGHTS = "use lora, freeze, trained_weights bfloat16_stochastic, or FSDP on more devices"
_SMALLER_ROLLOUT = "lower batch_size (all its completions are sampled at once), or settings: "
_SHORTER = "max_new_tokens or media: max_frames and max_pixels"
_SMALLER_SCORING = "lower micro_batch_size or settings: max_new_tokens, set gradient_checkpointing"
_FIX: Mapping[Stage, str] = {
    "loading": _SMALLER_WEIGHTS,
    "checking": f"lower settings: {_SHORTER}, or set guard: preflight: false",
    "sampling": f"{_SMALLER_ROLLOUT}{_SHORTER}",
    "reference": f"{_SMALLER_SCORING}, use lora, or loss: beta 0",
    "update": f"{_SMALLER_SCORING} or fast: on; for gradients offload_gradients, or "
    f"{_SMALLER_WEIGHTS}",
    "optimizer": f"set offload_gradients, {_SMALLER_WEIGHTS}; or optimizer: name: adamw_8bit",
    "evaluation": f"lower settings: {_SHORTER}, or remove eval_every",
    "saving": "free memory of the machine, through which weights go to the disk",
}
_ELSE: Mapping[Stage, str] = {"sampling": "cache and activations", "evaluation": "cache"}
"""What a device holds besides weights, gradients and optimizer; elsewhere activations."""


@dataclass(slots=True, eq=False)
class Watch:
    """Called at each stage of a run. ``model``, ``optimizer``: ``None`` until they exist.
    ``others``: the other processes, if there are any.
    ``peaks``: the most bytes that each stage of a step held on a CUDA device; ``seconds``: how long
    each took there."""

    model: Any = None
    optimizer: Any = None
    others: Liveness | None = None
    peaks: dict[Stage, int] = field(default_factory=dict)
    seconds: dict[Stage, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: Stage) -> Iterator[None]:
        """Raises ``ConfigError`` in place of an error of any class for lack of memory."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        try:
            yield
        except (RuntimeError, MemoryError, OSError) as error:
            if not is_out_of_memory(error):
                raise
            raise self.exhausted(error, stage) from error
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self.peaks[stage] = max(self.peaks.get(stage, 0), torch.cuda.max_memory_allocated())
            spent = time.perf_counter() - begin
            self.seconds[stage] = self.seconds.get(stage, 0.0) + spent

    def step_costs(self) -> dict[str, float]:
        """GiB and seconds of each stage since the last call, for the log; empty without a CUDA
        device."""
        found = {f"memory/{stage}": size / GIB for stage, size in self.peaks.items()}
        found |= {f"seconds/{stage}": spent for stage, spent in self.seconds.items()}
        self.peaks.clear()
        self.seconds.clear()
        return found

    def exhausted(self, error: Exception, stage: Stage | None = None) -> ConfigError:
        text = one_line(error) or "out of memory"
        parts = held(self.model, self.optimizer, _ELSE.get(stage, "activations") if stage else None)
        return ConfigError(
            f"memory, {stage}" if stage else "memory",
            got=f"{text} (in use, GiB: {parts})",
            want="enough for the model, its optimizer and a step",
            fix=_FIX[stage] if stage else _FIX["update"],
        )

    def explain(self, error: Exception) -> OmniGrpoError | None:
        """The error to show for one outside the stages, ``None`` if it is of another kind."""
        if is_out_of_memory(error):
            return self.exhausted(error)
        if self.others and (lost := self.others.lost(NOTICED)):
            return lost
        if "does not have a deterministic implementation" in str(error):
            return ConfigError(
                "full_determinism",
                got=str(error).partition(",")[0],
                want="operations that have one",
                fix="set full_determinism: false, or freeze the tower that needs it",
            )
        if not isinstance(error, torch.distributed.DistError):
            return None
        return TrainError(
            "processes of the run",
            got=" ".join(str(error).split())[-300:],
            want="a connection between all of them",
            fix="run it again with NCCL_DEBUG=INFO, which prints what failed",
        )


def held(model: Any, optimizer: Any, rest: str | None = None) -> str:
    """The memory a process uses for the run, by kind; ``rest``: what all else is called, known on
    CUDA only."""
    parameters = [] if model is None else list(model.parameters())
    states = [] if optimizer is None else list(optimizer.state.values())
    kinds = {
        "weights": parameters,
        "gradients": [p.grad for p in parameters if p.grad is not None],
        "optimizer": [v for s in states for v in s.values() if isinstance(v, torch.Tensor)],
    }
    sizes = {kind: sum(map(bytes_of, tensors)) for kind, tensors in kinds.items()}
    if torch.cuda.is_available():
        sizes[rest or "else"] = max(0, torch.cuda.memory_allocated() - sum(sizes.values()))
    return ", ".join(f"{kind} {size / GIB:.3g}" for kind, size in sizes.items())


def bytes_of(tensor: torch.Tensor) -> int:
    """Size of this process's shard; of eight-bit moments, which are several tensors, theirs."""
    own: Any = getattr(tensor, "to_local", lambda: tensor)()
    if hasattr(own, "__tensor_flatten__"):
        return sum(bytes_of(getattr(own, name)) for name in own.__tensor_flatten__()[0])
    return int(own.numel() * own.element_size())
