"""The arguments of a foreign call by name, however they were passed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def arguments(
    call: Callable[..., Any], args: Sequence[Any], keywords: Mapping[str, Any]
) -> dict[str, Any]:
    """What ``call(*args, **keywords)`` gives each parameter, what its ``**`` takes among them.

    Raises ``TypeError`` where the call itself would.

    >>> def f(a, b=2, **rest): ...
    >>> arguments(f, (1,), {"c": 3})
    {'a': 1, 'c': 3}
    """
    signature = inspect.signature(call)
    found = dict(signature.bind(*args, **keywords).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            found |= found.pop(name, {})
    return found
