"""Reads one medium like the pipeline, in a process whose exit code is the result."""

from __future__ import annotations

import os
import resource
import sys
import traceback
from pathlib import Path

from omni_grpo_core.core.media import MediaConfig, load_media
from omni_grpo_core.errors import MediaError
from omni_grpo_core.types import Conversation, MediaPart, MediaRef, Message, Modality

MOST_MEMORY = 1 << 30
"""Memory, in bytes, for reading or refusing a file of a few kilobytes."""


def read(modality: Modality, path: str, errors: Path) -> None:
    """Exits with 0 if the medium is read, 2 if it is refused, 4 if it took too much memory, 1 (a
    traceback) for anything else. Messages go to the file ``errors``."""
    sys.stderr = errors.open("w", encoding="utf-8", errors="backslashreplace")
    message = Message("user", (MediaPart(MediaRef(modality, path)),))
    small = MediaConfig(max_pixels=56 * 84, image_max_pixels=56 * 84)
    before, code = _most_memory(), 0
    try:
        load_media(Conversation("sample", (message,), "off"), small)
    except MediaError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except BaseException:
        traceback.print_exc()
        code = 1
    if (taken := _most_memory() - before) > MOST_MEMORY:
        print(f"took {taken} bytes of memory", file=sys.stderr)
        code = 4
    sys.stderr.close()
    os._exit(code)


def _most_memory() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
