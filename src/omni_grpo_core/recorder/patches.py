"""Replacing an attribute for a while and putting back exactly what was there."""

from __future__ import annotations

from typing import Any

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
            if before is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, before)
