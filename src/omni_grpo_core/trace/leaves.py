"""A value split into named leaves, so that any two values can be compared leaf by leaf.

``Batch`` becomes ``rows[0].sample_id``, ``rows[0].input_ids``, ``rows[0].spans``, … in the order
in which the fields are declared. The leaf of the whole value is ``self``.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from omni_grpo_core.errors import TraceError
from omni_grpo_core.trace import DTYPES, INTEGERS, dtype_name
from omni_grpo_core.trace.fingerprint import Fingerprint
from omni_grpo_core.types import Logits, Span

TOP = 20
"""Tokens kept per row of logits."""


@dataclass(frozen=True, slots=True)
class Kind:
    """The name of a dataclass, or an empty ``()`` or ``{}``."""

    name: str


@dataclass(frozen=True, slots=True)
class Scalar:
    value: bool | int | float | str | None


@dataclass(frozen=True, slots=True)
class Spans:
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Numbers:
    """Tensors of one dtype, with every element. ``dtype`` is torch's name, or ``int`` or ``float``
    if the numbers were a plain tuple. ``words``: the known text of single ids."""

    dtype: str
    parts: tuple[torch.Tensor, ...]
    words: Mapping[int, str] = dataclasses.field(default_factory=dict)

    @property
    def integral(self) -> bool:
        return self.dtype == "int" or self.dtype in INTEGERS


@dataclass(frozen=True, slots=True)
class Ranking:
    """The likeliest next tokens of one row: ids and logprobs, likeliest first; entropy in nats."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    logsumexp: float
    entropy: float
    words: Mapping[int, str] = dataclasses.field(default_factory=dict, compare=False)

    @property
    def margin(self) -> float:
        """Logprob of the first minus that of the second, in nats."""
        return self.logprobs[0] - self.logprobs[1] if len(self.logprobs) > 1 else 0.0


Leaf = Kind | Scalar | Spans | Numbers | Ranking | Fingerprint


def leaves(value: object) -> dict[str, Leaf]:
    """Every leaf of ``value`` by path, in order.

    Raises :class:`~omni_grpo_core.errors.TraceError` for anything that is not a value.

    >>> leaves({"loss": 0.5, "steps": (1, 2)})["loss"]
    Scalar(value=0.5)
    >>> list(leaves({"loss": 0.5, "steps": (1, 2)}))
    ['loss', 'steps']
    """
    return {path or "self": leaf for path, leaf in _walk(value, "")}


def _walk(value: object, path: str) -> Iterator[tuple[str, Leaf]]:
    if isinstance(value, np.generic):  # before float: numpy's float64 is one
        value = value.item()
    if isinstance(value, np.ndarray):
        value = _tensor(value, path)
    if value is None or isinstance(value, bool | int | float | str):
        yield path, Scalar(value)
    elif isinstance(value, torch.Tensor):
        yield path, _numbers((value,), path)
    elif isinstance(value, Mapping):
        if not value:
            yield path, Kind("{}")
        for key, item in value.items():
            yield from _walk(item, path + _key(key, path))
    elif isinstance(value, tuple | list):
        yield from _walk_sequence(value, path)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield path, Kind(type(value).__name__)
        for field in dataclasses.fields(value):
            name = f"{path}.{field.name}" if path else field.name
            yield from _walk(getattr(value, field.name), name)
        if isinstance(value, Logits) and value.values.ndim == 2 and value.values.shape[1]:
            for row, scores in enumerate(value.values):
                yield f"{path}.top[{row}]" if path else f"top[{row}]", rank(scores)
    else:
        raise TraceError(
            path or "value",
            got=f"a {type(value).__module__}.{type(value).__qualname__}",
            want="a dataclass, tuple, list, mapping, tensor, array, number or text",
            fix="pass a plain value instead",
        )


def _tensor(array: np.ndarray[Any, Any], path: str) -> torch.Tensor:
    """A numpy array, as processors return unless asked for tensors."""
    try:
        # a copy: an array may be read-only, or not in native byte order
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C", copy=True))
    except TypeError as error:
        raise TraceError(
            path or "value",
            got=f"a numpy array of {array.dtype}",
            want="one of numbers",
            fix="pass numbers, or text as a tuple",
        ) from error


def _walk_sequence(value: Sequence[object], path: str) -> Iterator[tuple[str, Leaf]]:
    if not value:
        yield path, Kind("()")
    elif all(isinstance(item, Span) for item in value):
        yield path, Spans(tuple(item for item in value if isinstance(item, Span)))
    elif all(type(item) is int and -(2**63) <= item < 2**63 for item in value):
        yield path, Numbers("int", (torch.tensor(value, dtype=torch.int64),))
    elif all(type(item) is float for item in value):
        yield path, Numbers("float", (torch.tensor(value, dtype=torch.float64),))
    elif tensors := _alike(value):
        yield path, _numbers(tensors, path)
    else:
        for number, item in enumerate(value):
            yield from _walk(item, f"{path}[{number}]")


def _alike(value: Sequence[object]) -> tuple[torch.Tensor, ...]:
    """The items, if they are float tensors of one dtype: a row's features are compared together."""
    tensors = tuple(item for item in value if isinstance(item, torch.Tensor))
    alike = len(tensors) == len(value) and len({tensor.dtype for tensor in tensors}) == 1
    return tensors if alike and tensors[0].is_floating_point() else ()


def _numbers(tensors: tuple[torch.Tensor, ...], path: str) -> Numbers:
    dtype = dtype_name(tensors[0])
    if dtype not in DTYPES:
        raise TraceError(
            path or "value",
            got=f"a tensor of {dtype}",
            want=f"one of {', '.join(DTYPES)}",
            fix="record it as one of these",
        )
    return Numbers(dtype, tuple(tensor.detach().cpu() for tensor in tensors))


def _key(key: object, path: str) -> str:
    if isinstance(key, str) and re.fullmatch(r"[A-Za-z_]\w*", key, re.ASCII):
        return f".{key}" if path else key
    return f"[{json.dumps(key if isinstance(key, str) else repr(key), ensure_ascii=False)}]"


def rank(scores: torch.Tensor) -> Ranking:
    """The top of one row of logits, (V,), in float64.

    >>> top = rank(torch.tensor([0.0, 1.0, -1.0]))
    >>> top.ids, round(top.margin, 6), round(top.entropy, 3)
    ((1, 0, 2), 1.0, 0.832)
    """
    logsumexp = torch.logsumexp(scores.detach().cpu().to(torch.float64), dim=-1)
    logprobs = scores.detach().cpu().to(torch.float64) - logsumexp
    # equal scores are in order of id: topk leaves their order to the platform
    order = torch.sort(logprobs, descending=True, stable=True).indices[:TOP]
    # 0 · log 0 is 0: an impossible token adds no entropy
    entropy = torch.special.entr(logprobs.exp()).sum()
    return Ranking(
        ids=tuple(order.tolist()),
        logprobs=tuple(logprobs[order].tolist()),
        logsumexp=float(logsumexp),
        entropy=float(entropy),
    )
