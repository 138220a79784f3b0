"""Values survive JSON and tensors unchanged, and anything that is not a value is refused."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from types import MappingProxyType

import numpy as np
import pytest
import torch

from omni_grpo_core.errors import TraceError
from omni_grpo_core.trace import DTYPES
from omni_grpo_core.trace.codec import VALUE_CLASSES, decode, encode, equal
from omni_grpo_core.types import Malformed, Span, StageRecord, Trace


def round_trip(value: object) -> object:
    data, tensors = encode(value)
    return decode(json.loads(json.dumps(data)), tensors)


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        0,
        10**30,
        -0.0,
        1e-320,
        math.nan,
        -math.inf,
        "",
        "line\nbreak \u2028 \x00 火 \ud800",
        (),
        ((), [], {}),
        [1, (2.0, [None])],
        {"a": 1, "b c": {"d": ()}},
        {1: "int key", None: "none", "$type": "a key that looks like a mark", (1, 2): 3},
        Span("video", 0, 12, 8),
        {"$tensor": Malformed("what", 3)},
    ],
)
def test_a_value_comes_back_equal(value: object) -> None:
    assert equal(round_trip(value), value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_tensors_of_every_dtype_come_back_equal(dtype: str, shape: tuple[int, ...]) -> None:
    tensor = torch.arange(math.prod(shape)).reshape(shape).to(DTYPES[dtype])
    assert equal(round_trip((tensor, tensor)), (tensor, tensor))


def test_a_recorded_tensor_does_not_change_with_the_original() -> None:
    tensor = torch.zeros(2)
    data, tensors = encode(tensor)
    tensor += 1
    assert torch.equal(decode(data, tensors), torch.zeros(2))


def test_views_and_gradients_are_stored_as_plain_tensors() -> None:
    base = torch.arange(6.0, requires_grad=True)
    value = {"strided": base[::2], "transposed": base.reshape(2, 3).T}
    assert equal(round_trip(value), value)


@pytest.mark.parametrize("stored", [np.float64(0.5), OrderedDict(a=1), MappingProxyType({"a": 1})])
def test_subclasses_come_back_as_equal_plain_values(stored: object) -> None:
    assert equal(round_trip(stored), stored)


def test_tensor_names_never_collide() -> None:
    value = {"a": {"b": torch.tensor(1)}, "a.b": torch.tensor(2)}
    assert equal(round_trip(value), value)


def test_integers_are_readable_in_the_text() -> None:
    data, _ = encode(torch.tensor([7, 3, 3, 3, 3]), "input_ids")
    assert data == {
        "$tensor": "input_ids",
        "dtype": "int64",
        "shape": [5],
        "summary": "7, 3×4",
    }


def test_a_tensor_summary_under_its_old_name_is_read() -> None:
    """Traces of 0.1 call the summary ``about``."""
    data, tensors = encode(torch.tensor([7, 3]))
    assert equal(decode({**data, "about": data.pop("summary")}, tensors), torch.tensor([7, 3]))


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({"weights": torch.nn.Linear(1, 1).weight}, "value.weights: found a model parameter"),
        ((1, {"x": object()}), r"value\[1\].x: found a builtins.object"),
        (torch.zeros(1, dtype=torch.complex64), "complex64"),
        (torch.zeros(1, device="meta"), "meta"),
        (torch.eye(2).to_sparse(), "sparse"),
    ],
)
def test_anything_that_is_not_a_value_is_refused_by_place(value: object, named: str) -> None:
    with pytest.raises(TraceError, match=named):
        encode(value)


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"$type": "Nonsense"}, "Nonsense"),
        ({"$type": "Span", "modality": "video"}, "a Span of modality, item, start, length"),
        ({"$tensor": "a", "dtype": "int64", "shape": [1]}, "no such tensor"),
        ({"$tensor": "b", "dtype": "int64", "shape": [1]}, r"found float32 \[2\]"),
        ({"$float": "many"}, "many"),
        ({"$pickle": "b'..'"}, "pickle"),
    ],
)
def test_data_of_another_version_is_refused_by_place(data: object, named: str) -> None:
    with pytest.raises(TraceError, match=named) as caught:
        decode([data], {"b": torch.zeros(2)})
    assert "value[0]" in str(caught.value)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (1, 1.0),
        (1, True),
        ((1,), [1]),
        ((1,), (1, 2)),
        ({"a": 1}, {"b": 1}),
        (torch.tensor([1]), torch.tensor([[1]])),
        (torch.tensor([1]), torch.tensor([1], dtype=torch.int32)),
        (torch.tensor([math.nan, 1.0]), torch.tensor([1.0, math.nan])),
        (Span("video", 0, 1, 1), Span("audio", 0, 1, 1)),
        (None, 0),
        ("1", 1),
        (math.nan, 0.0),
    ],
)
def test_different_values_are_not_equal(a: object, b: object) -> None:
    assert not equal(a, b)
    assert not equal(b, a)
    assert equal(a, a)


def test_every_dataclass_of_types_can_be_stored() -> None:
    # dataclasses are collected automatically; this tests that some were found
    assert {Span.__name__, Trace.__name__, StageRecord.__name__} <= VALUE_CLASSES.keys()
