"""The reference pipeline that everything else is compared with.

``stages``  the graph: each stage's inputs, how it is made, and what must hold, by ``checks``
``inputs``  samples through the stages up to the batch
``check``   the pass of ``omni-grpo check``, and the proof that each modality reaches the model

This module renders the ChatML that Qwen-Omni was trained on, without a template engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omni_grpo_core.types import Conversation, Modality, TextPart

Marks = Mapping[Modality, tuple[str, str, str]]
"""Begin, placeholder and end of each modality."""

MARKS: Marks = {
    "image": ("<|vision_bos|>", "<|IMAGE|>", "<|vision_eos|>"),
    "video": ("<|vision_bos|>", "<|VIDEO|>", "<|vision_eos|>"),
    "audio": ("<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>"),
}
"""Qwen2.5-Omni's own, for use without a processor."""
GENERATION_PROMPT = "<|im_start|>assistant\n"


def marks_of(processor: Any) -> Marks:
    """The marks of a processor."""
    vision = processor.vision_bos_token, processor.vision_eos_token
    return {
        "image": (vision[0], processor.image_token, vision[1]),
        "video": (vision[0], processor.video_token, vision[1]),
        "audio": (processor.audio_bos_token, processor.audio_token, processor.audio_eos_token),
    }


def turn(role: object, content: str) -> str:
    """
    >>> turn("user", "hi")
    '<|im_start|>user\\nhi<|im_end|>\\n'
    """
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"


def reference_text(conversation: Conversation, processor: Any) -> str:
    """The correct rendering of a conversation, generation prompt included."""
    marks = marks_of(processor)
    turns = (
        turn(
            message.role,
            "".join(
                part.text if isinstance(part, TextPart) else "".join(marks[part.ref.modality])
                for part in message.parts
            ),
        )
        for message in conversation.messages
    )
    return "".join(turns) + GENERATION_PROMPT
