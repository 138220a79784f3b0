"""Fingerprints are the same everywhere and detect what statistics do not."""

from __future__ import annotations

import math

import pytest
import torch
from small_traces import noise

from omni_grpo_core.errors import TraceError
from omni_grpo_core.trace.fingerprint import SAMPLES, _hash, fingerprint, sample_places


def test_signs_are_splitmix64() -> None:
    # the first words of the published generator for seed 1234567
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert _hash(1234567, 0, 3).tolist() == expected
    assert _hash(1234567, 1, 2).tolist() == expected[1:]


def test_a_fingerprint_is_the_same_on_every_machine() -> None:
    # recorded once: a change would make every stored golden differ. Ten times a projection of a
    # hundred integers is an integer.
    found = fingerprint(torch.arange(100.0))
    assert [round(p * 10) for p in found.projections] == [2, 8, 842, 46, -972, -476, 160, 386]
    assert found.samples[:8] == (1, 2, 3, 4, 5, 7, 11, 12)


def test_projections_estimate_the_root_mean_square_of_a_difference() -> None:
    found, true = 0.0, 0.0
    for rows in range(20, 50):
        a, b = noise(rows, 7, seed=1), noise(rows, 7, seed=2)
        pairs = zip(fingerprint(a).projections, fingerprint(b).projections, strict=True)
        found += sum((x - y) ** 2 for x, y in pairs) / 8
        true += float((a - b).square().mean())
    # 240 squared normals average to 1 with deviation sqrt(2 / 240) = 0.09; seeds are fixed
    assert math.sqrt(found) == pytest.approx(math.sqrt(true), rel=0.2)


def test_statistics_exclude_non_finite_values() -> None:
    found = fingerprint(torch.tensor([1.0, math.nan, 3.0, math.inf, -math.inf]))
    assert (found.mean, found.std, found.low, found.high) == (2.0, 1.0, 1.0, 3.0)
    assert (found.nan, found.inf) == (1, 2)
    assert all(math.isfinite(p) for p in found.projections)


def test_statistics_do_not_depend_on_the_chunks() -> None:
    values = noise(100_000).double() + 1000
    found = fingerprint(values)
    # float64 sums of 1e5 numbers in another order: about 1e-12 relative
    assert found.mean == pytest.approx(float(values.mean()), rel=1e-11)
    assert found.std == pytest.approx(float(values.std(correction=0)), rel=1e-9)
    assert found.low == float(values.min())


def test_no_finite_values_and_no_values() -> None:
    for tensor in (torch.zeros(0, 3), torch.full((2,), math.nan)):
        found = fingerprint(tensor)
        assert math.isnan(found.mean)
        assert found.projections == (0.0,) * 8
    assert fingerprint(torch.tensor([1e308, 1e308, 1e308], dtype=torch.float64)).high == 1e308


def test_sample_places_are_spread_and_distinct() -> None:
    for size in (65, 1000, 10**7):
        places = sample_places(3, size)
        assert len(set(places.tolist())) == SAMPLES
        assert sorted(places.tolist()) == places.tolist()
        assert places[-1] < size
    assert sample_places(3, 10**7)[-1] > 9 * 10**6


def test_integers_have_a_checksum_and_dtypes_differ() -> None:
    a = torch.arange(1000)
    b = a.clone()
    b[500] += 1
    assert fingerprint(a).sha256 != fingerprint(b).sha256
    assert fingerprint(a).sha256 == fingerprint(a.clone()).sha256
    assert fingerprint(a.float()).sha256 is None
    assert fingerprint(a > 3).dtype == "bool"
    assert fingerprint(a.to(torch.uint64)).high == 999


def test_several_tensors_are_fingerprinted_end_to_end() -> None:
    a, b = noise(3, 4), noise(2, 4, seed=1)
    found = fingerprint(a, b)
    assert found.shapes == ((3, 4), (2, 4))
    assert found.size == 20
    assert found.samples == tuple(torch.cat([a, b]).flatten().tolist())


@pytest.mark.parametrize(
    "tensors",
    [(), (torch.zeros(1), torch.zeros(1).double()), (torch.zeros(1, dtype=torch.complex64),)],
)
def test_tensors_without_a_fingerprint_are_refused(tensors: tuple[torch.Tensor, ...]) -> None:
    with pytest.raises(TraceError, match="fingerprint: found tensors of dtype"):
        fingerprint(*tensors)
