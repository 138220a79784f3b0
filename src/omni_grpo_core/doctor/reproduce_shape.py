"""Reproductions that change a shape: transposed, cropped, padded, repeated, resampled, resized …"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import permutations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from omni_grpo_core.doctor.reproduce_order import offsets
from omni_grpo_core.doctor.reproduction import Change, Pair, Reproduction, number, within

_RESAMPLER = 0.1
"""Root mean square of a difference, by the recording's standard deviation, that another resampler
may leave. Chosen, not measured."""
_MOST_AXES = 5
_LINES = 64
"""Along an axis, that are interpolated before all are."""
_ROUNDING = 1e-5
"""Relative: of float32 weights of an interpolation, computed by another kernel."""
_LAST = {1: (-1,), 2: (-2, -1)}


def _transposed(pair: Pair) -> Iterator[Reproduction]:
    want, got = pair.want, pair.got
    if not 2 <= want.dim() <= _MOST_AXES or want.dim() != got.dim():
        return
    if sorted(want.shape) != sorted(got.shape):
        return
    for order in permutations(range(want.dim())):
        if tuple(want.shape[axis] for axis in order) != tuple(got.shape) or order == tuple(
            range(want.dim())
        ):
            continue
        if pair.is_made_by(want.permute(order)):
            said = f"with its axes in the order {' '.join(map(str, order))}"
            yield Reproduction("transposed", said, {"order": order})
            return
    if want.shape != got.shape and pair.is_made_by(want.reshape(got.shape)):
        said = "reshaped where axes had to be exchanged: its values are in the old order"
        yield Reproduction("reshaped", said, {"shape": tuple(got.shape)})


def _lengths(pair: Pair) -> Iterator[Reproduction]:
    """One axis became shorter or longer."""
    axis = _only_axis(pair)
    if axis is None:
        return
    one = pair.along(axis)
    what = pair.named(axis) if axis or pair.axes else "items"
    if len(one.got) < len(one.want):
        yield from _cropped(one, what, axis)
        yield from _strided(one, what, axis)
    else:
        yield from _repeated(one, what, axis)
        yield from _padded(one, what, axis)


def _only_axis(pair: Pair) -> int | None:
    """The one axis whose length differs."""
    if pair.want.dim() != pair.got.dim():
        return None
    off = [n for n in range(pair.want.dim()) if pair.want.shape[n] != pair.got.shape[n]]
    return off[0] if len(off) == 1 else None


def _cropped(pair: Pair, what: str, axis: int) -> Iterator[Reproduction]:
    size, whole = len(pair.got), len(pair.want)
    starts = {0, whole - size, *(place - at for at, place in offsets(pair))}
    for start in sorted(start for start in starts if 0 <= start <= whole - size):
        if not pair.is_made_by(pair.want[start : start + size]):
            continue
        values = {"axis": axis, "start": start, "size": size, "lost": whole - size}
        if start == 0:
            said = f"without its last {whole - size} {what} ({size} of {whole})"
            yield Reproduction("last-dropped", said, values)
        elif start == whole - size:
            said = f"without its first {start} {what} ({size} of {whole})"
            yield Reproduction("first-dropped", said, values)
        else:
            said = f"cut to {what} {start} to {start + size - 1} of {whole}"
            yield Reproduction("cropped", said, values)


def _strided(pair: Pair, what: str, axis: int) -> Iterator[Reproduction]:
    if len(pair.got) < 2:
        return
    for k in range(2, len(pair.want)):
        if len(pair.want[::k]) == len(pair.got) and pair.is_made_by(pair.want[::k]):
            said = f"with only every {ordinal(k)} of its {what}"
            yield Reproduction("strided", said, {"axis": axis, "every": k})


def _repeated(pair: Pair, what: str, axis: int) -> Iterator[Reproduction]:
    k, rest = divmod(len(pair.got), len(pair.want))
    if rest:
        return
    if pair.is_made_by(pair.want.repeat_interleave(k, 0)):
        said = f"with each of its {what} {k} times in a row"
        yield Reproduction("repeated", said, {"axis": axis, "times": k})
    if len(pair.want) > 1 and pair.is_made_by(pair.want.repeat(k, *[1] * (pair.want.dim() - 1))):
        said = f"{k} times over along its {what}"
        yield Reproduction("tiled", said, {"axis": axis, "times": k})


def _padded(pair: Pair, what: str, axis: int) -> Iterator[Reproduction]:
    size, whole = len(pair.want), len(pair.got)
    starts = {0, whole - size}
    turned = Pair(pair.got, pair.want, pair.alike, pair.limit)
    starts |= {place - at for at, place in offsets(turned)}
    for start in sorted(start for start in starts if 0 <= start <= whole - size):
        around = torch.cat([pair.got[:start], pair.got[start + size :]])
        if not bool((around == around.flatten()[0]).all()):
            continue
        if pair.alike(pair.want, pair.got[start : start + size]):
            value = float(around.flatten()[0])
            after = whole - size - start
            said = f"with {number(value)} in {start} {what} before it and {after} after it"
            values = {"axis": axis, "before": start, "after": after, "value": value}
            yield Reproduction("padded", said, values)
            return


def _shifted(pair: Pair) -> Iterator[Reproduction]:
    """Moved along an axis, with one number where nothing came from; what left is lost."""
    want, got = pair.want, pair.got
    if want.shape != got.shape or pair.is_constant:
        return
    for axis in range(want.dim()):
        one = pair.along(axis)
        size = len(one.want)
        for by in sorted({at - place for at, place in offsets(one)}, key=abs):
            if not by or abs(by) >= size:
                continue
            kept = slice(by, None) if by > 0 else slice(None, by)
            from_ = slice(None, -by) if by > 0 else slice(-by, None)
            rest = one.got[:by] if by > 0 else one.got[by:]
            if not bool((rest == rest.flatten()[0]).all()):
                continue
            if float(one.got[kept].double().std(correction=0)) == 0:
                continue
            if one.alike(one.want[from_], one.got[kept]) and not one.is_made_by(
                one.want.roll(by, 0)
            ):
                value = float(rest.flatten()[0])
                way = "later" if by > 0 else "earlier"
                said = f"{abs(by)} {pair.named(axis)} {way}, filled with {number(value)}"
                yield Reproduction("shifted", said, {"axis": axis, "by": by, "value": value})
                break


def ordinal(k: int) -> str:
    """
    >>> ordinal(2), ordinal(4)
    ('second', '4th')
    """
    return {2: "second", 3: "third"}.get(k, f"{k}th")


# --------------------------------------------------------------------------- interpolated


def _resampled(pair: Pair) -> Iterator[Reproduction]:
    """One axis at another length, by linear or band-limited interpolation."""
    axis = _only_axis(pair)
    if axis is None or not pair.want.is_floating_point():
        return
    last = pair.want.movedim(axis, -1), pair.got.movedim(axis, -1)
    want, got = (
        one.double().flatten(0, -2) if one.dim() > 1 else one.double()[None] for one in last
    )
    size = got.shape[-1]
    if min(size, want.shape[-1]) < 8:
        return
    made = [
        interpolate(want[None], size, mode="linear", align_corners=corners)[0]
        for corners in (False, True)
    ]
    made.append(band_limited(want, size))
    apart = min(_apart(one, got) for one in made)
    if apart <= _RESAMPLER:
        factor = size / want.shape[-1]
        said = (
            f"resampled from {want.shape[-1]} to {size} {pair.named(axis)}, {number(factor)} times "
            f"as many (up to {apart:.1%} of its deviation)"
        )
        yield Reproduction("resampled", said, {"axis": axis, "times": factor, "apart": apart})


def band_limited(want: Tensor, size: int) -> Tensor:
    """Sounds (n, length) with ``size`` samples instead, without what is above half that rate."""
    spectrum = torch.fft.rfft(want)
    made: Tensor = torch.fft.irfft(spectrum[..., : size // 2 + 1], size)
    return made * (size / want.shape[-1])


def _resized(pair: Pair) -> Iterator[Reproduction]:
    """The last two axes at another size."""
    want, got = pair.want, pair.got
    if want.dim() < 3 or want.dim() != got.dim() or want.shape[:-2] != got.shape[:-2]:
        return
    if want.shape == got.shape or not min(got.shape[-2:]):
        return
    flat, target = (one.double().reshape(1, -1, *one.shape[-2:]) for one in (want, got))
    high, wide = target.shape[-2:]
    made = [interpolate(flat, (high, wide), mode="nearest")]
    for mode in ("bilinear", "bicubic"):
        for antialias in (False, True):
            made.append(
                interpolate(flat, (high, wide), mode=mode, align_corners=False, antialias=antialias)
            )
    apart = min(_apart(one, target) for one in made)
    if apart <= _RESAMPLER:
        was = want.shape[-2:]
        said = f"resized from {was[0]} x {was[1]} to {high} x {wide} (up to {apart:.1%})"
        values = {"got": (high, wide), "want": tuple(was), "apart": apart}
        yield Reproduction("resized", said, values)


def _there_and_back(pair: Pair) -> Iterator[Reproduction]:
    """Interpolated to fewer values along an axis, or along height and width, and back: the shape is
    the same, and the detail is gone."""
    want, got = pair.want, pair.got
    if want.shape != got.shape or pair.is_constant or not want.is_floating_point():
        return
    planes = [tuple(range(want.dim() - 2, want.dim()))] if want.dim() > 3 else []
    for axes in (*planes, *((axis,) for axis in range(want.dim()))):
        last = [one.movedim(axes, _LAST[len(axes)]) for one in (want, got)]
        size = last[0].shape[-len(axes) :]
        few = [one.reshape(1, -1, *size)[:, :_LINES] for one in last]
        for small, modes in _ways(size):
            if not within(_ROUNDING)(_resized_twice(few[0], small, size, modes), few[1]):
                continue
            made = _resized_twice(last[0].reshape(1, -1, *size), small, size, modes)
            if pair.is_made_by(made.reshape(last[0].shape).movedim(_LAST[len(axes)], axes)) or (
                within(_ROUNDING)(made, last[1].reshape(made.shape))
            ):
                what = " x ".join(map(str, small))
                said = (
                    f"resized to {what} pixels and back"
                    if len(axes) > 1
                    else f"interpolated from {size[0]} to {what} {pair.named(axes[0])} and back"
                )
                yield Reproduction("resized", said, {"axes": axes, "to": small})
                return


def _ways(size: Sequence[int]) -> Iterator[tuple[tuple[int, ...], tuple[str, str]]]:
    """Smaller sizes, with the modes in which values are interpolated to and from each."""
    linear = "linear" if len(size) == 1 else "bilinear"
    cubic = ["bicubic"] * (len(size) > 1)
    for share in (1 / 2, 1 / 4, 1 / 3, 3 / 4, 2 / 3):
        small = tuple(int(length * share) for length in size)
        if min(small) < 1:
            continue
        for down in (linear, "nearest", "area", *cubic):
            yield from ((small, (down, up)) for up in (linear, "nearest", *cubic))


def _resized_twice(
    values: Tensor, small: Sequence[int], size: Sequence[int], modes: tuple[str, str]
) -> Tensor:
    fewer = interpolate(values.float(), tuple(small), mode=modes[0])
    made: Tensor = interpolate(fewer, tuple(size), mode=modes[1])
    return made


def _apart(made: Tensor, got: Tensor) -> float:
    spread = float(got.std(correction=0))
    return float((made - got).pow(2).mean().sqrt()) / spread if spread else float("inf")


CHANGES: tuple[Change, ...] = (_transposed, _lengths)
FITTED: tuple[Change, ...] = (_shifted, _resampled, _resized, _there_and_back)
