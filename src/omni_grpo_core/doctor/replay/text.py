"""What a conversation should have been rendered to: the ChatML that Qwen-Omni was trained on."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from omni_grpo_core.doctor.evidence import Case
from omni_grpo_core.pipeline import GENERATION_PROMPT, MARKS, Marks, marks_of, turn
from omni_grpo_core.types import MODALITIES, Modality

DEFAULT_SYSTEM = "You are a helpful assistant."
ROLES = ("system", "user", "assistant", "tool")
_TURN = re.compile(r"<\|im_start\|>([^\n]*)\n")
_OPEN = re.compile(r"<\|im_start\|>(\w+)\n(?:(?!<\|im_end\|>).)*?<\|im_start\|>", re.DOTALL)
_FOREIGN = re.compile(
    r"\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<\|(?:start_header_id|eot_id|user|assistant)\|>"
    r"|^(?:### )?(?:Human|USER|Instruction): ?|^### (?:Response|Assistant)",
    re.MULTILINE,
)
_WORDS = r"(?:(?!<\|im_(?:start|end)\|>).)*"
_WHOLE = re.compile(
    rf"(?:<\|im_start\|>\w+\n{_WORDS}<\|im_end\|>\n)*<\|im_start\|>\w+\n{_WORDS}", re.DOTALL
)


def marks(case: Case) -> Marks:
    """Begin, placeholder and end of each modality, as the recorded processor names them; else the
    checkpoint's, or Qwen2.5-Omni's. A modality that it doesn't have has a mark that no text has."""
    return case.once(_marks)


def _marks(case: Case) -> Marks:
    try:
        held = json.loads(case.trace.header.get("marks", ""))
        named = {str(kind): tuple(map(str, ends)) for kind, ends in held.items()}
    except (ValueError, TypeError, AttributeError):
        named = {}
    if named:
        absent = {kind: ("", f"\0{kind}", "") for kind in MODALITIES}
        return {kind: named.get(kind, absent[kind]) for kind in MODALITIES}  # type: ignore[misc]
    return MARKS if case.reference is None else marks_of(case.reference.policy.processor)


def reference_texts(messages: Sequence[Mapping[str, Any]], names: Marks) -> tuple[str, ...]:
    """The right renderings of a conversation, generation prompt included.

    Two where it has no system message: Qwen's template puts its own default in front, a plain one
    does not.
    """
    turns = "".join(_turn(message, names) for message in messages)
    bare = turns + GENERATION_PROMPT
    if messages and messages[0].get("role") == "system":
        return (bare,)
    return (turn("system", DEFAULT_SYSTEM) + bare, bare)


def placeholders(text: str, names: Marks) -> dict[Modality, int]:
    """Placeholders of each modality in a text."""
    return {kind: text.count(names[kind][1]) for kind in MODALITIES}


def collapsed(text: str, names: Marks) -> str:
    """``text`` with each media item's expanded placeholders replaced by the original one. Without
    marks around them they are several items.

    >>> collapsed("<|vision_bos|><|VIDEO|><|VIDEO|><|vision_eos|>", MARKS)
    '<|vision_bos|><|VIDEO|><|vision_eos|>'
    >>> collapsed("<|VIDEO|><|VIDEO|>", MARKS)
    '<|VIDEO|><|VIDEO|>'
    """
    begin, video, end = map(re.escape, names["video"])
    sound_begin, audio, sound_end = map(re.escape, names["audio"])
    inside = f"{begin}{sound_begin}(?:{video}|{audio})+{sound_end}{end}"
    text = re.sub(inside, lambda _: "".join(names["video"]), text)
    for kind in MODALITIES:
        first, mark, last = names[kind]
        run = f"{re.escape(first)}(?:{re.escape(mark)}){{2,}}{re.escape(last)}"
        text = re.sub(run, first + mark + last, text)
    return text


def is_chatml(text: str) -> bool:
    """Whether a prompt is ChatML at all; a text-only trainer may use another template."""
    return "<|im_start|>" in text


def answers(text: str) -> bool:
    r"""Whether the last turn is the assistant's and still open, begun or not.

    >>> answers("<|im_start|>assistant\n"), answers("<|im_start|>assistant\n<think>")
    (True, True)
    >>> answers("<|im_start|>user\nhi<|im_end|>\n")
    False
    """
    last = text.rpartition("<|im_start|>")[2]
    return last.startswith("assistant\n") and "<|im_end|>" not in last


def is_whole(text: str) -> bool:
    """Whether a text is nothing but turns in the form of ChatML, the last one open."""
    return _WHOLE.fullmatch(text) is not None


def open_turn(text: str) -> str | None:
    """The role of a turn that another follows before it is closed.

    >>> open_turn("<|im_start|>user\\nhi<|im_start|>assistant\\n")
    'user'
    """
    found = _OPEN.search(text)
    return None if found is None else found.group(1)


def foreign_mark(text: str) -> str | None:
    """The first mark of a turn of other families than Qwen's.

    >>> foreign_mark("<s>[INST] hi [/INST]"), foreign_mark("hi")
    ('[INST]', None)
    """
    found = _FOREIGN.search(text)
    return None if found is None else found.group().strip()


def begun_answer(text: str) -> str:
    """What the last turn already says where it is the assistant's.

    >>> begun_answer("<|im_start|>assistant\\n<think>")
    '<think>'
    """
    return text.rpartition("<|im_start|>assistant\n")[2] if answers(text) else ""


def unknown_roles(text: str) -> tuple[str, ...]:
    """Roles of a ChatML text that no checkpoint was trained on.

    >>> unknown_roles("<|im_start|>user\\nhi<|im_end|>\\n<|im_start|>assitant\\n")
    ('assitant',)
    """
    return tuple(dict.fromkeys(role for role in _TURN.findall(text) if role not in ROLES))


def first_difference(got: str, want: str) -> tuple[int, str, str]:
    """Where two texts begin to differ, and up to 40 characters of each from there on.

    >>> first_difference("abcd", "abxd")
    (2, 'cd', 'xd')
    """
    place = next(
        (i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b),
        min(len(got), len(want)),
    )
    return place, got[place : place + 40], want[place : place + 40]


def _turn(message: Mapping[str, Any], names: Marks) -> str:
    content = message.get("content")
    if not isinstance(content, str):
        content = "".join(_part(part, names) for part in content or ())
    return turn(message.get("role"), content)


def _part(part: Any, names: Marks) -> str:
    if not isinstance(part, Mapping):
        return str(part)
    for kind in MODALITIES:
        if part.get("type") in (kind, f"{kind}_url") or kind in part or f"{kind}_url" in part:
            return "".join(names[kind])
    return str(part.get("text", ""))
