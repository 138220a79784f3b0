"""What every watch of a foreign trainer goes by: attributes replaced for a while, the arguments of
a call by name, and all that is warned of."""

from __future__ import annotations

import functools
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from omni_grpo_core.recorder.step_buffer import StepBuffer


def arguments(
    call: Callable[..., Any], args: Sequence[Any], keywords: Mapping[str, Any]
) -> dict[str, Any]:
    """What ``call(*args, **keywords)`` gives each parameter, what its ``**`` takes among them.

    Raises ``TypeError`` where the call itself would.

    >>> def f(a, b=2, **rest): ...
    >>> arguments(f, (1,), {"c": 3})
    {'a': 1, 'c': 3}
    """
    signature = inspect.signature(call)
    found = dict(signature.bind(*args, **keywords).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            found |= found.pop(name, {})
    return found


_ABSENT = object()


class Patches:
    """Replaced attributes; :meth:`undo` restores them, the last first."""

    def __init__(self) -> None:
        self._undo: list[tuple[Any, str, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set ``owner.name``. What ``owner`` only inherited is inherited again afterwards.

        >>> patches = Patches()
        >>> class Base: greet = "hello"
        >>> class Child(Base): pass
        >>> patches.set(Child, "greet", "hi"); Child.greet
        'hi'
        >>> patches.undo(); Child.greet, "greet" in vars(Child)
        ('hello', False)
        """
        self._undo.append((owner, name, vars(owner).get(name, _ABSENT)))
        setattr(owner, name, value)

    def undo(self) -> None:
        while self._undo:
            owner, name, before = self._undo.pop()
            if before is not _ABSENT:
                setattr(owner, name, before)
            elif name in vars(owner):
                delattr(owner, name)


@contextmanager
def patched(owner: Any, **values: Any) -> Iterator[None]:
    """Set attributes of one object; on the way out each is as it was, an inherited one inherited.

    Raises ``AttributeError`` for a name that is not there: a fault whose seam has gone must not
    pass for an injected one.

    >>> class Trainer: steps = 1
    >>> trainer = Trainer()
    >>> with patched(trainer, steps=2): trainer.steps
    2
    >>> trainer.steps, vars(trainer)
    (1, {})
    """
    for name in values:
        getattr(owner, name)
    patches = Patches()
    try:
        for name, value in values.items():
            patches.set(owner, name, value)
        yield
    finally:
        patches.undo()


_OURS = "omni_grpo_core.recorder"


class WarningsWatch:
    """Whatever is warned of by ``warnings``, or logged as a warning or worse, goes to ``buffer``
    and then its usual way."""

    def __init__(self, buffer: StepBuffer) -> None:
        self._buffer = buffer

    def start(self, patches: Patches) -> None:
        buffer = self._buffer
        warn, handle = warnings.warn, logging.Logger.handle

        @functools.wraps(warn)
        def warned(
            message: Any, category: Any = None, stacklevel: int = 1, *args: Any, **keywords: Any
        ) -> None:
            with buffer.looking("warnings"):
                buffer.warn(str(message))
            # one frame further up: the warner, whom filters and the once-registry go by
            warn(message, category, stacklevel + 1, *args, **keywords)

        @functools.wraps(handle)
        def handled(logger: logging.Logger, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING and logger.name != _OURS:
                with buffer.looking("warnings"):
                    buffer.warn(record.getMessage())
            handle(logger, record)

        patches.set(warnings, "warn", warned)
        patches.set(logging.Logger, "handle", handled)
        # transformers' own addition; its cache lets a message through once a process
        once = getattr(logging.Logger, "warning_once", None)
        if once is not None:

            @functools.wraps(once)
            def warned_once(logger: logging.Logger, *args: Any, **keywords: Any) -> None:
                with buffer.looking("warnings"):
                    message, *rest = args
                    buffer.warn(str(message) % tuple(rest) if rest else str(message))
                once(logger, *args, **keywords)

            patches.set(logging.Logger, "warning_once", warned_once)

    def stop(self) -> None:
        """Everything is in the patches."""
