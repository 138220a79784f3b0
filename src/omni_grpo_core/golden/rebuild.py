"""A golden's leaves back to the value, so that a stage can be fed with it.

What a golden keeps only as a fingerprint cannot be rebuilt; there the fresh tensor steps in, if the
fingerprint says that it is the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from omni_grpo_core.errors import TraceError
from omni_grpo_core.io.bounded import MAX_DEPTH
from omni_grpo_core.trace.codec import NOUNS, make_noun
from omni_grpo_core.trace.fingerprint import Fingerprint
from omni_grpo_core.trace.leaves import Kind, Leaf, Numbers, Ranking, Scalar, Spans

_STEP = re.compile(r'\.?([A-Za-z_]\w*)|\[(\d+)\]|\[("(?:[^"\\]|\\.)*")\]')


class Lost(Exception):
    """A golden does not hold enough to rebuild its value, or what no such value holds; the text is
    the leaf's path."""


def rebuild(leaves: Mapping[str, Leaf], stand_ins: Mapping[str, Leaf] | None = None) -> object:
    """The value that these are the leaves of. ``stand_ins`` are fresh leaves by path, for
    fingerprints.

    Raises :class:`Lost` for a fingerprint without a stand-in, and for a noun that its leaves do not
    fit.

    >>> from omni_grpo_core.trace.leaves import leaves
    >>> from omni_grpo_core.types import Completion, Rollout
    >>> said = Rollout((Completion("a", 0, (5, 2), "red", "stop", (-0.5, -0.25)),), 1, 0.0, 0)
    >>> rebuild(leaves(said)) == said
    True
    """
    root: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node = root
        steps = [] if path == "self" else _steps(path)
        if len(steps) > MAX_DEPTH:
            raise Lost(path[:80])
        for step in steps:
            node = node.setdefault("parts", {}).setdefault(step, {})
        node["leaf"] = (path, leaf)
    return _value(root, stand_ins or {})


def _steps(path: str) -> list[str | int]:
    return [
        int(match[2]) if match[2] is not None else match[1] or json.loads(match[3])
        for match in _STEP.finditer(path)
    ]


def _value(node: Mapping[str, Any], stand_ins: Mapping[str, Leaf]) -> Any:
    path, leaf = node.get("leaf", ("", None))
    parts = {
        step: _value(part, stand_ins)
        for step, part in node.get("parts", {}).items()
        if not _derived(part)
    }
    if isinstance(leaf, Kind) and leaf.name in NOUNS:
        try:
            return make_noun(NOUNS[leaf.name], parts, path)
        except TraceError as error:  # of another version's shape, or altered
            raise Lost(error.item) from error
    if parts:
        if all(isinstance(step, int) for step in parts):
            return tuple(parts[step] for step in sorted(parts))
        return parts
    if isinstance(leaf, Kind):
        return () if leaf.name == "()" else {}
    return _plain(
        path, stand_ins[path] if isinstance(leaf, Fingerprint) and path in stand_ins else leaf
    )


def _derived(node: Mapping[str, Any]) -> bool:
    """Rankings are made from logits that stand beside them."""
    inner = node.get("parts", {})
    return isinstance(node.get("leaf", ("", None))[1], Ranking) or (
        bool(inner) and all(_derived(part) for part in inner.values())
    )


def _plain(path: str, leaf: Leaf | None) -> Any:
    match leaf:
        case Scalar(value=value):
            return value
        case Spans(spans=spans):
            return spans
        case Numbers(dtype="int" | "float", parts=(only,)):
            return tuple(only.tolist())
        case Numbers(parts=(only,)):
            return only
        case Numbers(parts=parts):
            return parts
    raise Lost(path)
