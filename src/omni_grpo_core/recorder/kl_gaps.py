"""A KL to a reference, and a ratio to nothing, seen in a loss's graph before backward."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

_MOST = 512
"""Nodes from the loss on: a model's own are far more, and a loss's own come first."""
_PASSED = ("ToCopyBackward", "ClampBackward", "MulBackward", "WhereBackward", "MaskedFillBackward")


def kl_gaps(losses: Iterable[Tensor]) -> list[Tensor]:
    """For each ``exp(d) - d`` in the graph of a loss, ``d = constant - x``, 0-d, on its device: the
    largest ``|d|``. That is the form of the k3 estimator (Schulman, "Approximating KL divergence",
    2020), whose constant is the reference's log-probability; in a ratio, the constant is subtracted
    or no ``d`` stands beside it."""
    found = []
    for node in _nodes(losses):
        if (exponential := _of_k3(node)) is not None:
            found.append(exponential._saved_result.detach().float().log().abs().max())
    return found


def has_ratio_to_itself(losses: Iterable[Tensor]) -> bool:
    """Whether a loss holds an ``exp(x - x)``, through both of which the gradient goes: it is 0,
    whatever it is multiplied by."""
    return any(
        node.name() == "SubBackward0" and len({*node.next_functions}) == 1 < len(_following(node))
        for exponential in _nodes(losses)
        if exponential.name() == "ExpBackward0"
        for node in _following(exponential)
        if node is not None
    )


def _nodes(losses: Iterable[Tensor]) -> Iterator[Any]:
    """Of the graph of losses, from these on."""
    waiting: deque[Any] = deque(n for loss in losses if (n := loss.grad_fn) is not None)
    seen: set[Any] = set(waiting)
    while waiting and len(seen) < _MOST:
        node = waiting.popleft()
        yield node
        for after in _following(node):
            if after is not None and after not in seen:
                seen.add(after)
                waiting.append(after)


def _following(node: Any) -> list[Any]:
    return [after for after, _ in node.next_functions]


def _of_k3(node: Any) -> Any:
    """The ``exp`` of a node ``exp(d) - d``; ``None`` of others."""
    following = _following(node)
    if len(following) != 2 or node.name() not in ("SubBackward0", "AddBackward0"):
        return None
    wanted = 1 if node.name() == "SubBackward0" else -1
    for one, other in (following, following[::-1] if wanted < 0 else following):
        exponential = _exponential(one)
        if exponential is not None and _sign(other) == wanted:
            return exponential
    return None


def _exponential(node: Any) -> Any:
    """The ``exp(constant - x)`` that this node is, but for a number added to it; else ``None``."""
    while node is not None and node.name() != "ExpBackward0":
        rest = [after for after in _following(node) if after is not None]
        added = node.name() in ("SubBackward0", "AddBackward0") and len(rest) == 1
        if not added and not node.name().startswith(_PASSED):
            return None
        node = rest[0] if rest else None
    return node if node is not None and _sign(_following(node)[0]) > 0 else None


def _sign(node: Any) -> int:
    """1 of ``constant - x``, -1 of ``x - constant``, possibly cast, bounded or masked; else 0."""
    sign = 1
    while node is not None:
        name, following = node.name(), _following(node)
        if name == "SubBackward0":
            first, second = (after is not None for after in following)
            return 0 if first == second else -sign if first else sign
        if name != "NegBackward0" and not name.startswith(_PASSED):
            return 0
        sign = -sign if name == "NegBackward0" else sign
        node = next((after for after in following if after is not None), None)
    return 0
