"""Whether values have the types that the fields of a dataclass declare.

A checksum only shows that a file was not altered after it was written, not that the writer was
correct, so values that are read back are also checked against these types.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch

from omni_grpo_core.io.strict import type_name

Misfit = tuple[str, str, str]
"""Place, value found, type wanted."""
_LONGEST = 60


@cache
def field_types(kind: type) -> Mapping[str, Any]:
    """The declared types of a dataclass's fields, by name, in order; without class variables."""
    hints = get_type_hints(kind, localns={"Tensor": torch.Tensor})
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def misfit(value: object, hint: Any, where: str) -> Misfit | None:
    """The first place in ``value``, named ``where``, that does not have the type ``hint``, or
    ``None``. As in annotations, an ``int`` is a valid ``float``, and a ``bool`` is both.

    >>> misfit((1, "2"), tuple[int, ...], "ids")
    ('ids[1]', "'2'", 'int')
    >>> misfit({"text": 0.5}, Mapping[str, float], "grad_norms")
    """
    origin, members = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        tried = [misfit(value, member, where) for member in members]
        if None in tried:
            return None
        # an error inside a container says more than that the container is not None
        deeper = [one for one in tried if one is not None and one[0] != where]
        return deeper[0] if deeper else (where, _shown(value), _named(hint))
    if origin is tuple and isinstance(value, tuple):
        inner = ((f"{where}[{at}]", item, members[0]) for at, item in enumerate(value))
    elif origin is Mapping and isinstance(value, Mapping):
        inner = (
            (f"{where}[{key!r}]", part, member)
            for key, item in value.items()
            for part, member in zip((key, item), members, strict=True)
        )
    else:
        return None if _plain_fits(value, hint) else (where, _shown(value), _named(hint))
    return next(
        (found for at, item, member in inner if (found := misfit(item, member, at)) is not None),
        None,
    )


def value_misfit(kind: type, values: Mapping[str, object], where: str) -> Misfit | None:
    """The same for all fields of a dataclass, none of them missing and no others."""
    hints = field_types(kind)
    if values.keys() != hints.keys():
        given = ", ".join(map(str, values)) or "nothing"
        return (
            where,
            f"a {kind.__name__} of {given}",
            f"a {kind.__name__} of {', '.join(hints)}",
        )
    found = (misfit(values[name], hint, f"{where}.{name}") for name, hint in hints.items())
    return next((one for one in found if one is not None), None)


def _plain_fits(value: object, hint: Any) -> bool:
    if hint is Any or isinstance(hint, TypeVar):
        return True
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if hint is float:
        return isinstance(value, float | int)
    return isinstance(value, get_origin(hint) or hint)


def _shown(value: object) -> str:
    if value is None or isinstance(value, str | int | float):
        text = repr(value)
        return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
    return f"a {type(value).__name__}"


def _named(hint: Any) -> str:
    return type_name(hint, lambda one: "null" if one is type(None) else one.__name__)
