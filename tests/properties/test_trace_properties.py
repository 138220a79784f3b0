"""For every value: a stored value loads equal, runs parse back, fingerprints detect changes."""

from __future__ import annotations

import dataclasses
import math
import tempfile
import types as python_types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from omni_grpo_core.golden.leaf_text import summarise
from omni_grpo_core.golden.text import compare_goldens, format_golden, parse_golden
from omni_grpo_core.trace import DTYPES, FLOATS
from omni_grpo_core.trace.codec import VALUE_CLASSES, equal
from omni_grpo_core.trace.compare import compare, compare_leaves
from omni_grpo_core.trace.fingerprint import fingerprint
from omni_grpo_core.trace.leaves import Numbers, Scalar, leaves
from omni_grpo_core.trace.runs import parse_runs, runs
from omni_grpo_core.trace.store import load_trace, save_trace
from omni_grpo_core.types import StageRecord, Trace

Strategy = st.SearchStrategy[Any]

SMALL = ("Span", "MediaRef", "Malformed", "Score", "Completion", "Logits")
"""Dataclasses that occur inside arbitrary values."""

texts = st.text(st.characters(codec=None), max_size=20)
floats = st.floats()
plain = st.none() | st.booleans() | st.integers() | floats | texts


@st.composite
def tensors(draw: st.DrawFn, dtypes: tuple[str, ...] = tuple(DTYPES)) -> torch.Tensor:
    """Up to three axes of up to four, any dtype, any bits."""
    dtype = DTYPES[draw(st.sampled_from(dtypes))]
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    size = math.prod(shape) * dtype.itemsize
    raw = bytearray(draw(st.binary(min_size=size, max_size=size)))
    if dtype == torch.bool:
        return torch.tensor([byte % 2 == 1 for byte in raw], dtype=dtype).reshape(shape)
    if not raw:
        return torch.zeros(shape, dtype=dtype)
    return torch.frombuffer(raw, dtype=dtype).clone().reshape(shape)


values = st.recursive(
    plain | tensors() | st.deferred(lambda: st.one_of([instances[name] for name in SMALL])),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(texts | st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)


def strategy_for(hint: Any) -> Strategy:
    """A strategy for a field's type, so that a dataclass added to types.py is tested too."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is torch.Tensor:
        return tensors()
    if hint is Any or isinstance(hint, TypeVar):
        return values
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin in (Union, python_types.UnionType):
        return st.one_of([strategy_for(argument) for argument in arguments])
    if origin is tuple:
        return st.lists(strategy_for(arguments[0]), max_size=3).map(tuple)
    if origin is Mapping:
        return st.dictionaries(*map(strategy_for, arguments), max_size=3)
    simple: dict[Any, Strategy] = {
        int: st.integers(),
        float: floats,
        str: texts,
        bool: st.booleans(),
        type(None): st.none(),
    }
    if hint in simple:
        return simple[hint]
    return st.deferred(lambda: instances[hint.__name__])


def building(kind: type) -> Strategy:
    hints = get_type_hints(kind, localns={"Tensor": torch.Tensor})
    names = [field.name for field in dataclasses.fields(kind)]
    return st.builds(kind, **{name: strategy_for(hints[name]) for name in names})


instances: dict[str, Strategy] = {name: building(kind) for name, kind in VALUE_CLASSES.items()}


def saved_and_loaded(trace: Trace) -> Trace:
    with tempfile.TemporaryDirectory() as folder:
        save_trace(trace, Path(folder) / "trace")
        return load_trace(Path(folder) / "trace")


@given(instances["Trace"])
@settings(max_examples=settings().max_examples // 2)
def test_saving_and_loading_a_trace_is_the_identity(trace: Trace) -> None:
    loaded = saved_and_loaded(trace)
    assert equal(loaded, trace)
    assert list(loaded.header) == list(trace.header)


@pytest.mark.parametrize("name", sorted(VALUE_CLASSES))
@given(data=st.data())
@settings(max_examples=settings().max_examples // 10)
def test_saving_and_loading_any_dataclass_is_the_identity(name: str, data: st.DataObject) -> None:
    value = data.draw(instances[name])
    trace = Trace({}, (StageRecord("sample", value, (), 0.0),))
    assert equal(saved_and_loaded(trace), trace)


@given(values, values)
def test_equal_is_equality(a: object, b: object) -> None:
    assert equal(a, a)
    assert equal(a, b) == equal(b, a)


@given(instances["Trace"])
@settings(max_examples=settings().max_examples // 3)
def test_a_trace_never_differs_from_itself(trace: Trace) -> None:
    assert compare(trace, trace).verdict == "exact"
    assert not any(stage.differences for stage in compare(trace, trace).stages)


integers = st.one_of(
    st.lists(st.integers(-3, 3)),
    st.lists(st.integers()),
    st.lists(
        st.builds(
            lambda start, step, count: [start + step * i for i in range(count)],
            st.integers(0, 99),
            st.integers(-2, 2),
            st.integers(1, 9),
        ),
        max_size=5,
    ).map(lambda parts: [number for part in parts for number in part]),
)


@given(integers)
def test_runs_parse_back_to_the_same_integers(numbers: list[int]) -> None:
    assert parse_runs(" ".join(map(str, runs(numbers))), len(numbers)) == numbers


@given(st.lists(st.integers(0, 9), max_size=80))
def test_ids_with_their_text_parse_back_to_the_same_ids(ids: list[int]) -> None:
    words = ["<|a|>", "\n", "b", ' "c" ', "\\", "3×4", "\u2028", "[1]: ", "1 2", "é"]
    value = {"input_ids": torch.tensor(ids, dtype=torch.int64)}
    text = format_golden("batch", value, decode=lambda some: "".join(words[i] for i in some))
    leaf = parse_golden(text).leaves["input_ids"]
    assert isinstance(leaf, Numbers)
    assert leaf.parts[0].tolist() == ids
    assert all(words[i] == word for i, word in leaf.words.items())


@given(values, st.dictionaries(texts, texts, max_size=3))
@example({"logprobs": (1000000001.0, math.nan)}, {})
def test_golden_text_parses_back(value: object, header: dict[str, str]) -> None:
    text = format_golden("sample", value, header)
    golden = parse_golden(text)
    assert golden.header == header
    assert list(golden.leaves) == list(leaves(value))
    # a golden stores a file's name without its folders
    was = {p: summarise(p, x) if isinstance(x, Scalar) else x for p, x in leaves(value).items()}
    differing = compare_leaves(was, golden.leaves)
    assert [d.sentence for d in differing if d.verdict == "differs"] == []
    assert compare_goldens(golden, parse_golden(text)).differences == ()


def finite(limit: float) -> Strategy:
    return st.lists(st.floats(-limit, limit, width=32), min_size=65, max_size=65)


@given(finite(1e3), finite(1e3))
def test_fingerprints_are_linear(a: list[float], b: list[float]) -> None:
    x, y = (torch.tensor(numbers, dtype=torch.float64) for numbers in (a, b))
    both = fingerprint(2 * x - y).projections
    parts = zip(fingerprint(x).projections, fingerprint(y).projections, strict=True)
    # float64 sums of 65 numbers up to 3e3, in any order: 65 * 3e3 * 2**-52 < 1e-10
    assert all(abs(s - (2 * p - q)) < 1e-9 for s, (p, q) in zip(both, parts, strict=True))


@given(tensors(), tensors(), st.booleans())
def test_fingerprints_of_small_tensors_are_equal_if_and_only_if_the_tensors_are(
    a: torch.Tensor, b: torch.Tensor, same_shape: bool
) -> None:
    if same_shape and a.numel() == b.numel():
        b = b.to(a.dtype).reshape(a.shape)
    alike = equal(dataclasses.asdict(fingerprint(a)), dataclasses.asdict(fingerprint(b)))
    assert alike == equal(a, b)
    assert equal(dataclasses.asdict(fingerprint(a)), dataclasses.asdict(fingerprint(a.clone())))


changes: list[Callable[[torch.Tensor, int], None]] = [
    lambda x, i: x.__setitem__(i, x[i] + 1.0),
    lambda x, i: x.__setitem__(i, -x[i]),
    lambda x, i: x.__setitem__(i, math.nan),
]


@given(st.integers(65, 5000), st.integers(0, 4999), st.sampled_from(changes), st.integers(0, 99))
def test_one_changed_element_never_escapes_a_fingerprint(
    size: int, place: int, change: Callable[[torch.Tensor, int], None], seed: int
) -> None:
    before = torch.randn(size, generator=torch.Generator().manual_seed(seed)) + 3
    before[place % size] = 2.0
    after = before.clone()
    change(after, place % size)
    goldens = [parse_golden(format_golden("media", {"x": x})) for x in (before, after)]
    assert compare_goldens(goldens[0], goldens[1]).verdict == "differs"


@given(tensors(tuple(FLOATS)))
def test_a_tensor_is_within_tolerance_of_itself_through_text(tensor: torch.Tensor) -> None:
    golden = parse_golden(format_golden("media", {"x": tensor}))
    assert compare_leaves(leaves({"x": tensor}), golden.leaves) == [] or tensor.dtype.itemsize == 8
