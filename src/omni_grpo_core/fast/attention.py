"""The text model with an attention of ours: registered with transformers, switched on for a while.

transformers (from 4.57 on) looks the function up by a name in the text model's config at every
layer's call, and passes on keywords that it does not know. So the layout of a packed row is a
keyword of the text model's forward, the state of a decoding an attribute of each layer's attention,
and no layer is rewritten.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor

from omni_grpo_core.fast.layout import PackedRow
from omni_grpo_core.fast.prefix import LayerPrefix, SharedPrefix, prefix_attention
from omni_grpo_core.fast.segments import FLASH_DTYPES, packed_attention

PACKED = "omni_grpo_packed"
"""Name of the attention over a packed row; the keyword is ``packed_row``."""
PREFIX = "omni_grpo_prefix"
"""Name of the attention of one more token over a shared prompt, in :func:`decoding`."""
WINDOWS = "omni_grpo_flash_windows"
"""Name of the towers' attention. With "flash" in it transformers hands over all windows of a clip
in one call, and their bounds."""

_RUNS_AGAIN = ("_gradient_checkpointing_func", "checkpoint_fn")
"""Attributes of a layer that transformers checkpoints, and of torch's wrapper around one: called
with what is to be run, and with its arguments."""


def takes_functions(text_model: Any) -> bool:
    """Whether its layers look their attention function up. 4.52 has the register, but its omni
    models have a class for each implementation, which never read it."""
    return bool(getattr(text_model, "_supports_attention_backend", False))


def _packed(
    module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Any,
    *, scaling: float, packed_row: PackedRow, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    query, key, value = (one[0].transpose(0, 1) for one in _lowered(query, key, value))
    return packed_attention(query, key, value, packed_row, scaling)[None], None


def _prefix(
    module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Any, *, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    query, key, value = _lowered(query, key, value)
    own: LayerPrefix = module.omni_prefix
    return prefix_attention(query, key, value, own, scaling), None


def _windows(
    module: Any, query: Tensor, key: Tensor, value: Tensor,
    *, scaling: float, cu_seq_lens_q: Tensor, max_length_q: int, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    query, key, value = (one[0].transpose(0, 1) for one in _lowered(query, key, value))
    bounds, longest = cu_seq_lens_q.to(torch.int32), int(max_length_q)
    out, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, bounds, bounds, longest, longest, 0.0, False, False, scale=scaling
    )
    return out[None], None


def _lowered(*tensors: Tensor) -> Iterator[Tensor]:
    """Under autocast in its precision, as torch's own attention takes them: rotary embeddings leave
    queries and keys in float32 there."""
    kind = tensors[0].device.type
    dtype = tensors[-1].dtype
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    return (tensor.to(dtype) for tensor in tensors)


if hasattr(transformers, "AttentionInterface"):
    transformers.AttentionInterface.register(PACKED, _packed)
    transformers.AttentionInterface.register(PREFIX, _prefix)
    transformers.AttentionInterface.register(WINDOWS, _windows)


@contextmanager
def windows(model: Any) -> Iterator[None]:
    """The towers take all windows of a clip in one call, without gradients; where the kernel does
    not fit, a call for each, as transformers does it."""
    fits = model.device.type == "cuda" and model.dtype in FLASH_DTYPES
    with ExitStack() as stack:
        for name in ("visual", "audio_tower"):
            if fits and hasattr(model, name):
                stack.enter_context(_named(getattr(model, name).config, WINDOWS))
        yield


@contextmanager
def decoding(text_model: Any, prefix: SharedPrefix) -> Iterator[None]:
    """The text model's layers take one more token of every row, over ``prefix``. It is handed over
    as an attribute of each layer's attention, so that a layer compiled once serves for all."""
    modules = [layer.self_attn for layer in text_model.layers]
    for module, own in zip(modules, prefix.layers, strict=True):
        module.omni_prefix = own
    try:
        with attention(text_model, PREFIX):
            yield
    finally:
        for module in modules:
            del module.omni_prefix


def poison(like: Tensor) -> Tensor:
    """A mask that our functions ignore and with which any other attention gives NaN: a layer that
    were run without ours would else attend causally over the whole row, and nothing would show."""
    return torch.full((1, 1, 1, 1), torch.nan, dtype=like.dtype, device=like.device)


@contextmanager
def attention(text_model: Any, name: str) -> Iterator[None]:
    """The text model's layers call the function of this name; also when gradient checkpointing runs
    them again in a backward pass that begins after the end of this context."""
    running = [
        (module, attribute, getattr(module, attribute))
        for module in text_model.modules()
        for attribute in _RUNS_AGAIN
        if hasattr(module, attribute)
    ]

    def again(run: Any, layer: Any, *given: Any, **rest: Any) -> Any:
        def named(*given: Any, **rest: Any) -> Any:
            with _named(text_model.config, name):
                return layer(*given, **rest)

        return run(named, *given, **rest)

    for module, attribute, run in running:
        setattr(module, attribute, partial(again, run))
    try:
        with _named(text_model.config, name):
            yield
    finally:
        for module, attribute, run in running:
            setattr(module, attribute, run)


@contextmanager
def _named(config: Any, name: str) -> Iterator[None]:
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before
