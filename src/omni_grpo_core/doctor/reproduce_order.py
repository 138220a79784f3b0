"""Reproductions that put items in another order, or take others: reversed, rolled, swapped …"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice

import torch
from torch import Tensor

from omni_grpo_core.doctor.reproduction import Change, Pair, Reproduction, few
from omni_grpo_core.trace.digest import digest

_COORDINATES = 64
"""Values by which the nearest item is looked for; the whole arrays are compared afterwards."""
_MOST_NEAR = 1024
"""Items among which the nearest one is looked for; equal ones are found among any number."""
_CANDIDATES = 16
_MIXTURES: Mapping[tuple[float, float, float], str] = {
    (0.299, 0.587, 0.114): "their luminance",
    (1 / 3, 1 / 3, 1 / 3): "their mean",
}
"""Shares of red, green and blue: of Pillow and OpenCV, and of a plain mean."""
_MIRRORED = {"width": "mirrored left to right", "height": "upside down"}


def _reversed(pair: Pair) -> Iterator[Reproduction]:
    for axis in range(pair.want.dim()):
        if pair.got.shape[axis] < 2 or not pair.is_made_by(pair.want.flip(axis)):
            continue
        name = pair.named(axis)
        colours = name == "channels" or (not pair.axes and axis and pair.want.shape[axis] == 3)
        if colours:
            yield Reproduction("channels-swapped", "with red and blue swapped", {"axis": axis})
        elif name in _MIRRORED:
            yield Reproduction(f"mirrored-{name}", _MIRRORED[name], {"axis": axis})
        elif not axis and not pair.axes:
            yield Reproduction("reversed", "in reverse order", {"axis": axis})
        else:
            yield Reproduction("reversed", f"with its {name} in reverse order", {"axis": axis})


def _rolled(pair: Pair) -> Iterator[Reproduction]:
    if pair.want.shape != pair.got.shape:
        return
    for axis in range(pair.want.dim()):
        one = pair.along(axis)
        if len(one.want) < 3 or pair.named(axis) == "channels":
            continue  # two items rolled by one are two items reversed; colours have no order
        for k in sorted({place - at for at, place in _matches(one)}, key=abs):
            by = (-k) % len(one.want)
            if by and one.is_made_by(one.want.roll(by, 0)):
                by = by if by <= len(one.want) // 2 else by - len(one.want)
                said = f"rolled by {by} {pair.named(axis)}"
                yield Reproduction("rolled", said, {"axis": axis, "by": by})
                break


def _swapped(pair: Pair) -> Iterator[Reproduction]:
    """Two items exchanged, all others in place."""
    if pair.want.shape != pair.got.shape or len(pair.want) < 3:
        return
    off = list(islice((n for n in range(len(pair.want)) if not _alike_at(pair, n, n)), 3))
    if len(off) != 2:
        return
    one, other = off
    if other - one == len(pair.want) - 1 == 2:
        return  # the first and the last of three: in reverse order
    if _alike_at(pair, one, other) and _alike_at(pair, other, one):
        said = f"with {pair.named(0)} {one} and {other} swapped"
        yield Reproduction("items-swapped", said, {"items": (one, other)})


def _alike_at(pair: Pair, want: int, got: int) -> bool:
    return pair.alike(pair.want[want : want + 1], pair.got[got : got + 1])


def _chosen(pair: Pair) -> Iterator[Reproduction]:
    """Every item is one of the reference's, in no regular order."""
    want, got = pair.want, pair.got
    if want.shape[1:] != got.shape[1:] or want.dim() != got.dim() or len(want) < 2:
        return
    if want.dim() == 1 and (len(torch.unique(want)) < len(want) or len(want) != len(got)):
        return  # any numbers are some of a few numbers
    places = _places(pair)
    if places is None or not pair.is_made_by(want[places]):
        return
    order = places.tolist()
    if sorted(order) == list(range(len(want))):
        said = f"with its {pair.named(0)} in the order {few(order)}"
        yield Reproduction("permuted", said, {"order": order})
    elif want.dim() > 1:
        said = f"with its {pair.named(0)} {few(order)} in place of {few(range(len(got)))}"
        yield Reproduction("chosen", said, {"items": order})


def _recoloured(pair: Pair) -> Iterator[Reproduction]:
    """Channels in an order that is not a reversal, or all of them grey."""
    if "channels" in pair.axes and pair.want.shape == pair.got.shape:
        axis = pair.axes.index("channels")
        if axis and pair.want.shape[axis] == 3:
            one = pair.along(axis)
            grey = [*_grey(one)]
            yield from grey
            for found in () if grey else _chosen(one):
                yield Reproduction(
                    "channels-permuted", found.sentence, {**found.values, "axis": axis}
                )


def _grey(pair: Pair) -> Iterator[Reproduction]:
    """Three equal colours; of a picture that is nearly grey already, each way of mixing is near."""
    if not bool((pair.got == pair.got[:1]).all()) or bool((pair.want == pair.want[:1]).all()):
        return
    for shares, name in _MIXTURES.items():
        mixed = torch.tensordot(torch.tensor(shares), pair.want.float(), dims=1)
        if pair.is_made_by(mixed.expand_as(pair.got)):
            yield Reproduction("grey", f"in grey: its colours became {name}", {"shares": shares})
            return


def _places(pair: Pair) -> Tensor | None:
    """For each recorded item the reference's item that it is nearest to; an item that is in its
    own place, or equal to several, counts as the first that is still free."""
    want, got = _coordinates(pair.want), _coordinates(pair.got)
    if max(len(want), len(got)) <= _MOST_NEAR:
        apart = torch.cdist(got, want)
        return _first_free(apart <= apart.min(1, keepdim=True).values)
    known: dict[int, list[int]] = {}
    for place, key in enumerate(digest(pair.want.to(pair.got.dtype)).tolist()):
        known.setdefault(key, []).append(place)
    found = []
    for key in digest(pair.got).tolist():
        places = known.get(key)
        if not places:
            return None
        found.append(places.pop(0) if len(places) > 1 else places[0])
    return torch.tensor(found)


def _first_free(nearest: Tensor) -> Tensor:
    used: set[int] = set()
    found = []
    for row, options in enumerate(nearest):
        places = options.nonzero().flatten().tolist()
        free = [place for place in places if place not in used] or places
        found.append(row if row in free else free[0])
        used.add(found[-1])
    return torch.tensor(found)


def _matches(pair: Pair) -> list[tuple[int, int]]:
    """(recorded item, the reference's): of a distinct recorded item and those nearest to it, which
    fix an offset between the two."""
    want, got = _coordinates(pair.want), _coordinates(pair.got)
    # neither what is common nor what fills an end
    common = torch.stack([got.mean(0), got[0], got[-1]])
    at = int(torch.cdist(got, common, p=1).min(1).values.argmax())
    apart = (want - got[at]).abs().sum(1)
    nearest = apart.topk(min(_CANDIDATES, len(apart)), largest=False).indices
    return [(at, place) for place in nearest.tolist()]


def _coordinates(values: Tensor) -> Tensor:
    """float32 (items, at most 64): some values of each item."""
    flat = values.flatten(1) if values.dim() > 1 else values[:, None]
    step = max(1, flat.shape[1] // _COORDINATES)
    return torch.nan_to_num(flat[:, ::step].float())


offsets = _matches

CHANGES: tuple[Change, ...] = (_reversed, _rolled, _swapped)
IRREGULAR: tuple[Change, ...] = (_chosen, _recoloured)
