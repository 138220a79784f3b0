"""Hears every warning, those too that are shown once a process only."""

from __future__ import annotations

import functools
import logging
import warnings
from typing import Any

from omni_grpo_core.recorder.patches import Patches
from omni_grpo_core.recorder.tape import Tape

_OURS = "omni_grpo_core.recorder"


class WarningsWatch:
    """Whatever is warned of by ``warnings``, or logged as a warning or worse, goes to ``tape`` and
    then its usual way."""

    def __init__(self, tape: Tape) -> None:
        self._tape = tape

    def start(self, patches: Patches) -> None:
        tape = self._tape
        warn, handle = warnings.warn, logging.Logger.handle

        @functools.wraps(warn)
        def warned(
            message: Any, category: Any = None, stacklevel: int = 1, *args: Any, **keywords: Any
        ) -> None:
            with tape.looking("warnings"):
                tape.warn(str(message))
            # one frame further up: the warner, whom filters and the once-registry go by
            warn(message, category, stacklevel + 1, *args, **keywords)

        @functools.wraps(handle)
        def handled(logger: logging.Logger, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING and logger.name != _OURS:
                with tape.looking("warnings"):
                    tape.warn(record.getMessage())
            handle(logger, record)

        patches.set(warnings, "warn", warned)
        patches.set(logging.Logger, "handle", handled)
        # transformers' own addition; its cache lets a message through once a process
        once = getattr(logging.Logger, "warning_once", None)
        if once is not None:

            @functools.wraps(once)
            def warned_once(logger: logging.Logger, *args: Any, **keywords: Any) -> None:
                with tape.looking("warnings"):
                    message, *rest = args
                    tape.warn(str(message) % tuple(rest) if rest else str(message))
                once(logger, *args, **keywords)

            patches.set(logging.Logger, "warning_once", warned_once)

    def stop(self) -> None:
        """Everything is in the patches."""
