"""Proof by reproduction: which small change of the right value gives the recorded one?

A cause is proved when the reference's value, changed in one way and by at most one fitted number,
*is* the recording: exactly, or within the limit that two sound runs keep. What only resembles it is
not listed. Changes of values are here, of order in :mod:`~omni_grpo_core.doctor.reproduce_order`,
of shape in :mod:`~omni_grpo_core.doctor.reproduce_shape`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from omni_grpo_core.doctor import reproduce_order, reproduce_shape
from omni_grpo_core.doctor.reproduction import (
    Alike,
    Change,
    Pair,
    Reproduction,
    few,
    number,
    within,
)

__all__ = ["Reproduction", "difference", "plain", "reproductions", "told"]

_KNOWN: Mapping[float, str] = {
    32768.0: "int16 samples never divided by 32768",
    32767.0: "int16 samples never divided by 32767",
    1 / 32768: "divided by 32768 although already between -1 and 1",
    255.0: "never divided by 255",
    1 / 255: "divided by 255 once more",
    2**0.5: "libav's own mix of two like channels is 3 dB louder than their mean",
    0.5: "the mean of two channels of which one is silent has it",
}
"""Factors with a name. int16 samples are taken as the reference's at 32768."""


def reproductions(
    want: Tensor,
    got: Tensor,
    limit: float | Alike = 0.0,
    *,
    axes: Sequence[str] = (),
    others: Mapping[str, Tensor] | None = None,
) -> tuple[Reproduction, ...]:
    """Every change of ``want`` that gives ``got``, simplest first; empty where none does, or where
    they are equal.

    Axis 0 is the order of items (frames, rows, tokens, samples). ``limit``: the largest difference
    allowed at any element, relative to the largest magnitude of ``got``; 0 demands equality, at
    ``got``'s precision. Or a function that says whether two arrays of one shape are alike, where
    sound readers differ in another way. ``axes``: what each axis counts, in the plural; "channels"
    are colours, "height" and "width" a picture's. ``others``: what may stand in ``want``'s place,
    by the name that a sentence gives it.

    Changes that need no number, or one that is read off, come first; a mean and a deviation or a
    resampler are tried only where none of them fits, and last an order without a rule. Where two
    changes do the same to this value, both are given; two names of one change are not.

    >>> frames = torch.tensor([[1.0], [2.0], [4.0]])
    >>> [found.sentence for found in reproductions(frames, frames.flip(0))]
    ['in reverse order']
    >>> [found.sentence for found in reproductions(frames, 2 * frames)]
    ['times 2']
    """
    want, got = (one[None] if not one.dim() else one for one in (want, got))
    want, got = (one.to(torch.int64) if one.dtype == torch.bool else one for one in (want, got))
    alike = limit if callable(limit) else within(limit)
    pair = Pair(want, got, alike, 0.0 if callable(limit) else limit, tuple(axes))
    same = want.shape == got.shape and alike(want, got)
    if not got.numel() or not want.numel() or same:
        return ()
    for group in (_of_others(others or {}), _SIMPLE, _FITTED, reproduce_order.IRREGULAR):
        found = tuple(one for change in group for one in change(pair))
        if found:
            return found
    return ()


def told(subject: str, found: Sequence[Reproduction]) -> str:
    """One sentence for all that explain a value.

    >>> told("the clip's frames are the file's", [Reproduction("reversed", "in reverse order")])
    "the clip's frames are the file's in reverse order"
    """
    return f"{subject} " + " or, which is the same here, ".join(one.sentence for one in found)


def plain(found: Sequence[Reproduction]) -> dict[str, Any]:
    """For the ``values`` of evidence: where the catalogue has no story of it, a rule makes a proved
    cause of them (:func:`~omni_grpo_core.doctor.signatures.rule_of_reproductions`).

    >>> plain([Reproduction("times", "times 2", {"times": 2.0})])
    {'times': 2.0, 'reproduced': ('times',)}
    """
    values = {**found[0].values} if found else {}
    return {**values, "reproduced": tuple(one.name for one in found)}


def difference(want: Tensor, got: Tensor) -> str:
    """Where and by how much two values differ, for a cause that nobody knows.

    >>> difference(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 2.0, 5.0]))
    '1 of 3 values differ, from place 2 on (5 instead of 4), by 0.333 on average'
    """
    if want.shape != got.shape:
        return f"{_by(got.shape)} values instead of {_by(want.shape)}"
    same = torch.isclose(got.double(), want.double(), rtol=0, atol=0, equal_nan=True)
    off = (~same).flatten().nonzero().flatten()
    if not len(off):
        return "equal"
    place = torch.unravel_index(off[0], got.shape)
    where = ", ".join(str(int(axis)) for axis in place)
    gap = float((got.double() - want.double()).abs().mean())
    return (
        f"{len(off)} of {got.numel()} values differ, from place {where} on "
        f"({number(float(got[place]))} instead of {number(float(want[place]))}), by {gap:.3g} on "
        "average"
    )


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


# --------------------------------------------------------------------------- values


def _of_others(others: Mapping[str, Tensor]) -> tuple[Change, ...]:
    def another(pair: Pair) -> Iterator[Reproduction]:
        for name, other in others.items():
            if pair.is_made_by(other):
                yield Reproduction("swapped-with", f"of {name} instead", {"of": name})

    return (another,)


def _constant(pair: Pair) -> Iterator[Reproduction]:
    first = pair.got.flatten()[0]
    if pair.want.shape != pair.got.shape or not bool((pair.got == first).all()):
        return
    if pair.got.numel() > 1 or not float(first):
        value = float(first)
        name = "constant" if value else "zero"
        yield Reproduction(name, f"with {number(value)} in place of every value", {"value": value})


def _unnumbered(pair: Pair) -> Iterator[Reproduction]:
    """Changes of each value that need no number."""
    want = pair.want
    if want.shape != pair.got.shape or pair.is_constant:
        return
    if not want.is_floating_point() and set(torch.unique(want).tolist()) <= {0, 1}:
        if pair.is_made_by(1 - want):
            yield Reproduction("inverted", "with 0 for 1 and 1 for 0")
    elif pair.is_made_by(-want):
        yield Reproduction("negated", "with the opposite sign")
    if bool((want < 0).any()) and pair.is_made_by(want.abs()):
        yield Reproduction("absolute", "without signs")


def _cast(pair: Pair) -> Iterator[Reproduction]:
    want, got = pair.want, pair.got
    if want.shape != got.shape or pair.is_constant or not want.is_floating_point():
        return
    for dtype in (torch.bfloat16, torch.float16):
        if want.dtype != dtype and pair.is_made_by(want.to(dtype).to(want.dtype)):
            kind = str(dtype).removeprefix("torch.")
            yield Reproduction(f"cast-{kind}", f"rounded to {kind}", {"dtype": kind})
    for how, made in (("rounded", want.round()), ("cut", want.trunc())):
        if pair.is_made_by(made):
            yield Reproduction("cast-integer", f"{how} to whole numbers", {"how": how})
            break
    eight = (want * 255).round().clamp(0, 255) / 255
    if pair.is_made_by(eight):
        yield Reproduction("cast-uint8", "rounded to the 256 steps of a byte", {"dtype": "uint8"})


def _overflowed(pair: Pair) -> Iterator[Reproduction]:
    want = pair.want
    if want.shape != pair.got.shape or pair.is_constant or not bool(want.isfinite().all()):
        return
    whole = want.to(torch.int64)
    for dtype in (torch.uint8, torch.int8, torch.int16):
        wrapped = whole.to(dtype).to(torch.int64)
        if not torch.equal(wrapped, whole) and pair.is_made_by(wrapped):
            kind = str(dtype).removeprefix("torch.")
            yield Reproduction("overflowed", f"wrapped around in {kind}", {"dtype": kind})


def _times(pair: Pair) -> Iterator[Reproduction]:
    if pair.want.shape != pair.got.shape or pair.is_constant:
        return
    want, got = pair.want.double(), pair.got.double()
    size = float((want * want).sum())
    k = float((want * got).sum()) / size if size else 0.0
    if not k or abs(k + 1) < 1e-6 or not pair.is_fitted_by(want * k):
        return
    known = next((why for factor, why in _KNOWN.items() if abs(k / factor - 1) < 2e-6), "")
    said = f"divided by {number(1 / k)}" if abs(k) < 0.1 else f"times {number(k)}"
    yield Reproduction("times", said + (f" ({known})" if known else ""), {"times": k})


def _plus(pair: Pair) -> Iterator[Reproduction]:
    if pair.want.shape != pair.got.shape or (pair.is_constant and not pair.wants_constant):
        return
    gap = pair.got.double() - pair.want.double()
    k = float(gap.median()) if pair.is_whole else float(gap.mean())
    if k and pair.is_fitted_by(pair.want.double() + k):
        yield Reproduction("plus", f"{'plus' if k > 0 else 'minus'} {number(abs(k))}", {"plus": k})


def _clipped(pair: Pair) -> Iterator[Reproduction]:
    want, got = pair.want, pair.got
    if want.shape != got.shape or pair.is_constant:
        return
    low, high = float(got.min()), float(got.max())
    if pair.is_made_by(want.double().clamp(low, high)):
        said = f"clipped to [{number(low)}, {number(high)}]"
        yield Reproduction("clipped", said, {"low": low, "high": high})


def _normalised(pair: Pair) -> Iterator[Reproduction]:
    if pair.want.shape != pair.got.shape or pair.is_constant or pair.got.numel() < 4:
        return
    want, got = pair.want.double(), pair.got.double()
    spread = want - want.mean()
    size = float((spread * spread).sum())
    k = float((spread * got).sum()) / size if size else 0.0
    c = float(got.mean() - k * want.mean())
    # the extremes of a value and its fit agree by chance where it has only a few levels
    if k and len(torch.unique(want)) > 3 and pair.is_fitted_by(k * want + c):
        sign = "plus" if c > 0 else "minus"
        said = f"times {number(k)} {sign} {number(abs(c))} (another mean and standard deviation)"
        yield Reproduction("normalised", said, {"times": k, "plus": c})


def _partly(pair: Pair) -> Iterator[Reproduction]:
    """Some items hold one number throughout, all others are right."""
    want, got = pair.want, pair.got
    if want.shape != got.shape or len(got) < 2:
        return
    off = [n for n in range(len(got)) if not pair.alike(want[n : n + 1], got[n : n + 1])]
    wrong = got[off]
    if not off or len(off) == len(got) or not bool((wrong == wrong.flatten()[0]).all()):
        return
    if got.dim() == 1 and len(off) < 3:
        return  # one wrong number is not an item that was lost
    value = float(wrong.flatten()[0])
    said = f"with {pair.named(0)} {few(off)} all {number(value)}"
    yield Reproduction("partly-constant", said, {"items": off, "value": value})


def _ids(pair: Pair) -> Iterator[Reproduction]:
    """One whole number inserted or lost, or a few replaced: never a change of floats."""
    want, got = pair.want, pair.got
    if not pair.is_whole or want.dim() != 1 or got.dim() != 1:
        return
    width = min(len(want), len(got))
    off = (want[:width] != got[:width]).nonzero().flatten().tolist()
    place = off[0] if off else width
    known = {"place": place, "got": got[place : place + 4].tolist()}
    known["want"] = want[place : place + 4].tolist()
    if len(got) == len(want) + 1 and torch.equal(want[place:], got[place + 1 :]):
        said = f"with {int(got[place])} inserted at place {place}"
        yield Reproduction("inserted", said, known)
    elif len(got) + 1 == len(want) and torch.equal(want[place + 1 :], got[place:]):
        said = f"without {int(want[place])} at place {place}"
        yield Reproduction("lost", said, known)
    elif len(got) == len(want) and len(off) <= max(1, len(want) // 10):
        said = f"but {int(got[place])} instead of {int(want[place])} at place {place}"
        more = f" and {len(off) - 1} other changes" if len(off) > 1 else ""
        yield Reproduction("replaced", said + more, {**known, "count": len(off)})


_SIMPLE: tuple[Change, ...] = (
    _constant,
    *reproduce_order.CHANGES,
    *reproduce_shape.CHANGES,
    _unnumbered,
    _cast,
    _overflowed,
    _times,
    _plus,
    _clipped,
)
_FITTED: tuple[Change, ...] = (
    _normalised,
    _partly,
    _ids,
    *reproduce_shape.FITTED,
)
