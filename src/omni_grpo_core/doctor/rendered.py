"""The data rows and rendered conversations of each batch of a recorded step, with its calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omni_grpo_core.doctor.evidence import Calls, Case
from omni_grpo_core.doctor.rollouts import batches
from omni_grpo_core.trace.calls import (
    ForwardCall,
    GenerateCall,
    ProcessorCall,
    SamplesSeen,
    TemplateCall,
)
from omni_grpo_core.types import MediaRef, Modality

_KINDS: tuple[Modality, ...] = ("image", "video", "audio")
_QUESTION = ("problem", "question", "q", "query", "prompt_text")


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """One conversation of a template call, and its rendered text. ``number``: within the batch."""

    number: int
    messages: tuple[Mapping[str, Any], ...]
    text: str | None

    @property
    def media(self) -> tuple[MediaRef, ...]:
        """Media in reading order, by the path or URL in the messages."""
        found = []
        for part in self._parts():
            for kind in _KINDS:
                where = part.get(kind, part.get(f"{kind}_url"))
                if part.get("type") in (kind, f"{kind}_url") or where is not None:
                    if isinstance(where, Mapping):
                        where = where.get("url")
                    found.append(MediaRef(kind, str(where), *_stretch(part)))
                    break
        return tuple(found)

    def text_of(self, role: str) -> str:
        """All text of ``role``'s messages."""
        words = []
        for message in self.messages:
            if message.get("role") == role:
                content = message.get("content")
                parts = [content] if isinstance(content, str) else content or ()
                words += [p if isinstance(p, str) else str(p.get("text", "")) for p in parts]
        return "\n".join(words)

    def _parts(self) -> list[Mapping[str, Any]]:
        found = []
        for message in self.messages:
            content = message.get("content")
            if not isinstance(content, str):
                found += [part for part in content or () if isinstance(part, Mapping)]
        return found


@dataclass(frozen=True, slots=True, eq=False)
class RenderedBatch:
    """``values``: recorded calls. ``rows``: data rows. ``prompts``: rendered conversations."""

    values: tuple[object, ...]

    samples = Calls(SamplesSeen)
    templates = Calls(TemplateCall)
    processed = Calls(ProcessorCall)
    generated = Calls(GenerateCall)
    forwards = Calls(ForwardCall)

    @property
    def rows(self) -> tuple[Mapping[str, Any], ...]:
        return tuple(row for seen in self.samples for row in seen.rows)

    @property
    def prompts(self) -> tuple[RenderedPrompt, ...]:
        found: list[RenderedPrompt] = []
        for call in self.templates:
            conversations = conversations_of(call.messages)
            for index, messages in enumerate(conversations):
                same = len(conversations) == len(call.texts)
                text = call.texts[index] if same else None
                found.append(RenderedPrompt(len(found), messages, text))
        return tuple(found)


def rendered_batches(case: Case) -> tuple[RenderedBatch, ...]:
    """The batches of a step, in order: calls that content joins."""
    return case.once(_rendered_batches)


def _rendered_batches(case: Case) -> tuple[RenderedBatch, ...]:
    return tuple(RenderedBatch(one.values) for one in batches(case))


def conversations_of(messages: Sequence[Any]) -> tuple[tuple[Mapping[str, Any], ...], ...]:
    """The conversations of one template call, which takes one or several."""
    if messages and isinstance(messages[0], Mapping):
        return (tuple(messages),)
    return tuple(tuple(m for m in one if isinstance(m, Mapping)) for one in messages)


def question_of(row: Mapping[str, Any]) -> str | None:
    """The question of a data row, under any of its usual column names."""
    for name in _QUESTION:
        if isinstance(row.get(name), str):
            return str(row[name])
    return None


def paths_of(row: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """(modality, path) of the media that a data row names; the modality is ``""`` if unknown. An
    array in the row, ``"<array …>"`` in the recording, is not a path."""
    found: list[tuple[str, str]] = []
    path = row.get("path")
    if isinstance(path, str):
        found.append((str(row.get("data_type", "")), path))
    elif isinstance(path, Mapping):
        found += [(str(kind), str(name)) for kind, name in path.items()]
    for kind in _KINDS:
        for name in (kind, f"{kind}s", f"{kind}_path"):
            value = row.get(name)
            values = (
                value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
            )
            found += [(kind, item) for item in values if isinstance(item, str)]
    return tuple(dict.fromkeys((kind, name) for kind, name in found if not name.startswith("<")))


def order_of(prompts: int, rows: int) -> dict[str, tuple[int, ...]]:
    """By name, the orders in which ``rows`` rows can belong to ``prompts`` conversations.

    >>> order_of(2, 4)
    {'1122': (0, 0, 1, 1), '1212': (0, 1, 0, 1)}
    """
    if not prompts or rows % prompts:
        return {}
    copies = rows // prompts
    return {
        "1122": tuple(row // copies for row in range(rows)),
        "1212": tuple(row % prompts for row in range(rows)),
    }


def flag_of(keywords: Mapping[str, Any]) -> bool | None:
    """The audio-in-video flag of a call, under any of its names; ``None`` where it was left out."""
    inner = keywords.get("videos_kwargs")
    for place in (keywords, inner if isinstance(inner, Mapping) else {}):
        for name in ("use_audio_in_video", "load_audio_from_video"):
            if place.get(name) is not None:
                return bool(place[name])
    return None


def _stretch(part: Mapping[str, Any]) -> tuple[float | None, float | None]:
    start, end = part.get("video_start"), part.get("video_end")
    return (
        float(start) if isinstance(start, int | float) else None,
        float(end) if isinstance(end, int | float) else None,
    )
