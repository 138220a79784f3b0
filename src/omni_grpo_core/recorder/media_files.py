"""Watches which media files a loop opens, by the libraries that people read media with.

Where a processor gets arrays, nothing that it was passed says whose they are: the files that were
opened before do.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omni_grpo_core.recorder.hooks import Patches
from omni_grpo_core.recorder.step_buffer import StepBuffer

_READERS = (
    ("PIL.Image", "open"),
    ("av", "open"),
    ("soundfile", "SoundFile.__init__"),
    ("audioread", "audio_open"),
    ("wave", "open"),
    ("scipy.io.wavfile", "read"),
    ("torchaudio", "load"),
    ("torchcodec.decoders", "VideoDecoder.__init__"),
    ("torchcodec.decoders", "AudioDecoder.__init__"),
    ("torchvision.io", "read_image"),
    ("torchvision.io", "read_video"),
    ("decord", "VideoReader.__init__"),
    ("cv2", "imread"),
)
"""The function of each library that every way of opening a file goes through."""
_LAZY = {"librosa": "soundfile"}
"""What a library imports when it first reads a file, which is too late to watch that one."""


class MediaFileWatch:
    """Notes the files opened since the last :meth:`take`, in order, each once."""

    def __init__(self, buffer: StepBuffer) -> None:
        self._buffer = buffer
        self._patches: Patches | None = None
        self._watched: set[tuple[str, str]] = set()
        self._opened: dict[str, None] = {}

    def start(self, patches: Patches) -> None:
        self._patches = patches
        self._watch()

    def stop(self) -> None:
        self._patches = None

    def take(self) -> tuple[str, ...]:
        """Absolute paths; none is left. Libraries that were imported since are watched from now
        on."""
        found = tuple(map(self._buffer.plain.text, self._opened))
        self._opened.clear()
        self._watch()
        return found

    def _watch(self) -> None:
        for library, reads in _LAZY.items():
            if library in sys.modules:
                importlib.import_module(reads)
        for reader in _READERS:
            module, name = reader
            if self._patches is None or reader in self._watched or module not in sys.modules:
                continue
            *inner, last = name.split(".")
            owner: Any = sys.modules[module]
            for part in inner:
                owner = getattr(owner, part, None)
            if callable(original := getattr(owner, last, None)):
                self._patches.set(owner, last, self._noting(original, place=len(inner)))
                self._watched.add(reader)

    def _noting(self, original: Callable[..., Any], place: int) -> Callable[..., Any]:
        """``place``: of the file among the arguments that are given by position."""

        @functools.wraps(original)
        def noting(*args: Any, **keywords: Any) -> Any:
            with self._buffer.guarded("media files"):
                self._note(
                    args[place] if len(args) > place else next(iter(keywords.values()), None)
                )
            return original(*args, **keywords)

        return noting

    def _note(self, given: Any) -> None:
        path = given if isinstance(given, str | os.PathLike) else getattr(given, "name", None)
        if isinstance(path, str | os.PathLike) and Path(path).is_file():
            self._opened[str(Path(path).absolute())] = None
