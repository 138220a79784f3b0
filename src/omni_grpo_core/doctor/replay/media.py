"""The files of a conversation: our loader on the paths that the messages name."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlparse

from omni_grpo_core.core.media import load_media, probe
from omni_grpo_core.core.media_config import MediaConfig
from omni_grpo_core.doctor.evidence import Case
from omni_grpo_core.errors import MediaError
from omni_grpo_core.types import Conversation, Media, MediaPart, MediaRef, Message, Modality

if TYPE_CHECKING:
    from torch import Tensor


@lru_cache(maxsize=128)
def _load(ref: MediaRef, stamp: tuple[int, int], config: MediaConfig, patch_size: int) -> Media:
    message = Message("user", (MediaPart(ref),))
    return load_media(Conversation("file", (message,), "off"), config, patch_size=patch_size)


@lru_cache(maxsize=512)
def _has_track(path: str, stamp: tuple[int, int]) -> bool:
    return probe(path).has_audio


def file_of(path: str) -> str | None:
    """The local file that a message names; ``None`` where there is none."""
    if path.startswith("file://"):
        path = urlparse(path).path
    try:
        return path if Path(path).is_file() else None
    except (OSError, ValueError):  # a name too long: text or data instead of a path
        return None


def load(ref: MediaRef, config: MediaConfig, patch_size: int = 14) -> Media | None:
    """One file as a reference with this patch size reads it; ``None`` where it is missing or cannot
    be read."""
    path = file_of(ref.path)
    if path is None:
        return None
    try:
        whole = MediaRef(ref.modality, path, ref.start, ref.end)
        return _load(whole, stamp(path), config, patch_size)
    except MediaError:
        return None


def media_config(case: Case) -> MediaConfig:
    """The reference's media settings: the checkpoint's."""
    return MediaConfig() if case.reference is None else case.reference.settings.media


def read_file(ref: MediaRef, case: Case, config: MediaConfig | None = None) -> Media | None:
    """A file as the reference reads it: by its settings or ``config``, with its patch size."""
    patches = {} if case.reference is None else {"patch_size": case.reference.policy.patch_size}
    return load(ref, config or media_config(case), **patches)


def array_of(media: Media, modality: Modality) -> Tensor:
    """The array of the single item of ``media``: an image's pixels, a clip's frames, a sound's
    samples."""
    if modality == "image":
        return media.images[0].pixels.float()
    if modality == "video":
        return media.videos[0].frames
    return media.audios[0].samples


def has_track(path: str) -> bool | None:
    """Whether a clip has sound; ``None`` where it is missing or cannot be read."""
    file = file_of(path)
    if file is None:
        return None
    try:
        return _has_track(file, stamp(file))
    except MediaError:
        return None


def wanted(refs: Sequence[MediaRef], interleaved: bool) -> dict[Modality, tuple[MediaRef, ...]]:
    """The media that should reach the processor for a conversation, in order; an interleaved
    video's sound right after it."""
    found: dict[Modality, list[MediaRef]] = {"image": [], "video": [], "audio": []}
    for ref in refs:
        found[ref.modality].append(ref)
        if ref.modality == "video" and interleaved:
            found["audio"].append(MediaRef("audio", ref.path, ref.start, ref.end))
    return {modality: tuple(items) for modality, items in found.items()}


def stamp(path: str) -> tuple[int, int]:
    """What distinguishes a file from an earlier one of the same name."""
    stat = Path(path).stat()
    return stat.st_mtime_ns, stat.st_size
