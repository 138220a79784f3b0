"""A KL to a reference, seen in a loss's graph before backward goes through it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

from torch import Tensor

_MOST = 512
"""Nodes from the loss on: a model's own are far more, and a loss's own come first."""
_PASSED = ("ToCopyBackward", "ClampBackward", "MulBackward", "WhereBackward", "MaskedFillBackward")


def kl_gaps(losses: Iterable[Tensor]) -> list[Tensor]:
    """For each ``exp(constant - x)`` in the graph of a loss, 0-d, on its device: the largest
    ``|constant - x|``. That is the form of the k3 estimator (Schulman, "Approximating KL
    divergence", 2020), whose constant is the reference's log-probability; in a ratio the constant
    is subtracted."""
    waiting: deque[Any] = deque(n for loss in losses if (n := loss.grad_fn) is not None)
    seen: set[Any] = set(waiting)
    found: list[Tensor] = []
    while waiting and len(seen) < _MOST:
        node = waiting.popleft()
        if node.name() == "ExpBackward0" and _of_a_constant_less(node.next_functions[0][0]):
            found.append(node._saved_result.detach().float().log().abs().max())
        for after, _ in node.next_functions:
            if after is not None and after not in seen:
                seen.add(after)
                waiting.append(after)
    return found


def _of_a_constant_less(node: Any) -> bool:
    """Whether an exponent is ``constant - x``, possibly cast, bounded or masked."""
    negated = False
    while node is not None:
        name = node.name()
        following = [after for after, _ in node.next_functions]
        if name == "SubBackward0":
            first, second = (after is not None for after in following)
            return first and not second if negated else second and not first
        if name != "NegBackward0" and not name.startswith(_PASSED):
            return False
        negated ^= name == "NegBackward0"
        node = next((after for after in following if after is not None), None)
    return False
