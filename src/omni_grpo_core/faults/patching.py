"""Attributes replaced for a while: how a fault gets in, and out again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_ABSENT = object()


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
    before = {}
    for name in values:
        getattr(owner, name)
        before[name] = vars(owner).get(name, _ABSENT)
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            if value is not _ABSENT:
                setattr(owner, name, value)
            elif name in vars(owner):
                delattr(owner, name)
