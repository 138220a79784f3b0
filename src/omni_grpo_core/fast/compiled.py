"""What a CUDA device's own compilers make of decoding: layers whose small kernels are joined by
``torch.compile``, and attention by :mod:`~omni_grpo_core.fast.prefix_kernels`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from omni_grpo_core.core.observers import SKIPS_DECODING
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.errors import one_line
from omni_grpo_core.fast.attention import decoding
from omni_grpo_core.fast.prefix import SharedPrefix


class Compiled:
    """The text model's layers, compiled at first use: one graph that all of them share, compiled
    anew for another number of rows. They compute the same without it, more slowly; so where a
    compiler fails or is not there, they do.

    ``usable``: by default on a CUDA device with Triton. ``kernel``: attention too. ``backend``: of
    ``torch.compile``.
    """

    def __init__(
        self,
        policy: Policy,
        usable: bool | None = None,
        *,
        kernel: bool = True,
        backend: Any = None,
    ) -> None:
        self._policy, self._kernel = policy, kernel
        self._usable = _compilable(policy) if usable is None else usable
        self._layers = list(policy.text_model.layers)
        # rounded where the layers of scoring are: else logprobs of both would differ by more
        options = None if backend else {"emulate_precision_casts": True}
        compiled = partial(
            torch.compile, fullgraph=True, backend=backend or "inductor", options=options
        )
        self._calls = [compiled(layer._call_impl) for layer in self._layers]

    @property
    def usable(self) -> bool:
        """Not while something watches the model: a hook needs what a compiled layer never has."""
        return self._usable and not watched(self._policy)

    @contextmanager
    def decoding(self, prefix: SharedPrefix) -> Iterator[None]:
        """The text model takes one more token of every row, over ``prefix``."""
        usable = self.usable
        if usable and self._kernel:
            prefix = prefix.with_kernel()
        for layer in prefix.layers if usable else ():
            torch._dynamo.maybe_mark_dynamic(layer.prompt_keys, 2)
            torch._dynamo.maybe_mark_dynamic(layer.prompt_values, 2)
            if layer.seen is not None:
                torch._dynamo.maybe_mark_dynamic(layer.seen, 3)
        own = [module._compiled_call_impl for module in self._layers]
        with decoding(self._policy.text_model, prefix):
            for module, call in zip(self._layers, self._calls, strict=True):
                module._compiled_call_impl = call if usable else None
            try:
                yield
            finally:
                for module, call in zip(self._layers, own, strict=True):
                    module._compiled_call_impl = call

    def proven(self, prefix: SharedPrefix, advance: Callable[[], None]) -> bool:
        """Whether ``advance`` was made with what is compiled. Warns if it fails, and never tries it
        again: a layer writes its token's key and value, which the next try writes again."""
        if not self.usable:
            return False
        try:
            # compilers warn of what they might do better
            with warnings.catch_warnings(action="ignore"), self.decoding(prefix):
                advance()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self._usable = False
            warnings.warn(
                f"tokens are decoded without compiled layers: {one_line(error)}", stacklevel=4
            )
        return self._usable


def watched(policy: Policy) -> bool:
    """Whether anything is called with what passes through a part of the decoding. Gradient
    checkpointing leaves a hook on the embedding, which does nothing here."""
    embedding = policy.model.get_input_embeddings()
    modules = (*policy.text_model.modules(), *policy.model.lm_head.modules())
    hooks = [_global_forward_hooks, _global_forward_pre_hooks]
    for module in modules:
        if module is not embedding:
            hooks += [module._forward_hooks, module._forward_pre_hooks]
    return any(not getattr(hook, SKIPS_DECODING, False) for one in hooks for hook in one.values())


def _compilable(policy: Policy) -> bool:
    size = policy.text_model.layers[0].self_attn.head_dim
    power_of_two = size >= 16 and size & (size - 1) == 0
    return policy.device.type == "cuda" and find_spec("triton") is not None and power_of_two
