"""What every watch of a trainer is built from: attributes replaced for a while, the arguments of a
call by name, and every warning."""

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
    """The value of each parameter in ``call(*args, **keywords)``, including those its ``**`` takes.

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
    """Replaced attributes; :meth:`undo` restores them, last first."""

    def __init__(self) -> None:
        self._undo: list[tuple[Any, str, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set ``owner.name``. An attribute ``owner`` only inherited is inherited again afterwards.

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
    """Set attributes of one object; on exit each is restored, an inherited one to being inherited.

    Raises ``AttributeError`` for a name that does not exist: a fault whose seam has gone must not
    pass as injected.

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


_OWN_LOGGER = "omni_grpo_core.recorder"


class WarningsWatch:
    """Copies every ``warnings`` warning, and every log record of level warning or above, to
    ``buffer`` and passes it on."""

    def __init__(self, buffer: StepBuffer) -> None:
        self._buffer = buffer

    def start(self, patches: Patches) -> None:
        buffer = self._buffer
        warn, handle = warnings.warn, logging.Logger.handle

        @functools.wraps(warn)
        def warned(
            message: Any, category: Any = None, stacklevel: int = 1, *args: Any, **keywords: Any
        ) -> None:
            with buffer.guarded("warnings"):
                buffer.warn(str(message))
            # one frame further up: filters and the once-registry go by the caller
            warn(message, category, stacklevel + 1, *args, **keywords)

        @functools.wraps(handle)
        def handled(logger: logging.Logger, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING and logger.name != _OWN_LOGGER:
                with buffer.guarded("warnings"):
                    buffer.warn(record.getMessage())
            handle(logger, record)

        patches.set(warnings, "warn", warned)
        patches.set(logging.Logger, "handle", handled)
        # added by transformers; its cache lets a message through once per process
        once = getattr(logging.Logger, "warning_once", None)
        if once is not None:

            @functools.wraps(once)
            def warned_once(logger: logging.Logger, *args: Any, **keywords: Any) -> None:
                with buffer.guarded("warnings"):
                    message, *rest = args
                    buffer.warn(str(message) % tuple(rest) if rest else str(message))
                once(logger, *args, **keywords)

            patches.set(logging.Logger, "warning_once", warned_once)

    def stop(self) -> None:
        """The patches hold everything to undo."""
