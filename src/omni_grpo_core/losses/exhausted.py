"""Memory that runs out and processes that are gone, as one message."""

from __future__ import annotations

from typing import Any

import torch

from omni_grpo_core.errors import ConfigError, OmniGrpoError, TrainError

GIB = 2**30
_NO_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory")
_GONE = ("connection closed by peer", "connection reset by peer", "remote process exited")


def is_out_of_memory(error: BaseException) -> bool:
    """Of a device or of the machine, whichever class it comes as."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, (RuntimeError, OSError)) and any(words in said for words in _NO_MEMORY)
    )


def as_input_error(error: Exception, model: Any, optimizer: Any) -> OmniGrpoError | None:
    """The error to show in the place of ``error``, ``None`` where it is of another kind.

    ``model``, ``optimizer``: ``None`` where there was none yet.
    """
    said = " ".join(str(error).split())
    if is_out_of_memory(error):
        return ConfigError(
            "memory",
            got=f"{said[:300] or 'no more of it'} (held, GiB: {held(model, optimizer)})",
            want="enough for the model, its optimizer and a step",
            fix="while sampling lower batch_size or settings: max_new_tokens; while scoring lower "
            "micro_batch_size or set gradient_checkpointing; for gradients and optimizer use lora "
            "or freeze, or more processes with FSDP",
        )
    if isinstance(error, RuntimeError) and any(words in said.lower() for words in _GONE):
        return TrainError(
            "processes of the run",
            got=f"one that ended: {said[:200]}",
            want="all of them until the end",
            fix="see what the others said",
        )
    return None


def held(model: Any, optimizer: Any) -> str:
    """What a process holds for the run, by kind; ``else``: activations, caches and copies, which
    are known of CUDA only."""
    parameters = [] if model is None else list(model.parameters())
    states = [] if optimizer is None else list(optimizer.state.values())
    kinds = {
        "weights": parameters,
        "gradients": [p.grad for p in parameters if p.grad is not None],
        "optimizer": [v for s in states for v in s.values() if isinstance(v, torch.Tensor)],
    }
    sizes = {kind: sum(map(_bytes, tensors)) for kind, tensors in kinds.items()}
    if torch.cuda.is_available():
        sizes["else"] = max(0, torch.cuda.memory_allocated() - sum(sizes.values()))
    return ", ".join(f"{kind} {size / GIB:.3g}" for kind, size in sizes.items())


def _bytes(tensor: torch.Tensor) -> int:
    """Of this process's part of it."""
    own: Any = getattr(tensor, "to_local", lambda: tensor)()
    return int(own.numel() * own.element_size())
