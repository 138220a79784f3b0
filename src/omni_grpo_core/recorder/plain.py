"""Any value from a trainer as plain data that is safe to store: no secret, no object's repr.

A foreign object's ``repr`` may contain anything (an API client's its key), so only the class of an
object is kept. Secrets are recognised by the name they are stored under, by their form, and as
values of environment variables with such names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from omni_grpo_core.io.redaction import REDACTED, Redactor

_LONGEST_TEXT = 1 << 16
_MOST_ITEMS = 1 << 12
_DEEPEST = 8
_SMALL = 64
"""A tensor among plain values is written out up to this many elements."""

_SECRET_NAME = re.compile(
    r"(api|access|private|secret|auth|signing)[_-]?key|secret|passw|authori[sz]ation|bearer|"
    r"credential|cookie|(^|[_-])(auth|access|refresh|bot|hf|hub|github|api|session|wandb|login)"
    r"[_-]?token|^token$|^use_auth",
    re.IGNORECASE,
)


class Plain:
    """Makes values plain. Holds the environment's secrets as of its creation, to recognise them;
    they are never written."""

    def __init__(self) -> None:
        self._redactor = Redactor()

    def text(self, value: str) -> str:
        """``value`` without secrets, truncated if it is very long.

        >>> Plain().text("Authorization: Bearer abcdef")
        'Authorization: Bearer <redacted>'
        """
        if len(value) > _LONGEST_TEXT:
            value = f"{value[:_LONGEST_TEXT]}… ({len(value)} characters)"
        return self._redactor.text(value)

    def error(self, error: BaseException) -> str:
        """
        >>> Plain().error(StopIteration())
        'StopIteration: '
        """
        return self.text(f"{type(error).__name__}: {error}")

    def value(self, value: Any, depth: int = 0) -> Any:
        """Numbers, texts, tuples and mappings with text keys; small tensors as nested tuples;
        anything else as its class in angle brackets.

        >>> Plain().value({"api_key": "x", "fps": 2.0, "who": object(), "t": torch.tensor([1, 2])})
        {'api_key': '<redacted>', 'fps': 2.0, 'who': '<object>', 't': (1, 2)}
        """
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, int):
            return int(value)
        if isinstance(value, float):
            return float(value)
        if isinstance(value, str):
            return self.text(str(value))
        if isinstance(value, torch.dtype | torch.device):
            return str(value)
        if isinstance(value, torch.Tensor | np.ndarray | np.generic):
            return _array(value)
        if depth >= _DEEPEST:
            return "<deeper>"
        if isinstance(value, Mapping):
            return self.mapping(value, depth)
        if isinstance(value, Sequence | set | frozenset) and not isinstance(value, bytes):
            items = list(value)
            plain = tuple(self.value(item, depth + 1) for item in items[:_MOST_ITEMS])
            return plain if len(items) <= _MOST_ITEMS else (*plain, f"… ({len(items)} items)")
        return f"<{type(value).__qualname__}>"

    def mapping(self, values: Mapping[Any, Any], depth: int = 0) -> dict[str, Any]:
        """``values`` with text keys; the value under a secret's name is redacted."""
        return {
            self.text(str(key)): (
                REDACTED
                if _SECRET_NAME.search(str(key)) and held is not None
                else self.value(held, depth + 1)
            )
            for key, held in values.items()
        }


def _array(value: Any) -> Any:
    shape = tuple(value.shape)
    if isinstance(value, torch.Tensor):
        if value.numel() <= _SMALL and value.device.type != "meta":
            return _tuples(value.detach().cpu().tolist())
        return f"<tensor {str(value.dtype).removeprefix('torch.')} {shape}>"
    if value.size <= _SMALL and value.dtype.kind in "biuf":
        return _tuples(value.tolist())
    return f"<array {value.dtype} {shape}>"


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
