"""Names that changed between versions of transformers.

Found by what is there, never by the version: a third-party model may use older names than the
installed library.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

CACHE = ("cache", "past_key_values")
"""A forward's key-value cache, newest name first: ``cache`` from 5.24 on, which accepts the old
name with a FutureWarning until 5.40."""

_INPUT_HOOKS = ("_require_grads_hook", "_require_grads_hooks")
"""Where a model keeps the hooks that make its inputs require gradients; the second from 5.x on."""


def cache_keyword(model: Any) -> str:
    """What the forward of ``model`` calls its key-value cache."""
    return _cache_keyword(type(model).forward)


@cache
def _cache_keyword(forward: Callable[..., Any]) -> str:
    taken = inspect.signature(forward).parameters
    return next((name for name in CACHE if name in taken), CACHE[-1])


def cache_among(given: Mapping[str, Any]) -> Any:
    """The key-value cache in a forward's arguments or output; ``None`` if it is under neither name.

    >>> cache_among({"past_key_values": "held"}), cache_among({"cache": None})
    ('held', None)
    """
    # an output's own lookup by the old name warns; its items are what it really has
    held = dict(given.items())
    return next((held[name] for name in CACHE if held.get(name) is not None), None)


def tokens_cached(given: Mapping[str, Any]) -> Any:
    """How many tokens the cache in a forward's arguments holds, a number or a one-element tensor: 0
    if it was passed as None. ``None``: unknown, because neither name is an argument or the cache
    has no length.

    >>> tokens_cached({"cache": None}), tokens_cached({"input_ids": [1]}) is None
    (0, True)
    """
    if not any(name in given for name in CACHE):
        return None
    held = cache_among(given)
    return 0 if held is None else length_of(held)


def length_of(cache: Any) -> Any:
    """Tokens in a key-value cache, a number or a one-element tensor; ``None``: it has no length."""
    length = getattr(cache, "get_seq_length", None)
    return None if length is None else length()


def switch_checkpointing(model: Any, on: bool, *, reentrant: bool = False) -> None:
    """Turn gradient checkpointing on or off: ``activation_checkpointing_…`` from 5.23 on, which
    keeps ``gradient_checkpointing_…`` with a FutureWarning until 6.

    Only reentrant checkpointing needs inputs that require gradients. From 5.x on each switch hooks
    them, of the towers too, and leaves the hooks of the switch before: a call for every
    micro-batch so far, and a graph through towers that are frozen.
    """
    verb = "enable" if on else "disable"
    names = (f"activation_checkpointing_{verb}", f"gradient_checkpointing_{verb}")
    switch = next(getattr(model, name) for name in names if hasattr(model, name))
    if not on or reentrant:
        switch(*([{"use_reentrant": reentrant}] if on else []))
        return
    own = {name: vars(model).pop(name) for name in _INPUT_HOOKS if name in vars(model)}
    switch({"use_reentrant": False})
    if hasattr(model, _INPUT_HOOKS[0]):
        model.disable_input_require_grads()
    for name in _INPUT_HOOKS:
        vars(model).pop(name, None)
    vars(model).update(own)


@contextmanager
def modes_restored(model: torch.nn.Module) -> Iterator[None]:
    """On exit, even after an error, restores every module's train or eval mode and gradient
    checkpointing, with the function that does it."""
    names = ("training", "gradient_checkpointing", "_gradient_checkpointing_func")
    modes = [(vars(m), {n: vars(m)[n] for n in names if n in vars(m)}) for m in model.modules()]
    try:
        yield
    finally:
        for now, before in modes:
            for name in names:
                now.pop(name, None)
            now.update(before)
