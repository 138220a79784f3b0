"""What differs between the omni families, behind one small interface.

A family is chosen by the checkpoint's ``model_type``. Token *names* and merge sizes are read from
the checkpoint's own processor; what stands here is only what no processor tells.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from omni_grpo_core.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Family:
    """One model family.

    ``model_types``: the ``model_type`` values of ``config.json`` that belong to it, full models
    first, thinkers last. ``thinker_class``: the transformers class that takes text, image, video
    and audio in and gives text out; ``processor_class``: the one that prepares its input.
    ``audio_tokens``: mel frames of one audio -> placeholders.
    """

    name: str
    model_types: tuple[str, ...]
    thinker_class: str
    processor_class: str
    audio_tokens: Callable[[int], int]


def qwen2_5_omni_audio_tokens(frames: int) -> int:
    """Placeholders of an audio of ``frames`` mel frames (10 ms each): 25 a second.

    The tower halves twice: a stride-2 convolution, then average pooling by 2 (Qwen2.5-Omni
    technical report, arXiv 2503.20215, section 2.2: one frame of output per 40 ms).

    >>> qwen2_5_omni_audio_tokens(100)
    25
    """
    return ((frames - 1) // 2 + 1 - 2) // 2 + 1


QWEN2_5_OMNI = Family(
    name="qwen2_5_omni",
    model_types=("qwen2_5_omni", "qwen2_5_omni_thinker"),
    thinker_class="Qwen2_5OmniThinkerForConditionalGeneration",
    processor_class="Qwen2_5OmniProcessor",
    audio_tokens=qwen2_5_omni_audio_tokens,
)

FAMILIES = (QWEN2_5_OMNI,)


def family_of(model_type: str, checkpoint: str) -> Family:
    """The family of a checkpoint's ``model_type``.

    Raises:
        CheckpointError: no family has it.
    """
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise CheckpointError(
        checkpoint,
        got=f"model_type {model_type!r}",
        want=f"one of {known}",
        fix="point to a Qwen-Omni checkpoint",
    )
