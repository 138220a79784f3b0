"""Out of memory and lost processes, each as one message."""

from __future__ import annotations

from typing import Any

import torch

from omni_grpo_core.errors import ConfigError, OmniGrpoError, TrainError

GIB = 2**30
_NO_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory")
_LOST = ("connection closed by peer", "connection reset by peer", "remote process exited")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine ran out of memory, whatever the class of ``error``."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, (RuntimeError, OSError)) and any(words in text for words in _NO_MEMORY)
    )


def as_input_error(error: Exception, model: Any, optimizer: Any) -> OmniGrpoError | None:
    """The error to show instead of ``error``, ``None`` if it is of another kind.

    ``model``, ``optimizer``: ``None`` if not created yet.
    """
    text = " ".join(str(error).split())
    if is_out_of_memory(error):
        return ConfigError(
            "memory",
            got=f"{text[:300] or 'out of memory'} (in use, GiB: {held(model, optimizer)})",
            want="enough for the model, its optimizer and a step",
            fix="for sampling, lower batch_size or settings: max_new_tokens; for scoring, lower "
            "micro_batch_size or set gradient_checkpointing; for gradients and optimizer, use lora "
            "or freeze, or more processes with FSDP",
        )
    if isinstance(error, RuntimeError) and any(words in text.lower() for words in _LOST):
        return TrainError(
            "processes of the run",
            got=f"one that ended: {text[:200]}",
            want="all of them running until the end",
            fix="read the output of the others",
        )
    return None


def held(model: Any, optimizer: Any) -> str:
    """The memory a process uses for the run, by kind; ``else``: activations, caches and copies,
    known on CUDA only."""
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
    """Size of this process's shard."""
    own: Any = getattr(tensor, "to_local", lambda: tensor)()
    return int(own.numel() * own.element_size())
