"""Differences of floats: element by element if both sides have all elements, else by
fingerprint."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from omni_grpo_core.tolerances import Tolerance, Tolerances, distance
from omni_grpo_core.trace.describe import describe_change
from omni_grpo_core.trace.divergence import Difference
from omni_grpo_core.trace.fingerprint import Fingerprint
from omni_grpo_core.trace.leaves import Numbers
from omni_grpo_core.trace.place import element, name, row_of

_PROJECTION_SIGMAS = 4.0
"""A projection of differences that are each within tolerance is, by the random signs, nearly
normal with at most the tolerance as its standard deviation; 4 sigma are exceeded by chance once in
16,000."""


def float_differences(
    path: str, was: Numbers, now: Numbers, tolerances: Tolerances
) -> Iterator[Difference]:
    """At most one difference per tensor. Shapes and dtypes must already agree."""
    for number, (a, b) in enumerate(zip(was.parts, now.parts, strict=True)):
        of = f"{path}[{number}]" if len(was.parts) > 1 else path
        yield from _elements(of, a, b, tolerances.of(was.dtype))


def _elements(
    path: str, was: torch.Tensor, now: torch.Tensor, tolerance: Tolerance
) -> Iterator[Difference]:
    a, b = was.to(torch.float64), now.to(torch.float64)
    same = (a == b) | (a.isnan() & b.isnan())
    if bool(same.all()):
        return
    apart = torch.where(same, 0.0, (a - b).abs())
    # a value that is non-finite on one side only is always beyond tolerance, NaN on both never
    far = ~same & (~(apart <= tolerance.atol + tolerance.rtol * a.abs()) | (apart == math.inf))
    distance = torch.where(~apart.isfinite(), math.inf, apart)
    # numpy's: torch's takes seconds to import
    place = tuple(map(int, np.unravel_index(int(distance.argmax()), distance.shape)))
    where, row = element(path, place)
    largest, mean = float(distance.max()), float(distance.mean())
    values = f"is {float(b[place]):.6g}, was {float(a[place]):.6g}"
    if not bool(far.any()):
        sentence = f"{where} {values}, within tolerance"
        yield Difference(path, "within", sentence, row, place, largest, mean)
        return
    if a.numel() == 1:
        factor = float(b[place]) / float(a[place]) if float(a[place]) else 0.0
        # a round factor: 2, 0.5, 1.25
        simple = factor > 0 and abs(factor * 100 - round(factor * 100)) < 1e-3
        sentence = f"{where} {values}{f' (×{factor:g})' if simple else ''}"
        yield Difference(path, "differs", sentence, row, place, largest, mean)
        return
    count = int(far.sum())
    how = describe_change(path, a, b)
    sentence = (
        f"{where} {values}; {count} of {a.numel()} beyond {tolerance.atol:g} + "
        f"{tolerance.rtol:g}·|x|, "
        f"max |Δ| {largest:.3g}, mean |Δ| {mean:.3g}{f'; {how}' if how else ''}"
    )
    yield Difference(path, "differs", sentence, row, place, largest, mean)


def fingerprint_differences(
    path: str, was: Fingerprint, now: Fingerprint, tolerances: Tolerances
) -> Iterator[Difference]:
    """At most one difference. Shapes and dtypes must already agree.

    If each element is within tolerance, so are mean, deviation, range and samples (always) and the
    projections (almost always).
    """
    if was.sha256 is not None and was.sha256 == now.sha256:
        return
    exact = was.sha256 is not None
    tolerance = Tolerance(0.0, 0.0) if exact else tolerances.of(was.dtype)
    scale = math.hypot(was.mean, was.std)
    pairs = [
        ("mean", (was.mean,), (now.mean,), scale, 1.0),
        ("std", (was.std,), (now.std,), scale, 1.0),
        ("min", (was.low,), (now.low,), abs(was.low), 1.0),
        ("max", (was.high,), (now.high,), abs(was.high), 1.0),
        ("projections", was.projections, now.projections, scale, _PROJECTION_SIGMAS),
        ("samples", was.samples, now.samples, None, 1.0),
    ]
    beyond, equal = [], True
    for label, before, after, size, times in pairs:
        within = Tolerance(times * tolerance.atol, times * tolerance.rtol)
        both = list(zip(before, after, strict=True))
        equal = equal and not any(distance(a, b) for a, b in both)
        # an element is a sum of terms of the tensor's scale: where they cancel, their rounding
        # remains
        sized = ((a, b, max(abs(a), scale) if size is None else size) for a, b in both)
        if not all(within.allows(*one) for one in sized):
            beyond.append(label)
    if (was.nan, was.inf) != (now.nan, now.inf):
        beyond.append("NaN and Inf")
    if equal and not beyond and not exact:
        return
    rms = math.sqrt(_mean_square(was.projections, now.projections))
    least = max(
        distance(a, b)
        for label, before, after, _, _ in pairs
        if label in ("min", "max", "samples")
        for a, b in zip(before, after, strict=True)
    )
    single = _single_change(was, now)
    most = single or max(least, rms)
    if not beyond and not exact:
        sentence = f"{name(path)}: rms |Δ| about {rms:.3g}, within tolerance"
        yield Difference(path, "within", sentence, row_of(path), None, most, rms)
        return
    how = (
        f"a single element of {was.size} moved, by {single:.4g}"
        if single
        else f"rms |Δ| about {rms:.3g} over {was.size} elements"
    )
    sentence = f"{name(path)}: {_what(was, now, beyond)}; {how}"
    yield Difference(path, "differs", sentence, row_of(path), None, most, rms)


def _single_change(was: Fingerprint, now: Fingerprint) -> float:
    """How far the only changed element moved, or 0 if not exactly one did: it moves every
    projection equally far, which several elements, each with its own signs, do not."""
    apart = [distance(a, b) for a, b in zip(was.projections, now.projections, strict=True)]
    # stored projections have nine digits
    rounding = 1e-8 * max(map(abs, (*was.projections, *now.projections)))
    even = max(apart) - min(apart) <= 4 * rounding < min(apart)
    return max(apart) * math.sqrt(was.size) if even else 0.0


def _what(was: Fingerprint, now: Fingerprint, beyond: Sequence[str]) -> str:
    if (was.nan, was.inf) != (now.nan, now.inf):
        return f"{now.nan} NaN and {now.inf} Inf, was {was.nan} and {was.inf}"
    if not {"mean", "std", "min", "max"} & set(beyond):
        return (
            "mean, deviation and range unchanged, but values moved "
            "(elements, patches or channels reordered, or a few of them changed)"
        )
    return ", ".join(
        f"{label} is {after:.6g}, was {before:.6g}"
        for label, before, after in (
            ("mean", was.mean, now.mean),
            ("std", was.std, now.std),
            ("min", was.low, now.low),
            ("max", was.high, now.high),
        )
        if label in beyond
    )


def _mean_square(before: Sequence[float], after: Sequence[float]) -> float:
    apart = [distance(a, b) for a, b in zip(before, after, strict=True)]
    return sum(d * d for d in apart) / len(apart)
