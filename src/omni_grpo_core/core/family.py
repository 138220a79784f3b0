"""The differences between the omni families, behind one small interface.

A family is chosen by the checkpoint's ``model_type``. Token *names*, patch and merge sizes are read
from the checkpoint's own processor; this module has only what no processor states.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from omni_grpo_core.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Family:
    """One model family.

    ``model_types``: its ``model_type`` values in ``config.json``, full models first, thinkers last.
    ``thinker_class``: the transformers class from text, image, video and audio to text;
    ``full_class``: the architecture that a full checkpoint's config names; ``processor_class``:
    the one that prepares its input; ``since``: the first version of transformers that has them.
    ``audio_tokens``: mel frames of one audio -> placeholders.
    ``whole_positions``: time positions are truncated to integers, else they are fractions (13 a
    second, a frame pair every 0.5 s: 6.5 apart). ``audio_one_by_one``: audios in one call of the
    tower affect each other. Qwen3-Omni's tower pads one-second chunks to the longest in the call
    and convolves over the padding, so that an audio under a second gives different features beside
    a longer one; and in 4.57 without flash attention all audios of a call attend to each other.
    ``deepstack``: features of the vision tower are also added after the first layers of the text
    model. ``image_mean``, ``image_std``: per colour, 0 to 1, as in the vision tower's training.
    """

    name: str
    model_types: tuple[str, ...]
    thinker_class: str
    full_class: str
    processor_class: str
    since: str
    audio_tokens: Callable[[int], int]
    whole_positions: bool
    audio_one_by_one: bool
    deepstack: bool
    audio_limited: bool
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]


def qwen2_5_omni_audio_tokens(frames: int) -> int:
    """Placeholders of an audio of ``frames`` mel frames (10 ms each): 25 a second.

    The tower halves twice: a stride-2 convolution, then average pooling by 2 (Qwen2.5-Omni
    technical report, arXiv 2503.20215, section 2.2: one output frame per 40 ms).

    >>> qwen2_5_omni_audio_tokens(100)
    25
    """
    return ((frames - 1) // 2 + 1 - 2) // 2 + 1


def qwen3_omni_audio_tokens(frames: int) -> int:
    """Placeholders of an audio of ``frames`` mel frames (10 ms each): 13 a second.

    Each second goes alone through three stride-2 convolutions, 100 frames to 13, and so does the
    remainder (Qwen3-Omni technical report, arXiv 2509.17765, its audio transformer: 8 times
    downsampled, 12.5 Hz).

    >>> [qwen3_omni_audio_tokens(n) for n in (1, 8, 9, 100, 101, 250)]
    [1, 1, 2, 13, 14, 33]
    """
    seconds, rest = divmod(frames, 100)
    return 13 * seconds + (rest + 7) // 8


QWEN2_5_OMNI = Family(
    name="qwen2_5_omni",
    model_types=("qwen2_5_omni", "qwen2_5_omni_thinker"),
    thinker_class="Qwen2_5OmniThinkerForConditionalGeneration",
    full_class="Qwen2_5OmniModel",
    processor_class="Qwen2_5OmniProcessor",
    since="4.52",
    audio_tokens=qwen2_5_omni_audio_tokens,
    whole_positions=True,
    audio_one_by_one=False,
    deepstack=False,
    audio_limited=True,
    # CLIP's
    image_mean=(0.48145466, 0.4578275, 0.40821073),
    image_std=(0.26862954, 0.26130258, 0.27577711),
)

QWEN3_OMNI = Family(
    name="qwen3_omni",
    model_types=("qwen3_omni_moe", "qwen3_omni_moe_thinker"),
    thinker_class="Qwen3OmniMoeThinkerForConditionalGeneration",
    full_class="Qwen3OmniMoeForConditionalGeneration",
    processor_class="Qwen3OmniMoeProcessor",
    since="4.57",
    audio_tokens=qwen3_omni_audio_tokens,
    whole_positions=False,
    audio_one_by_one=True,
    deepstack=True,
    audio_limited=False,
    image_mean=(0.5, 0.5, 0.5),
    image_std=(0.5, 0.5, 0.5),
)

FAMILIES = (QWEN2_5_OMNI, QWEN3_OMNI)


def family_of(model_type: object, checkpoint: str) -> Family:
    """The family of a checkpoint's ``model_type``, of any JSON type.

    Raises:
        CheckpointError: no family has it.
    """
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise CheckpointError(
        checkpoint,
        got="no model_type" if model_type is None else f"model_type {model_type!r}",
        want=f"one of {known}",
        fix="pass a Qwen-Omni checkpoint",
    )


def published_name(name: str) -> str:
    """A thinker's weight or module name as in published checkpoints. transformers 5.23 wrapped all
    but the head in another model, and PEFT may have wrapped the whole; a published name is left
    unchanged.

    >>> published_name("model.language_model.layers.0.mlp.up_proj.weight")
    'model.layers.0.mlp.up_proj.weight'
    >>> published_name("model.visual.merger.ln_q.weight"), published_name("lm_head.weight")
    ('visual.merger.ln_q.weight', 'lm_head.weight')
    >>> published_name("base_model.model.visual.merger.ln_q.weight")
    'visual.merger.ln_q.weight'
    """
    name = name.removeprefix("base_model.model.")
    for tower in ("visual.", "audio_tower."):
        if name.startswith(f"model.{tower}"):
            return name.removeprefix("model.")
    return name.replace("model.language_model.", "model.", 1)
