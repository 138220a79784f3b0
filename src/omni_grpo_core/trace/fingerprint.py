"""A tensor of any size as about eighty numbers that detect every change.

Mean, deviation and range summarise a tensor, but do not show that two patches were swapped, the
colour channels reversed or one element in thousands changed. Projections do: eight sums of all
elements, each with its own random signs. They are linear, and divided by the square root of the
element count, so that the root mean square of ``a.projections - b.projections`` estimates the root
mean square of the elements' difference (Achlioptas 2003, doi 10.1016/S0022-0000(03)00025-4).

Signs and sample places come from a hash of a counter (SplitMix64), not from a library's generator:
they are the same on every platform and in every version of torch and numpy.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from omni_grpo_core.errors import TraceError
from omni_grpo_core.trace import DTYPES, INTEGERS, dtype_name

PROJECTIONS = 8
SAMPLES = 64
_CHUNK = 1 << 15
"""Elements processed at a time: their signs, as float64, then fit the second-level cache."""

Floats = NDArray[np.float64]
Words = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """A summary of one tensor, or of several fingerprinted end to end.

    ``dtype``: torch's name. ``shapes``: one per tensor. ``mean``, ``std`` (population), ``low``,
    ``high``: of the finite elements, NaN if there are none. ``projections``: eight, non-finite
    elements counting as 0. ``samples``: up to 64 elements, in order; all of them if there are no
    more. ``sha256``: of the elements of an integer or boolean tensor, little-endian, else ``None``.
    """

    dtype: str
    shapes: tuple[tuple[int, ...], ...]
    mean: float
    std: float
    low: float
    high: float
    nan: int
    inf: int
    projections: tuple[float, ...]
    samples: tuple[float, ...]
    sha256: str | None

    @property
    def size(self) -> int:
        """Elements of all tensors together."""
        return sum(math.prod(shape) for shape in self.shapes)


def fingerprint(*tensors: torch.Tensor) -> Fingerprint:
    """Fingerprint one tensor, or several of one dtype end to end. Computed in float64.

    Raises :class:`~omni_grpo_core.errors.TraceError` for no tensors, mixed or complex dtypes.

    >>> ramp = fingerprint(torch.arange(6.0).reshape(2, 3))
    >>> ramp.shapes, ramp.mean, ramp.low, ramp.high, ramp.samples
    (((2, 3),), 2.5, 0.0, 5.0, (0.0, 1.0, 2.0, 3.0, 4.0, 5.0))
    >>> fingerprint(torch.arange(6.0).flip(0)).projections == ramp.projections
    False
    """
    dtypes = {dtype_name(tensor) for tensor in tensors}
    if len(dtypes) != 1 or not dtypes <= DTYPES.keys():
        raise TraceError(
            "fingerprint",
            got=f"tensors of dtype {', '.join(sorted(dtypes)) or 'none'}",
            want=f"one of {', '.join(DTYPES)}",
            fix="fingerprint tensors of one dtype at a time",
        )
    dtype = dtypes.pop()
    shapes = tuple(tuple(tensor.shape) for tensor in tensors)
    flat = torch.cat([tensor.detach().flatten().cpu() for tensor in tensors])
    seed = _seed(dtype, shapes)
    # values near the largest float64 overflow to infinity, which is reported as such
    with np.errstate(over="ignore", invalid="ignore"):
        mean, std, low, high, nan, inf = _statistics(flat)
        projections = _projections(flat, seed)
    places = torch.from_numpy(sample_places(seed, len(flat)))
    return Fingerprint(
        dtype=dtype,
        shapes=shapes,
        mean=mean,
        std=std,
        low=low,
        high=high,
        nan=nan,
        inf=inf,
        projections=tuple(projections.tolist()),
        samples=tuple(flat[places].to(torch.float64).tolist()),
        sha256=hash_integers(flat) if dtype in INTEGERS else None,
    )


def hash_integers(tensor: torch.Tensor) -> str:
    """sha256 of an integer or boolean tensor's elements, little-endian, hexadecimal.

    >>> hash_integers(torch.tensor([1, 2]))[:16]
    '0c730b69905c5ef7'
    """
    array = tensor.detach().cpu().contiguous().numpy()
    return hashlib.sha256(array.astype(array.dtype.newbyteorder("<")).tobytes()).hexdigest()


def _seed(dtype: str, shapes: Sequence[tuple[int, ...]]) -> int:
    text = f"{dtype} {[list(shape) for shape in shapes]}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def _hash(seed: int, first: int, count: int) -> Words:
    """``count`` 64-bit words of SplitMix64 (Steele, Lea, Flood 2014) seeded with ``seed``, from
    the ``first``-th on."""
    word = np.arange(first + 1, first + count + 1, dtype=np.uint64)
    word *= np.uint64(0x9E3779B97F4A7C15)
    word += np.uint64(seed)
    word ^= word >> np.uint64(30)
    word *= np.uint64(0xBF58476D1CE4E5B9)
    word ^= word >> np.uint64(27)
    word *= np.uint64(0x94D049BB133111EB)
    word ^= word >> np.uint64(31)
    return word


def sample_places(seed: int, size: int) -> NDArray[np.int64]:
    """The indices of the samples: at most 64 distinct ones below ``size``, ascending."""
    if size <= SAMPLES:
        return np.arange(size, dtype=np.int64)
    chosen: dict[int, None] = {}
    first = 0
    # a different seed from the signs': an element's place and sign must be independent
    while len(chosen) < SAMPLES:
        words = _hash(seed ^ 0x5DEECE66D, first, SAMPLES)
        chosen.update(dict.fromkeys((words % np.uint64(size)).tolist()))
        first += SAMPLES
    return np.array(sorted(list(chosen)[:SAMPLES]), dtype=np.int64)


def _chunks(flat: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    return [(start, flat[start : start + _CHUNK]) for start in range(0, len(flat), _CHUNK)]


def _wide(chunk: torch.Tensor) -> Floats:
    array: Floats = chunk.to(torch.float64).numpy()
    return array


def _statistics(flat: torch.Tensor) -> tuple[float, float, float, float, int, int]:
    count, mean, square = 0, 0.0, 0.0
    low, high, nan, inf = math.inf, -math.inf, 0, 0
    for _, chunk in _chunks(flat):
        values = _wide(chunk)
        finite = np.isfinite(values)
        if not finite.all():
            nans = int(np.isnan(values).sum())
            nan, inf = nan + nans, inf + int((~finite).sum()) - nans
            values = values[finite]
        if not len(values):
            continue
        # chunks are merged by the parallel form of Welford's update (Chan, Golub, LeVeque 1979)
        own = float(values.mean())
        shift, total = own - mean, count + len(values)
        square += float(np.square(values - own).sum()) + shift * shift * count * len(values) / total
        mean, count = mean + shift * len(values) / total, total
        low, high = min(low, float(values.min())), max(high, float(values.max()))
    if not count:
        return math.nan, math.nan, math.nan, math.nan, nan, inf
    return mean, math.sqrt(square / count), low, high, nan, inf


def _projections(flat: torch.Tensor, seed: int) -> Floats:
    sums = np.zeros(PROJECTIONS)
    for start, chunk in _chunks(flat):
        values = _wide(chunk)
        if not np.isfinite(values).all():
            values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
        # a 64-bit word holds the eight signs of eight elements; chunks start at multiples of eight
        words = _hash(seed, start // 8, -(-len(values) // 8))
        octets = words.astype("<u8").view(np.uint8)[: len(values)]
        bits = np.unpackbits(octets[:, None], axis=1).astype(np.float64)
        sums += values.sum() - 2 * (values @ bits)
    return sums / math.sqrt(max(len(flat), 1))
