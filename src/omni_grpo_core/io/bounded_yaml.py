"""YAML text -> plain data, as strict as :mod:`~omni_grpo_core.io.bounded` is on JSON."""

from __future__ import annotations

import re
from collections.abc import Hashable
from itertools import chain
from typing import Any

import yaml

from omni_grpo_core.errors import one_line
from omni_grpo_core.io.bounded import (
    MAX_DEPTH,
    MAX_DIGITS,
    Unreadable,
    refuse_lone_surrogates,
)

MAX_YAML_BYTES = 1 << 20
"""PyYAML reads about 100 kB a second; settings take a few kB."""
MAX_NODES = 100_000
"""Values of a YAML file, every reference counted: ten lines can expand to a billion."""


def yaml_value(text: str) -> Any:
    """Parse a YAML (or JSON) text into plain data.

    >>> yaml_value("settings: {group_size: 8}")
    {'settings': {'group_size': 8}}

    Raises:
        Unreadable: not YAML; a duplicate key in a mapping, values nested deeper than
            :data:`MAX_DEPTH` or more than :data:`MAX_NODES`, a lone surrogate.
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
        raise Unreadable(f"not YAML ({got})", None if mark is None else mark.line + 1) from None
    except RecursionError:
        raise Unreadable(f"values nested more than {MAX_DEPTH} deep") from None
    except yaml.YAMLError as error:
        raise Unreadable(f"not YAML ({one_line(error, 200)})") from None
    finally:
        if loader is not None:
            loader.dispose()
    refuse_lone_surrogates(value)
    return value


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's own silently takes the last of equal keys, reads ``010`` as 8 and ``1:04`` as 64,
    and raises anything at all for a scalar that does not fit its tag."""

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
                raise Unreadable(f"duplicate key {key!r}", key_node.start_mark.line + 1)
            seen.add(key)
        found: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return found


def _refuse_sprawl(root: Any) -> None:
    """Bound the expanded size before constructing anything: each node is measured once but counted
    per reference, since references (merged or not) may be copied each time."""
    known: dict[int, tuple[int, int]] = {}

    def measured(node: Any, depth: int) -> tuple[int, int]:
        """(number of values, depth)."""
        if depth > MAX_DEPTH:  # also a list that contains itself
            raise Unreadable(f"values nested more than {MAX_DEPTH} deep")
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
            raise Unreadable(f"values nested more than {MAX_DEPTH} deep")
        if size > MAX_NODES:
            raise Unreadable(f"more than {MAX_NODES} values, counting every reference")
        return size, deep

    if root is not None:
        measured(root, 1)
