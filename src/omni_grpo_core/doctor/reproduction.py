"""What a reproduction is, and how a changed value is compared with the recorded one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

Alike = Callable[[Tensor, Tensor], bool]
"""Whether two arrays of one shape are the same up to what two sound runs differ by."""
_PROBES = 512
"""Elements compared before all of them are."""
_BETTER = 0.5
"""Of the distance from the right value: within a limit a fitted factor of 1.0001 explains noise a
little better than none does."""


@dataclass(frozen=True, slots=True)
class Reproduction:
    """``name``: of the change (``"reversed"``). ``sentence``: it with its number, to follow "is
    the reference" (``"in reverse order"``, ``"times 2"``). ``values``: its parameters."""

    name: str
    sentence: str
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """The right value and the recorded one. ``alike`` compares a change with the latter; ``limit``
    is its relative limit, 0 where it demands equality or is not a number."""

    want: Tensor
    got: Tensor
    alike: Alike
    limit: float
    axes: tuple[str, ...] = ()

    def is_made_by(self, made: Tensor) -> bool:
        """Whether a changed value is the recorded one, which the right value is much less."""
        if made.shape != self.got.shape or not self.alike(made, self.got):
            return False
        if self.want.shape != self.got.shape or not made.isfinite().all():
            return True
        return _apart(made, self.got) <= _BETTER * _apart(self.want, self.got)

    def is_fitted_by(self, made: Tensor) -> bool:
        """The same where ``made`` (float64) depends on a fitted number: equality then allows for
        rounding."""
        if self.is_whole:
            return self.is_made_by(made.round())
        if not self.got.is_floating_point():
            return self.is_made_by(made)
        # the product was rounded once in each of two precisions, and the factor was fitted
        rounding = 4 * torch.finfo(self.got.dtype).eps
        if self.limit or not within(0.0)(self.got, self.got):
            return self.is_made_by(made)
        return self.is_made_by(made) or within(rounding)(made, self.got)

    @property
    def is_whole(self) -> bool:
        return not self.want.is_floating_point() and not self.got.is_floating_point()

    @property
    def is_constant(self) -> bool:
        return bool((self.got == self.got.flatten()[0]).all())

    @property
    def wants_constant(self) -> bool:
        return bool((self.want == self.want.flatten()[0]).all())

    def named(self, axis: int) -> str:
        """What an axis counts, for messages."""
        if axis < len(self.axes):
            return self.axes[axis]
        return "items" if not axis else f"axis {axis}"

    def along(self, axis: int) -> Pair:
        """The same with ``axis`` first; whatever compares must not depend on order of axes."""
        if not axis:
            return self
        want, got = self.want.movedim(axis, 0), self.got.movedim(axis, 0)
        alike = self.alike

        def moved(one: Tensor, other: Tensor) -> bool:
            return alike(one.movedim(0, axis), other.movedim(0, axis))

        return replace(self, want=want, got=got, alike=moved, axes=(self.named(axis),))


Change = Callable[[Pair], Iterator[Reproduction]]


def within(limit: float) -> Alike:
    """Alike up to ``limit`` of the largest magnitude of the second, at every element; with 0,
    equal at the second's precision."""

    def alike(made: Tensor, got: Tensor) -> bool:
        if made.shape != got.shape:
            return False
        step = max(1, made.numel() // _PROBES)
        return _near(made.flatten()[::step], got.flatten()[::step], limit, got) and (
            step == 1 or _near(made, got, limit, got)
        )

    return alike


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).pow(2).mean().sqrt())


def _near(made: Tensor, got: Tensor, limit: float, whole: Tensor) -> bool:
    if not limit:
        made = made.to(got.dtype) if got.is_floating_point() else made
        both = made.isnan() & got.isnan()
        return bool(((made == got) | both).all())
    largest = float(whole.double().abs().max())
    return bool(((made.double() - got.double()).abs() <= limit * largest).all())


def number(value: float) -> str:
    """A value in a sentence.

    >>> number(2.0), number(32766.9999), number(0.33333333)
    ('2', '32767', '0.3333')
    """
    whole = abs(value) < 1e9 and (value == int(value) or abs(value) >= 1e4)
    return str(round(value)) if whole else f"{value:.4g}"


def few(numbers: Sequence[int]) -> str:
    """
    >>> few([0, 2, 1]), few(range(20))
    ('0 2 1', '0 1 2 3 4 5 6 7 …')
    """
    shown = " ".join(map(str, numbers[:8]))
    return f"{shown} …" if len(numbers) > 8 else shown
