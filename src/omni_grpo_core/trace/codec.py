"""Values to JSON and tensors, and back to equal values. Nothing is ever pickled.

A value is a frozen dataclass of :mod:`omni_grpo_core.types` or :mod:`omni_grpo_core.trace.calls`,
a tuple, list or mapping of values, a tensor, a number, a string, a boolean or ``None``. In JSON a
tuple is an array and a mapping with plain string keys an object; anything that JSON cannot express
is an object with one ``$`` key::

    {"$type": "Span", "modality": "video", "item": 0, "start": 12, "length": 8}
    {"$tensor": "batch.input_ids", "dtype": "int64", "shape": [2, 37], "summary": "…"}
    {"$float": "nan"}    {"$list": […]}    {"$map": [[key, value], …]}
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from omni_grpo_core import types
from omni_grpo_core.errors import TraceError
from omni_grpo_core.trace import DTYPES, dtype_name, same_tensor
from omni_grpo_core.trace import calls as observed
from omni_grpo_core.trace.describe import summary
from omni_grpo_core.trace.fields import field_types, value_misfit

VALUE_CLASSES: dict[str, type] = {
    name: kind
    for module in (types, observed)
    for name, kind in vars(module).items()
    if isinstance(kind, type) and dataclasses.is_dataclass(kind)
}
"""Every dataclass that can be stored, by name."""

_FLOAT_WORDS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def encode(
    value: object, where: str = "value", known: dict[int, Any] | None = None
) -> tuple[Any, dict[str, torch.Tensor]]:
    """``value`` as JSON data and the tensors it refers to by name, on the CPU.

    ``where`` names the value in tensor names and messages. ``known``: by ``id``, what tensors
    encoded before became, which are referred to by their first name; added to. Raises
    :class:`~omni_grpo_core.errors.TraceError` for anything that is not a value, including model
    parameters: a trace never holds weights.

    >>> encode({"spans": (types.Span("video", 0, 12, 8),), "loss": float("inf")})[0]
    ... # doctest: +NORMALIZE_WHITESPACE
    {'spans': [{'$type': 'Span', 'modality': 'video', 'item': 0, 'start': 12, 'length': 8}],
     'loss': {'$float': 'inf'}}
    """
    tensors = _Tensors({} if known is None else known, {})
    return _encode(value, where, tensors), tensors.named


class _Tensors(NamedTuple):
    known: dict[int, Any]
    named: dict[str, torch.Tensor]


def _encode(value: object, where: str, tensors: _Tensors) -> Any:
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": str(float(value))}
    if isinstance(value, torch.Tensor):
        if id(value) not in tensors.known:
            tensors.known[id(value)] = _encode_tensor(value, where, tensors.named)
        return tensors.known[id(value)]
    if type(value) is tuple or type(value) is list:
        items = [_encode(item, f"{where}[{i}]", tensors) for i, item in enumerate(value)]
        return items if type(value) is tuple else {"$list": items}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: _encode(item, f"{where}.{key}", tensors) for key, item in value.items()}
        pairs = (
            [_encode(key, f"{where}.key", tensors), _encode(item, f"{where}[{i}]", tensors)]
            for i, (key, item) in enumerate(value.items())
        )
        return {"$map": list(pairs)}
    if VALUE_CLASSES.get(type(value).__name__) is type(value):
        fields = (field.name for field in dataclasses.fields(value))  # type: ignore[arg-type]
        return {
            "$type": type(value).__name__,
            **{name: _encode(getattr(value, name), f"{where}.{name}", tensors) for name in fields},
        }
    raise TraceError(
        where,
        got=f"a {type(value).__module__}.{type(value).__qualname__}",
        want="a dataclass of omni_grpo_core.types, tuple, list, mapping, tensor, number or text",
        fix="record a plain value instead",
    )


def _encode_tensor(tensor: torch.Tensor, where: str, tensors: dict[str, torch.Tensor]) -> Any:
    dtype = dtype_name(tensor)
    plain = tensor.layout == torch.strided and tensor.device.type != "meta"
    if isinstance(tensor, torch.nn.Parameter) or dtype not in DTYPES or not plain:
        kind = "model parameter" if isinstance(tensor, torch.nn.Parameter) else "tensor"
        raise TraceError(
            where,
            got=f"a {kind} ({dtype}, {tensor.layout}, {tensor.device})",
            want=f"a dense tensor of {', '.join(DTYPES)}",
            fix="record the values that matter, as a plain tensor",
        )
    # a mapping key may be a file name that is not UTF-8, which safetensors rejects
    name = where.encode("utf-8", "backslashreplace").decode()
    while name in tensors:  # a mapping key may look like the path of another value
        name += "'"
    # a copy: a recorded tensor must not change when a later stage writes in place, and safetensors
    # rejects tensors that share memory
    tensors[name] = tensor.detach().to("cpu", copy=True).contiguous()
    return {
        "$tensor": name,
        "dtype": dtype,
        "shape": list(tensor.shape),
        "summary": summary(tensors[name]),
    }


def decode(data: Any, tensors: Mapping[str, torch.Tensor], where: str = "value") -> Any:
    """The inverse of :func:`encode`. Raises :class:`~omni_grpo_core.errors.TraceError` naming the
    invalid place under ``where``.

    >>> decode(*encode((1, [2.5], {"a": None})))
    (1, [2.5], {'a': None})
    """
    if data is None or isinstance(data, str | int | float):
        return data
    if isinstance(data, list):
        return tuple(decode(item, tensors, f"{where}[{i}]") for i, item in enumerate(data))
    mark = next((key for key in data if key.startswith("$")), None)
    if mark is None:
        return {key: decode(item, tensors, f"{where}.{key}") for key, item in data.items()}
    content = data[mark]
    if mark == "$type" and isinstance(content, str) and content in VALUE_CLASSES:
        return _decode_dataclass(VALUE_CLASSES[content], data, tensors, where)
    if mark == "$tensor" and isinstance(content, str):
        return _decode_tensor(data, tensors, where)
    if len(data) == 1:
        if mark == "$float" and isinstance(content, str) and content in _FLOAT_WORDS:
            return _FLOAT_WORDS[content]
        if mark == "$list" and isinstance(content, list):
            return list(decode(content, tensors, where))
        if mark == "$map" and isinstance(content, list):
            return _decode_map(content, tensors, where)
    raise TraceError(
        where,
        got=f"{mark}: {content!r}"[:80],
        want="a kind of value that this version knows",
        fix="read it with the version that wrote it, or record it again",
    )


def _decode_map(
    pairs: list[Any], tensors: Mapping[str, torch.Tensor], where: str
) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for number, pair in enumerate(pairs):
        at = f"{where}[{number}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise _invalid(at, "something other than a pair", "a key and its value")
        key, item = (decode(part, tensors, at) for part in pair)
        if not _is_key(key):
            raise _invalid(at, f"a {type(key).__name__} as a key", "a number, text or tuple")
        if key in found:
            raise _invalid(at, f"the key {key!r} twice", "each key once")
        found[key] = item
    return found


def _is_key(key: object) -> bool:
    if isinstance(key, tuple):
        return all(map(_is_key, key))
    return key is None or isinstance(key, str | int | float)


def _decode_dataclass(
    kind: type, data: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], where: str
) -> Any:
    # only its own fields: a mapping key may begin with a dollar, a field may not
    values = {
        name: decode(item, tensors, f"{where}.{name}") if name in field_types(kind) else None
        for name, item in data.items()
        if name != "$type"
    }
    return make_value(kind, values, where)


def make_value(kind: type, values: Mapping[str, object], where: str) -> Any:
    """A dataclass ``kind`` with these fields. Raises :class:`~omni_grpo_core.errors.TraceError`,
    naming the place, unless they are exactly its fields, with the declared types.

    >>> make_value(types.Malformed, {"what": "no answer", "where": 0}, "parsed")
    Malformed(what='no answer', where=0)
    """
    found = value_misfit(kind, values, where)
    if found is not None:
        raise _invalid(*found)
    return kind(**values)


def _invalid(where: str, got: str, want: str) -> TraceError:
    return TraceError(
        where,
        got=got,
        want=want,
        fix="record it again: it was altered, or written by another version",
    )


def _decode_tensor(
    data: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], where: str
) -> torch.Tensor:
    tensor = tensors.get(data["$tensor"])
    got = "no such tensor" if tensor is None else f"{dtype_name(tensor)} {list(tensor.shape)}"
    want = f"{data.get('dtype')} {data.get('shape')}"
    if tensor is None or got != want:
        raise TraceError(
            f"{where}: tensor {data['$tensor']!r}",
            got=got,
            want=want,
            fix="record it again: the text and the tensors belong to different traces",
        )
    return tensor


def equal(a: object, b: object) -> bool:
    """Deep equality of values: tensors by dtype, shape and elements, dataclasses field by field
    even with ``eq=False``; ``1``, ``1.0`` and ``True`` are distinct, NaN equals NaN.

    >>> equal({"ids": torch.tensor([1, 2])}, {"ids": torch.tensor([1, 2])})
    True
    >>> equal((1,), (True,))
    False
    """
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return same_tensor(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    for kind in (bool, int, float, str):
        if isinstance(a, kind):
            # subclasses (numpy's float64, enum members) are stored as their base type
            return (
                isinstance(b, kind)
                and isinstance(a, bool) == isinstance(b, bool)
                and (a == b or (a != a and b != b))
            )
    if type(a) is not type(b):
        return False
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(map(equal, a, b))
    if dataclasses.is_dataclass(a):
        return all(
            equal(getattr(a, field.name), getattr(b, field.name)) for field in dataclasses.fields(a)
        )
    return a == b
