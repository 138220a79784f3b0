"""Values to JSON and tensors, and back to equal values. Nothing is ever pickled.

A value is a frozen dataclass of :mod:`omni_grpo_core.types` or
:mod:`omni_grpo_core.trace.calls`, a tuple, list or mapping of values, a
tensor, a number, a string, a boolean or ``None``. In JSON a tuple is an array and a mapping with
plain string keys an object; whatever JSON has no shape for is an object with one ``$`` key::

    {"$type": "Span", "modality": "video", "item": 0, "start": 12, "length": 8}
    {"$tensor": "batch.input_ids", "dtype": "int64", "shape": [2, 37], "summary": "…"}
    {"$float": "nan"}    {"$list": […]}    {"$map": [[key, value], …]}
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch

from omni_grpo_core import types
from omni_grpo_core.errors import TraceError
from omni_grpo_core.trace import DTYPES, dtype_name, same_tensor
from omni_grpo_core.trace import calls as observed
from omni_grpo_core.trace.describe import summary
from omni_grpo_core.trace.fields import field_types, noun_misfit

NOUNS: dict[str, type] = {
    name: noun
    for module in (types, observed)
    for name, noun in vars(module).items()
    if isinstance(noun, type) and dataclasses.is_dataclass(noun)
}
"""Every dataclass that can be stored, by name."""

_FLOAT_WORDS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def encode(value: object, where: str = "value") -> tuple[Any, dict[str, torch.Tensor]]:
    """``value`` as JSON data and the tensors it refers to by name, on the CPU.

    ``where`` is what the value is called in tensor names and messages. Raises
    :class:`~omni_grpo_core.errors.TraceError` for anything that is not a value, parameters of a
    model among them: a trace holds what went through the weights, never the weights.

    >>> encode({"spans": (types.Span("video", 0, 12, 8),), "loss": float("inf")})[0]
    ... # doctest: +NORMALIZE_WHITESPACE
    {'spans': [{'$type': 'Span', 'modality': 'video', 'item': 0, 'start': 12, 'length': 8}],
     'loss': {'$float': 'inf'}}
    """
    tensors: dict[str, torch.Tensor] = {}
    return _encode(value, where, tensors), tensors


def _encode(value: object, where: str, tensors: dict[str, torch.Tensor]) -> Any:
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": str(float(value))}
    if isinstance(value, torch.Tensor):
        return _encode_tensor(value, where, tensors)
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
    if NOUNS.get(type(value).__name__) is type(value):
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
        kind = "parameter of a model" if isinstance(tensor, torch.nn.Parameter) else "tensor"
        raise TraceError(
            where,
            got=f"a {kind} ({dtype}, {tensor.layout}, {tensor.device})",
            want=f"a dense tensor of {', '.join(DTYPES)}",
            fix="record the values that matter, as a plain tensor",
        )
    # a key of somebody's mapping may be a file's name that is not UTF-8, which safetensors refuses
    name = where.encode("utf-8", "backslashreplace").decode()
    while name in tensors:  # a mapping key may look like the path of something else
        name += "'"
    # a copy of its own: what is recorded must not change when a later stage writes in place, and
    # safetensors refuses tensors that share memory
    tensors[name] = tensor.detach().to("cpu", copy=True).contiguous()
    return {
        "$tensor": name,
        "dtype": dtype,
        "shape": list(tensor.shape),
        "summary": summary(tensors[name]),
    }


def decode(data: Any, tensors: Mapping[str, torch.Tensor], where: str = "value") -> Any:
    """The value that :func:`encode` was given. Raises
    :class:`~omni_grpo_core.errors.TraceError` naming the place under ``where`` that is wrong.

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
    if mark == "$type" and isinstance(content, str) and content in NOUNS:
        return _decode_noun(NOUNS[content], data, tensors, where)
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
            raise _unlike(at, "what is no pair", "a key and its value")
        key, item = (decode(part, tensors, at) for part in pair)
        if not _is_key(key):
            raise _unlike(at, f"a {type(key).__name__} for a key", "a number, text or tuple")
        if key in found:
            raise _unlike(at, f"the key {key!r} twice", "each key once")
        found[key] = item
    return found


def _is_key(key: object) -> bool:
    if isinstance(key, tuple):
        return all(map(_is_key, key))
    return key is None or isinstance(key, str | int | float)


def _decode_noun(
    noun: type, data: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], where: str
) -> Any:
    # decoded by its fields: a name of somebody's mapping may begin with a dollar, a field may not
    values = {
        name: decode(item, tensors, f"{where}.{name}") if name in field_types(noun) else None
        for name, item in data.items()
        if name != "$type"
    }
    return make_noun(noun, values, where)


def make_noun(noun: type, values: Mapping[str, object], where: str) -> Any:
    """A noun of these fields. Raises :class:`~omni_grpo_core.errors.TraceError`, naming the place,
    unless they are its own and of the types that it declares.

    >>> make_noun(types.Malformed, {"what": "no answer", "where": 0}, "parsed")
    Malformed(what='no answer', where=0)
    """
    found = noun_misfit(noun, values, where)
    if found is not None:
        raise _unlike(*found)
    return noun(**values)


def _unlike(where: str, got: str, want: str) -> TraceError:
    return TraceError(
        where,
        got=got,
        want=want,
        fix="it was altered, or written by another version: record it again",
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
            fix="the text and the tensors are of two different traces: record it again",
        )
    return tensor


def equal(a: object, b: object) -> bool:
    """Deep equality of values: tensors by dtype, shape and elements, dataclasses field by field
    even where they are ``eq=False``, ``1``, ``1.0`` and ``True`` told apart, NaN equal to NaN.

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
            # subclasses (numpy's float64, enum members) are stored as what they derive from
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
