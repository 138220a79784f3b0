"""What a conversation should have been rendered to: the ChatML that Qwen-Omni was trained on."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from omni_grpo_core.doctor.evidence import Case
from omni_grpo_core.types import Modality

_KINDS: tuple[Modality, ...] = ("image", "video", "audio")
_NAMES: Mapping[Modality, tuple[str, str, str]] = {
    "image": ("<|vision_bos|>", "<|IMAGE|>", "<|vision_eos|>"),
    "video": ("<|vision_bos|>", "<|VIDEO|>", "<|vision_eos|>"),
    "audio": ("<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>"),
}
"""Qwen2.5-Omni's own, for a recording without a checkpoint."""

PROMPT = "<|im_start|>assistant\n"
DEFAULT_SYSTEM = "You are a helpful assistant."
ROLES = ("system", "user", "assistant", "tool")
_TURN = re.compile(r"<\|im_start\|>([^\n]*)\n")


def marks(case: Case) -> Mapping[Modality, tuple[str, str, str]]:
    """Begin, placeholder and end of each modality, as the checkpoint's processor names them."""
    if case.reference is None:
        return _NAMES
    p = case.reference.policy.processor
    return {
        "image": (p.vision_bos_token, p.image_token, p.vision_eos_token),
        "video": (p.vision_bos_token, p.video_token, p.vision_eos_token),
        "audio": (p.audio_bos_token, p.audio_token, p.audio_eos_token),
    }


def reference_texts(
    messages: Sequence[Mapping[str, Any]], names: Mapping[Modality, tuple[str, str, str]]
) -> tuple[str, ...]:
    """The right renderings of a conversation, generation prompt included.

    Two where it has no system message: Qwen's template puts its own default in front, a plain one
    does not.
    """
    turns = "".join(_turn(message, names) for message in messages)
    bare = turns + PROMPT
    if messages and messages[0].get("role") == "system":
        return (bare,)
    default = f"<|im_start|>system\n{DEFAULT_SYSTEM}<|im_end|>\n"
    return (default + bare, bare)


def placeholders(text: str, names: Mapping[Modality, tuple[str, str, str]]) -> dict[Modality, int]:
    """Placeholders of each modality in a text."""
    return {kind: text.count(names[kind][1]) for kind in _KINDS}


def collapsed(text: str, names: Mapping[Modality, tuple[str, str, str]]) -> str:
    """``text`` with every medium's expanded placeholders as the one that it had at first.

    >>> collapsed("a<|VIDEO|><|VIDEO|>b", _NAMES)
    'a<|VIDEO|>b'
    """
    begin, video, end = map(re.escape, names["video"])
    sound_begin, audio, sound_end = map(re.escape, names["audio"])
    inside = f"{begin}{sound_begin}(?:{video}|{audio})+{sound_end}{end}"
    text = re.sub(inside, lambda _: "".join(names["video"]), text)
    for kind in _KINDS:
        mark = re.escape(names[kind][1])
        text = re.sub(f"(?:{mark}){{2,}}", names[kind][1], text)
    return text


def is_chatml(text: str) -> bool:
    """Whether a prompt is of Qwen's kind at all; a text-only trainer may have any other."""
    return "<|im_start|>" in text


def unknown_roles(text: str) -> tuple[str, ...]:
    """Roles of a ChatML text that no checkpoint was trained on.

    >>> unknown_roles("<|im_start|>user\\nhi<|im_end|>\\n<|im_start|>assitant\\n")
    ('assitant',)
    """
    return tuple(dict.fromkeys(role for role in _TURN.findall(text) if role not in ROLES))


def first_difference(got: str, want: str) -> tuple[int, str, str]:
    """Where two texts part, and a little of each from there on.

    >>> first_difference("abcd", "abxd")
    (2, 'cd', 'xd')
    """
    place = next(
        (i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b),
        min(len(got), len(want)),
    )
    return place, got[place : place + 40], want[place : place + 40]


def _turn(message: Mapping[str, Any], names: Mapping[Modality, tuple[str, str, str]]) -> str:
    content = message.get("content")
    if not isinstance(content, str):
        content = "".join(_part(part, names) for part in content or ())
    return f"<|im_start|>{message.get('role')}\n{content}<|im_end|>\n"


def _part(part: Any, names: Mapping[Modality, tuple[str, str, str]]) -> str:
    if not isinstance(part, Mapping):
        return str(part)
    for kind in _KINDS:
        if part.get("type") in (kind, f"{kind}_url") or kind in part or f"{kind}_url" in part:
            return "".join(names[kind])
    return str(part.get("text", ""))
