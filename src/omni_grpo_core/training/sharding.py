"""Weights sharded over processes (FSDP2), for forwards that do not go through the wrapper.

FSDP gathers a module's weights when the wrapped module's forward is called, on all processes at
once. Sampling, checks and the reference call parts of the model directly, and each process calls
them as often as its own completions are long. So all weights are gathered beforehand and stay
gathered until the end: nothing inside waits for another process. Without sharding, all of this is
a no-op.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from omni_grpo_core.errors import ConfigError
from omni_grpo_core.training.config import Precision


def mixed_precision(precision: Precision) -> MixedPrecisionPolicy:
    """What is gathered, in the precision of the run, and summed, in float32. What goes into a
    module and out of it keeps its dtype: that is autocast's part, as on one process."""
    return MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bfloat16" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )


def sharded(module: nn.Module) -> list[Any]:
    """The modules under ``module``, itself included, that FSDP2 has sharded."""
    return [inner for inner in module.modules() if isinstance(inner, FSDPModule)]


@contextmanager
def known_layers(text_model: Any) -> Iterator[None]:
    """Raises ``ConfigError`` if the launcher's file names a layer class that the model has not."""
    try:
        yield
    except ValueError as error:
        if "transformer layer class" not in str(error):
            raise
        raise ConfigError(
            "accelerate configuration",
            got=str(error),
            want="the class of the text model's layers",
            fix=f"set fsdp_transformer_layer_cls_to_wrap: {type(text_model.layers[0]).__name__}",
        ) from error


def initialise_root(root: nn.Module) -> None:
    """Make ``root`` the root of its sharded modules, as its first forward would.

    Otherwise the first forward of an inner module makes *that* one a root, and the next forward of
    the true root fails. Raises ``ConfigError`` if modules inside a tower are wrapped: a process
    without a clip in its micro-batch would never gather them, and the others would wait for it.
    """
    wrapped = [name for name, module in root.named_modules() if isinstance(module, FSDPModule)]
    inside = [name for name in wrapped if "visual." in name or "audio_tower." in name]
    if inside:
        raise ConfigError(
            "accelerate configuration",
            got=f"FSDP around {inside[0]}",
            want="FSDP around no more than the layers of the text model",
            fix="set fsdp_transformer_layer_cls_to_wrap to the text decoder layer, or use NO_WRAP",
        )
    if wrapped:
        state: Any = root
        state._get_fsdp_state()._lazy_init()


def zero_of_weights(root: nn.Module) -> Tensor | float:
    """0, with a gradient of 0 for every weight that ``root`` gathers itself: for use in its
    forward.

    FSDP reduces all existing gradients at once: a process without sound in its micro-batch would
    have fewer than the others. Layers of the text model, gathered by themselves, have theirs in
    every micro-batch, and the zeros would be as large as all of them.
    """
    modules = sharded(root)
    if not modules:
        return 0.0
    inner = {id(weight) for m in modules if m is not root for weight in m.parameters()}
    weights = [p for p in root.parameters() if p.requires_grad and id(p) not in inner]
    if not weights:
        return 0.0
    return torch.stack([weight.reshape(-1)[0].float() for weight in weights]).sum() * 0.0


@contextmanager
def gathered(root: nn.Module, *, keep: bool = False) -> Iterator[None]:
    """All weights gathered on every process, with no collective inside. Every process has to enter
    and leave.

    ``keep``: they stay whole, until a backward pass or :func:`reshard`. Meanwhile ``parameters()``
    has the gathered tensors, and the optimizer the shards: nothing may change or save either.
    """
    modules = sharded(root)
    # within another one, what that has gathered is its own to give back
    found = any(isinstance(weight, DTensor) for weight in root.parameters())
    hooks: list[tuple[Any, Any]] = []
    for module in modules:
        module.unshard()
        # they would reshard, and a graph that is compiled or captured cannot have them
        state = module._get_fsdp_state()
        for all_, handle in (
            (module._forward_pre_hooks, state._pre_forward_hook_handle),
            (module._forward_hooks, state._post_forward_hook_handle),
        ):
            hooks.append((all_, all_.copy()))
            all_.pop(handle.id)
    try:
        yield
    finally:
        for all_, before in hooks:
            all_.clear()
            all_.update(before)
        if found and not keep:
            reshard(root)


def reshard(root: nn.Module) -> None:
    """Give back what :func:`gathered` has kept."""
    for module in sharded(root):
        module.reshard()


@contextmanager
def whole_after_backward(root: Any) -> Iterator[None]:
    """Weights that are whole stay so after a backward pass, for that of another micro-batch."""
    root.set_reshard_after_backward(False)
    try:
        yield
    finally:
        root.set_reshard_after_backward(True)


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, of which this process may hold a shard; every process has to call it."""
    full: Any = getattr(tensor, "full_tensor", None)
    result: Tensor = tensor if full is None else full()
    return result.detach()
