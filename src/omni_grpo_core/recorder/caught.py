"""The exceptions that a reward function catches: an error that became a score."""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from types import FrameType
from typing import Any

from omni_grpo_core.rewards.call import RewardFunction

_MOST = 8
"""Different texts that are kept."""


class Caught:
    """Counts in ``texts`` the exceptions that reach the function's own file while its block runs in
    this thread, caught or not, each by its text; what a library raises and catches itself is none.
    Does nothing under a debugger or a coverage tool, which trace as well."""

    def __init__(self, function: RewardFunction) -> None:
        self.texts: Counter[str] = Counter()
        own = inspect.unwrap(function)
        code = getattr(own, "__code__", getattr(type(own).__call__, "__code__", None))
        self._file = None if code is None else code.co_filename
        self._on = self._file is not None and sys.gettrace() is None
        self._last: BaseException | None = None

    def __enter__(self) -> Caught:
        if self._on:
            sys.settrace(self._called)
        return self

    def __exit__(self, *_: object) -> None:
        if self._on:
            sys.settrace(None)
        self._last = None

    def _called(self, frame: FrameType, _event: str, _details: Any) -> Any:
        if frame.f_code.co_filename != self._file:
            return None
        frame.f_trace_lines = False
        return self._happened

    def _happened(self, _frame: FrameType, event: str, details: Any) -> Any:
        if event == "exception" and not issubclass(details[0], StopIteration | GeneratorExit):
            kind, error, _ = details
            # it passes through each frame of the file
            if error is not self._last:
                self._last = error
                text = f"{kind.__name__}: {error}"
                if text in self.texts or len(self.texts) < _MOST:
                    self.texts[text] += 1
        return self._happened
