"""What differs between the omni families, behind one small interface.

A family is chosen by the checkpoint's ``model_type``. Token *names*, patch and merge sizes are read
from the checkpoint's own processor; what stands here is only what no processor tells.
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
    and audio in and gives text out; ``processor_class``: the one that prepares its input;
    ``since``: the first transformers that has them. ``audio_tokens``: mel frames of one audio ->
    placeholders. ``whole_positions``: time positions are cut to whole numbers, else they are
    fractions (13 a second, a frame pair every 0.5 s: 6.5 apart). ``audio_one_by_one``: audios of
    one call of the tower touch each other. Qwen3-Omni's pads chunks of a second to the longest of
    the call and convolves over the padding, so that an audio under a second comes out otherwise
    beside a longer one; and in 4.57 without flash attention all audios of a call attend to each
    other: one row hears another's sound. ``deepstack``: features of the vision tower are also
    added behind the first layers of the text model. ``image_mean``, ``image_std``: of each colour,
    0 to 1, what the vision tower was trained on.
    """

    name: str
    model_types: tuple[str, ...]
    thinker_class: str
    processor_class: str
    since: str
    audio_tokens: Callable[[int], int]
    whole_positions: bool
    audio_one_by_one: bool
    deepstack: bool
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]


def qwen2_5_omni_audio_tokens(frames: int) -> int:
    """Placeholders of an audio of ``frames`` mel frames (10 ms each): 25 a second.

    The tower halves twice: a stride-2 convolution, then average pooling by 2 (Qwen2.5-Omni
    technical report, arXiv 2503.20215, section 2.2: one frame of output per 40 ms).

    >>> qwen2_5_omni_audio_tokens(100)
    25
    """
    return ((frames - 1) // 2 + 1 - 2) // 2 + 1


def qwen3_omni_audio_tokens(frames: int) -> int:
    """Placeholders of an audio of ``frames`` mel frames (10 ms each): 13 a second.

    Each second alone goes through three stride-2 convolutions, 100 frames to 13, and the rest of
    a second likewise (Qwen3-Omni technical report, arXiv 2509.17765, its audio transformer: 8 times
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
    processor_class="Qwen2_5OmniProcessor",
    since="4.52",
    audio_tokens=qwen2_5_omni_audio_tokens,
    whole_positions=True,
    audio_one_by_one=False,
    deepstack=False,
    # CLIP's
    image_mean=(0.48145466, 0.4578275, 0.40821073),
    image_std=(0.26862954, 0.26130258, 0.27577711),
)

QWEN3_OMNI = Family(
    name="qwen3_omni",
    model_types=("qwen3_omni_moe", "qwen3_omni_moe_thinker"),
    thinker_class="Qwen3OmniMoeThinkerForConditionalGeneration",
    processor_class="Qwen3OmniMoeProcessor",
    since="4.57",
    audio_tokens=qwen3_omni_audio_tokens,
    whole_positions=False,
    audio_one_by_one=True,
    deepstack=True,
    image_mean=(0.5, 0.5, 0.5),
    image_std=(0.5, 0.5, 0.5),
)

FAMILIES = (QWEN2_5_OMNI, QWEN3_OMNI)


def family_of(model_type: object, checkpoint: str) -> Family:
    """The family of a checkpoint's ``model_type``, whatever its config has there.

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
        fix="point to a Qwen-Omni checkpoint",
    )


def published_name(name: str) -> str:
    """The name that published checkpoints have for a thinker's weight or module. transformers 5.23
    put one more model around all but the head; a name that is so already is left alone.

    >>> published_name("model.language_model.layers.0.mlp.up_proj.weight")
    'model.layers.0.mlp.up_proj.weight'
    >>> published_name("model.visual.merger.ln_q.weight"), published_name("lm_head.weight")
    ('visual.merger.ln_q.weight', 'lm_head.weight')
    """
    for tower in ("visual.", "audio_tower."):
        if name.startswith(f"model.{tower}"):
            return name.removeprefix("model.")
    return name.replace("model.language_model.", "model.", 1)
