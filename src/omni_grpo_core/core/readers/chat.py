"""Messages of a row → history, question, gold and media: what the chat formats have in common.

Media are in the message itself (parts), or in columns of the row, which marks in the text
(``<image>``, ``<video>``, ``<audio>``) or parts without a path take one after the other. The last
user message is the question; an assistant's message after it is the gold, if the row has no other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from omni_grpo_core.core.readers.row import (
    WITH_OPTIONS,
    as_list,
    gold_text,
    inferred_type,
    media_ref,
    options_of,
    problem_type_of,
    read_gold,
    split_options,
    without_leading_marks,
)
from omni_grpo_core.core.rows import DataRow, is_text, short
from omni_grpo_core.io.bounded import Unreadable, json_value
from omni_grpo_core.rewards.choice import lettered
from omni_grpo_core.types import (
    MODALITIES,
    Dialogue,
    MediaPart,
    Message,
    Modality,
    Sample,
    TextPart,
)

Role = Literal["system", "user", "assistant"]
ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
GOLD_KEYS = ("solution", "answer", "ground_truth", "completion")
"""Columns that trainers' published rows have for the right answer, the most explicit first."""
_MARK = re.compile(r"<(image|video|audio)>")
Part = TextPart | MediaPart


def sample_of(
    row: DataRow,
    sample_id: str,
    root: Path | None,
    messages: Iterable[tuple[Any, Any]],
    *,
    gold: Any = None,
) -> Sample:
    """``messages``: role and content of each; content is text or a list of typed parts. ``gold``:
    where the format has it in a place of its own."""
    columns = {
        # a table has every column in every row
        modality: as_list(row.values.get(f"{modality}s")) or as_list(row.values.get(modality))
        for modality in MODALITIES
    }
    reading = _Reading(row, root, columns)
    turns = [reading.message(role, content) for role, content in messages]
    reading.give_rest(turns)
    if gold is None:
        key = next((key for key in GOLD_KEYS if row.values.get(key) is not None), None)
        gold = None if key is None else row.values[key]
    if turns and turns[-1].role == "assistant":
        gold = _plain(turns.pop()) if gold is None else gold
    if isinstance(gold, list) and gold and isinstance(gold[-1], Mapping):  # TRL's completion
        gold = gold[-1].get("content")
    if gold is None:
        row.fail(
            "no gold answer",
            f"one under {', '.join(GOLD_KEYS)}, or the assistant's last message",
        )
    if not turns or turns[-1].role != "user":
        row.fail("no message of the user that asks", "a user's message last, before the answer")
    _refuse_disorder(row, turns)
    return _sample(row, sample_id, turns, gold_text(row, "gold", gold))


def _sample(row: DataRow, sample_id: str, turns: Sequence[Message], solution: str) -> Sample:
    history, asked = tuple(turns[:-1]), turns[-1].parts
    refs = tuple(part.ref for part in asked if isinstance(part, MediaPart))
    text = "".join(p.text if isinstance(p, TextPart) else f"<{p.ref.modality}>" for p in asked)
    question = without_leading_marks(row, text.strip(), refs)
    kind = problem_type_of(row)
    options = options_of(row, None)
    if not options:
        question, options = split_options(question)
    if not is_text(question):
        row.fail("a question without text", "a user's message that asks")
    kind = kind or inferred_type(options, solution)
    if kind in WITH_OPTIONS:
        options = lettered(options) or options_of(row, kind)
    read_gold(row, kind, options, solution)
    before = [p.ref for m in history for p in m.parts if isinstance(p, MediaPart)]
    values = (sample_id, question, kind, options, solution, (*before, *refs), row.origin)
    return Dialogue(*values, history) if history else Sample(*values)


def _refuse_disorder(row: DataRow, turns: Sequence[Message]) -> None:
    roles = [turn.role for turn in turns]
    spoken = roles[roles[:1] == ["system"] :]
    if spoken != [("user", "assistant")[i % 2] for i in range(len(spoken))]:
        row.fail(
            f"messages of {', '.join(roles)}",
            "perhaps one of the system, then user and assistant in turn",
        )


def _plain(message: Message) -> str:
    return "".join(part.text for part in message.parts if isinstance(part, TextPart))


@dataclass(slots=True)
class _Reading:
    """The media columns of a row, as its messages take from them."""

    row: DataRow
    root: Path | None
    columns: Mapping[Modality, list[Any]]
    taken: dict[Modality, int] = field(default_factory=lambda: dict.fromkeys(MODALITIES, 0))

    def message(self, role: Any, content: Any) -> Message:
        if role not in ROLES:
            self.row.fail(f"a message of {short(role)}", f"one of {', '.join(ROLES)}")
        parts: list[Part] = []
        if isinstance(content, str):
            parts = self._marked(content)
        elif isinstance(content, list):
            for part in content:
                parts += self._part(part)
        else:
            self.row.fail(f"content {short(content)}", "text or a list of parts")
        return Message(ROLES[role], _without_gaps(parts))

    def _marked(self, text: str) -> list[Part]:
        """Text and, in the places of its marks, the columns' media."""
        pieces = _MARK.split(text)
        return [
            self._next(cast(Modality, piece)) if index % 2 else TextPart(piece)
            for index, piece in enumerate(pieces)
        ]

    def _part(self, part: Any) -> list[Part]:
        if isinstance(part, str):
            return self._marked(part)
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in ("text", "input_text"):
            if not isinstance(part.get("text"), str):
                self.row.fail(f"a text part {short(part)}", "text under 'text'")
            return [TextPart(part["text"])]
        if kind == "input_audio" and isinstance(part.get("input_audio"), Mapping):
            sound = part["input_audio"]
            url = f"data:audio/{sound.get('format')};base64,{sound.get('data')}"
            return [MediaPart(media_ref(self.row, "audio", url, self.root))]
        modality = cast(Modality, str(kind).removeprefix("input_").removesuffix("_url"))
        if modality not in MODALITIES:
            self.row.fail(f"a part {short(part)}", "a part of type text, image, video or audio")
        if any(part.get(k) for k in (modality, f"{modality}_url", "path", "url", "bytes")):
            return [MediaPart(media_ref(self.row, modality, part, self.root))]
        return [self._next(modality)]

    def _next(self, modality: Modality) -> MediaPart:
        index = self.taken[modality]
        self.taken[modality] += 1
        if index >= len(self.columns[modality]):
            self.row.fail(
                f"more <{modality}> than the {len(self.columns[modality])} {modality} items",
                "an item for each mark",
                f"list the files under '{modality}s', or write the mark otherwise",
            )
        return MediaPart(media_ref(self.row, modality, self.columns[modality][index], self.root))

    def give_rest(self, turns: list[Message]) -> None:
        """Media without a mark come first in the first user message."""
        rest = [
            MediaPart(media_ref(self.row, modality, value, self.root))
            for modality in MODALITIES
            if not self.taken[modality]
            for value in self.columns[modality]
        ]
        for modality in MODALITIES:
            if 0 < self.taken[modality] < len(self.columns[modality]):
                self.row.fail(
                    f"{self.taken[modality]} <{modality}> and {len(self.columns[modality])} "
                    f"{modality} items",
                    "a mark for each, or none",
                )
        first = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
        if rest and first is not None:
            turns[first] = Message("user", (*rest, *turns[first].parts))


def _without_gaps(parts: Iterable[Part]) -> tuple[Part, ...]:
    return tuple(part for part in parts if isinstance(part, MediaPart) or part.text)


def is_message_list(value: Any) -> bool:
    """Whether a column holds messages with roles."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(one, Mapping) and "role" in one and "content" in one for one in value)
    )


def role_and_content(row: DataRow, key: str) -> list[tuple[Any, Any]]:
    """The messages under ``key``; in tables often as JSON text."""
    value = row.values.get(key)
    if isinstance(value, str):
        with suppress(Unreadable):
            value = json_value(value)
    if not is_message_list(value):
        row.fail(f"{key} {short(value)}", "a list of messages with role and content")
    return [(one["role"], one["content"]) for one in cast(list[Mapping[str, Any]], value)]
