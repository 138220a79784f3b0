"""What transformers says while something runs."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as library_logging


@contextmanager
def told() -> Iterator[list[str]]:
    """Lines that transformers warns of meanwhile, by either of its ways."""
    lines: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, listener = logging.getLogger("transformers"), Listener(logging.WARNING)
    before = logger.level
    logger.addHandler(listener)
    logger.setLevel(logging.WARNING)
    # what is said once a process may have been said before
    library_logging.warning_once.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield lines
        lines += [str(warning.message) for warning in caught]
    finally:
        logger.setLevel(before)
        logger.removeHandler(listener)
