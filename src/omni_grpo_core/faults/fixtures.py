"""The shipped rows and their media, read once per process: loops are built hundreds of times."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from omni_grpo_core import tiny
from omni_grpo_core.core.batch import chat_messages
from omni_grpo_core.core.media import load_media, probe
from omni_grpo_core.core.media_config import MediaConfig
from omni_grpo_core.core.sample import load_samples
from omni_grpo_core.pipeline.settings import load_settings
from omni_grpo_core.types import (
    Conversation,
    Media,
    MediaPart,
    MediaRef,
    Message,
    Sample,
)


@dataclass(frozen=True, slots=True)
class Drawn:
    """A row as in the data set's JSON, with absolute paths and an id, and its sample."""

    row: Mapping[str, Any]
    sample: Sample

    @property
    def videos(self) -> tuple[str, ...]:
        return tuple(ref.path for ref in self.sample.media if ref.modality == "video")


@cache
def rows_of() -> tuple[Drawn, ...]:
    """Every shipped row, in the order of the file."""
    file = tiny.data_file()
    rows = json.loads(file.read_text(encoding="utf-8"))
    return tuple(
        Drawn(_absolute(row, sample.sample_id, file.parent), sample)
        for row, sample in zip(rows, load_samples(file), strict=True)
    )


def _absolute(row: dict[str, Any], sample_id: str, folder: Path) -> dict[str, Any]:
    path = row.get("path")
    if isinstance(path, str):
        path = str(folder / path)
    elif path is not None:
        path = {kind: str(folder / name) for kind, name in path.items()}
    kept = {key: value for key, value in row.items() if key != "path"}
    return {"sample_id": sample_id, **kept, **({} if path is None else {"path": path})}


@dataclass(slots=True)
class Clips:
    """A cache of decoded media. Decoding takes longer than the rest of a step."""

    config: MediaConfig
    decoded: dict[Any, Media] = field(default_factory=dict)
    tracks: dict[str, bool] = field(default_factory=dict)

    @staticmethod
    @cache
    def shared() -> Clips:
        """This process's cache, with the shipped checkpoint's own media settings."""
        return Clips(load_settings(tiny.checkpoint_dir()).media)

    def has_track(self, path: str) -> bool:
        if path not in self.tracks:
            self.tracks[path] = probe(path).has_audio
        return self.tracks[path]

    def load(
        self, messages: list[dict[str, Any]], interleaved: bool, config: MediaConfig | None = None
    ) -> Media:
        """The media that messages name, in reading order; with ``interleaved`` also the track of
        every video, whatever else is listed, as qwen-omni-utils does."""
        refs = tuple(
            MediaRef(part["type"], part[part["type"]])
            for message in messages
            if not isinstance(message["content"], str)
            for part in message["content"]
            if part["type"] != "text"
        )
        key = (refs, interleaved, config)
        if key not in self.decoded:
            message = Message("user", tuple(MediaPart(ref) for ref in refs))
            asked = Conversation("loop", (message,), "interleaved" if interleaved else "separate")
            self.decoded[key] = load_media(asked, config or self.config)
        return self.decoded[key]

    @staticmethod
    def messages(conversation: Conversation) -> list[dict[str, Any]]:
        """A conversation in the form chat templates take."""
        return chat_messages(conversation)
