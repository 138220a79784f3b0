"""Settings from JSON or YAML, read strictly: an unknown key is an error."""

from __future__ import annotations

import difflib
import math
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from omni_grpo_core.errors import ConfigError
from omni_grpo_core.io.bounded import Unreadable, mapping_in

_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
"""Numbers such as 1e-5, which PyYAML, following YAML 1.1, reads as text."""
_SWITCH = {False: "off", True: "on"}
"""Words that it reads as booleans."""


def merge(settings: Any, values: Mapping[str, Any], item: str) -> Any:
    """``settings`` (an instance of any of the project's settings dataclasses, or such a class) with
    ``values`` in its fields.

    Raises:
        ConfigError: an unknown key, a value of the wrong type or refused by the class itself, or,
            given a class, a missing field without a default.
    """
    is_class = isinstance(settings, type)
    hints = get_type_hints(settings if is_class else type(settings))
    known = [entry.name for entry in fields(settings)]
    changes: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            raise ConfigError(
                item,
                got=f"unknown key {key!r}",
                want=", ".join(known),
                fix=f"did you mean {near[0]!r}?" if near else "remove it",
            )
        current = None if is_class else getattr(settings, key)
        changes[key] = _converted(current, value, hints[key], f"{item}: {key}")
    if not is_class:
        return _made(item, replace, settings, **changes)
    for entry in fields(settings):
        needed = entry.default is MISSING and entry.default_factory is MISSING
        if needed and entry.name not in changes:
            raise ConfigError(
                item, got=f"no {entry.name!r}", want=_named(hints[entry.name]), fix="add it"
            )
    return _made(item, settings, **changes)


def _made(item: str, make: Callable[..., Any], *given: Any, **changes: Any) -> Any:
    """Make settings; a class that refuses a value does not know which file holds it."""
    try:
        return make(*given, **changes)
    except ConfigError as error:
        file = item.partition(": ")[0]
        if error.item.startswith(file):
            raise
        raise ConfigError(
            f"{file}: {error.item}", got=error.got, want=error.want, fix=error.fix
        ) from None


def _converted(current: Any, value: Any, hint: Any, item: str) -> Any:
    """``value`` as the type ``hint``: a mapping is merged into the current settings (or into their
    defaults, if there are none), a list becomes a tuple."""
    nested = _nested(hint)
    if nested is not None and isinstance(value, Mapping):
        return merge(current if is_dataclass(current) else nested, value, item)
    if get_origin(hint) is Mapping and isinstance(value, dict):
        (_, entry) = get_args(hint)
        return {
            str(name): _converted(None, inner, entry, f"{item}: {name}")
            for name, inner in value.items()
        }
    if get_origin(hint) is tuple and isinstance(value, list):
        value = tuple(value)
    if isinstance(value, str) and _EXPONENT.fullmatch(value) and not _fits(value, hint):
        value = float(value)
    if isinstance(value, bool) and not _fits(value, hint) and _fits(_SWITCH[value], hint):
        value = _SWITCH[value]
    if not _fits(value, hint):
        raise ConfigError(item, got=repr(value), want=_named(hint), fix="correct the value")
    return value


def _nested(hint: Any) -> Any:
    """The settings class that a hint allows, if any."""
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return next((member for member in members if is_dataclass(member)), None)


def read_mapping(path: Path) -> Mapping[str, Any]:
    """The mapping in a JSON or YAML file. Raises ``ConfigError`` for anything else."""
    try:
        # a recorder in somebody's trainer needs the types only, and no PyYAML
        from omni_grpo_core.io.bounded_yaml import MAX_YAML_BYTES, yaml_value

        return mapping_in(path, yaml_value, MAX_YAML_BYTES)  # JSON is YAML
    except Unreadable as error:
        raise ConfigError(
            error.place(path),
            got=error.got,
            want="a mapping of settings in a JSON or YAML file",
            fix="correct the file",
        ) from None


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) in (Union, types.UnionType):
        return any(_fits(value, member) for member in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is tuple:
        (member, *_) = get_args(hint)
        return isinstance(value, tuple) and all(_fits(one, member) for one in value)
    if get_origin(hint) is Mapping:
        return False  # a mapping was handled before
    if hint is float:
        # no setting makes sense when non-finite, and infinity would pass as "at least 0"
        return type(value) in (int, float) and abs(value) < math.inf
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def type_name(hint: Any, plain: Callable[[Any], str]) -> str:
    """A declared type in words; ``plain`` gives those for a single class.

    >>> type_name(tuple[int, ...] | Literal["all"], lambda one: one.__name__)
    "a list of int or 'all'"
    """
    members = get_args(hint)
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, members))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(type_name(member, plain) for member in members)
    if get_origin(hint) is tuple:
        return f"a list of {type_name(members[0], plain)}"
    if get_origin(hint) is Mapping:
        return f"a mapping of names to {type_name(members[1], plain)}"
    return plain(hint)


def _named(hint: Any) -> str:
    return type_name(hint, _setting)


def _setting(hint: Any) -> str:
    if hint is float:
        return "a finite float"
    if is_dataclass(hint):
        return f"{{}} or settings of {', '.join(entry.name for entry in fields(hint))}"
    return "nothing" if hint is type(None) else hint.__name__
