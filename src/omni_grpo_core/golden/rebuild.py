"""A golden's leaves back to the value, so that a stage can use it as input.

A tensor that a golden stores only as a fingerprint cannot be rebuilt; the fresh tensor replaces it
if the fingerprints match.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from omni_grpo_core.errors import TraceError
from omni_grpo_core.io.bounded import MAX_DEPTH
from omni_grpo_core.trace.codec import VALUE_CLASSES, make_value
from omni_grpo_core.trace.fingerprint import Fingerprint
from omni_grpo_core.trace.leaves import Kind, Leaf, Numbers, Ranking, Scalar, Spans

_STEP = re.compile(r'\.?([A-Za-z_]\w*)|\[(\d+)\]|\[("(?:[^"\\]|\\.)*")\]')


class Lost(Exception):
    """A golden holds too little to rebuild its value, or something that does not belong in it; the
    text is the leaf's path."""


def rebuild(leaves: Mapping[str, Leaf], stand_ins: Mapping[str, Leaf] | None = None) -> object:
    """The value with these leaves. ``stand_ins``: fresh leaves by path, in place of fingerprints.

    Raises :class:`Lost` for a fingerprint without a stand-in, and for leaves that do not fit their
    dataclass.

    >>> from omni_grpo_core.trace.leaves import leaves
    >>> from omni_grpo_core.types import Completion, Rollout
    >>> rollout = Rollout((Completion("a", 0, (5, 2), "red", "stop", (-0.5, -0.25)),), 1, 0.0, 0)
    >>> rebuild(leaves(rollout)) == rollout
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
    if isinstance(leaf, Kind) and leaf.name in VALUE_CLASSES:
        try:
            return make_value(VALUE_CLASSES[leaf.name], parts, path)
        except TraceError as error:  # written by another version, or altered
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
    """Rankings are computed from the logits next to them."""
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
