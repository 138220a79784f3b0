"""Who watches our own rollouts and scoring forwards.

They call the text model and the head by themselves, so nothing that watches the model's
``generate`` and ``forward`` sees them; the plain ones and the fast ones report here instead.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Literal, ParamSpec, Protocol, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
Kind = Literal["rollout", "scoring"]


class Observer(Protocol):
    """Called when one begins, with its arguments by name; around it, and told what it returned."""

    def __call__(
        self, kind: Kind, given: Mapping[str, Any], /
    ) -> AbstractContextManager[Callable[[Any], None]]: ...


OBSERVERS: list[Observer] = []
SKIPS_DECODING = "omni_skips_decoding"
"""Attribute of a hook that need not be called for tokens decoded by a graph or compiled layers."""


def observed(kind: Kind) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A function whose calls the :data:`OBSERVERS` see."""

    def around(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def called(*args: P.args, **keywords: P.kwargs) -> R:
            if not OBSERVERS:
                return function(*args, **keywords)
            bound = signature.bind(*args, **keywords)
            bound.apply_defaults()
            with ExitStack() as stack:
                tell = [stack.enter_context(one(kind, bound.arguments)) for one in OBSERVERS]
                found = function(*args, **keywords)
                for one in tell:
                    one(found)
            return found

        return called

    return around
