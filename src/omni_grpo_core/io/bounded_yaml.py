"""YAML text -> plain data, as strictly as :mod:`~omni_grpo_core.io.bounded` reads JSON."""

from __future__ import annotations

import re
from collections.abc import Hashable
from itertools import chain
from typing import Any

import yaml

from omni_grpo_core.io.bounded import (
    MAX_DEPTH,
    MAX_DIGITS,
    Unreadable,
    refuse_half_characters,
)

MAX_YAML_BYTES = 1 << 20
"""PyYAML reads about 100 kB a second; settings are a few of them."""
MAX_NODES = 100_000
"""Values of a YAML file, references counted each time: ten lines can stand for a billion."""


def yaml_value(text: str) -> Any:
    """What a YAML text, or a JSON one, says; nothing but plain data.

    >>> yaml_value("settings: {group_size: 8}")
    {'settings': {'group_size': 8}}

    Raises:
        Unreadable: no YAML; a key twice in one mapping, values more than :data:`MAX_DEPTH` deep or
            more than :data:`MAX_NODES`, half a surrogate pair.
    """
    loader = None
    try:
        loader = _StrictLoader(text)
        node = loader.get_single_node()
        _refuse_sprawl(node)
        value = None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        got = " ".join(str(error.problem or error.context).split())
        raise Unreadable(f"no YAML ({got})", None if mark is None else mark.line + 1) from None
    except RecursionError:
        raise Unreadable(f"values more than {MAX_DEPTH} deep") from None
    except yaml.YAMLError as error:
        raise Unreadable(f"no YAML ({' '.join(str(error).split())[:200]})") from None
    finally:
        if loader is not None:
            loader.dispose()
    refuse_half_characters(value)
    return value


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's own takes the last of two equal keys without a word, as it takes ``010`` for 8 and
    ``1:04`` for 64; of a scalar whose tag does not fit, it raises whatever comes of that."""

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        line = node.start_mark.line + 1
        try:
            value = super().construct_object(node, deep=deep)
        except (Unreadable, yaml.YAMLError, RecursionError):
            raise
        except Exception:
            kind = node.tag.rpartition(":")[2]
            raise Unreadable(f"{str(node.value)[:60]!r} as {kind}", line) from None
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            digits = node.value.lstrip("+-")
            if ":" in digits:
                raise Unreadable(f"{node.value[:60]!r}, which is {value} or a time", line)
            if isinstance(value, int) and re.fullmatch("0[0-7_]+", digits):
                raise Unreadable(f"{node.value[:60]!r}, which is {value} or {int(digits)}", line)
            if isinstance(value, int) and abs(value) >= 10**MAX_DIGITS:
                raise Unreadable(f"a number of more than {MAX_DIGITS} digits", line)
        return value

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # refused below
            if key in seen:
                raise Unreadable(f"the key {key!r} twice", key_node.start_mark.line + 1)
            seen.add(key)
        found: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return found


def _refuse_sprawl(root: Any) -> None:
    """Before anything is made of a YAML text: what is referred to is counted once, and then known;
    merged or not, it may be copied each time."""
    known: dict[int, tuple[int, int]] = {}

    def measured(node: Any, depth: int) -> tuple[int, int]:
        """Values, and how deep they go."""
        if depth > MAX_DEPTH:  # a list within itself too
            raise Unreadable(f"values more than {MAX_DEPTH} deep")
        if id(node) not in known:
            inside = node.value if isinstance(node, yaml.CollectionNode) else ()
            if isinstance(node, yaml.MappingNode):
                inside = chain.from_iterable(inside)
            sizes = [measured(inner, depth + 1) for inner in inside]
            known[id(node)] = (
                1 + sum(size for size, _ in sizes),
                1 + max((deep for _, deep in sizes), default=0),
            )
        size, deep = known[id(node)]
        if depth - 1 + deep > MAX_DEPTH:
            raise Unreadable(f"values more than {MAX_DEPTH} deep")
        if size > MAX_NODES:
            raise Unreadable(f"more than {MAX_NODES} values, each reference counted")
        return size, deep

    if root is not None:
        measured(root, 1)
