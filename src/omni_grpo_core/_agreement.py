"""Processor and model, held against each other before the first forward. A part of ``policy.py``.

Where they disagree nothing is raised, or something deep inside the library: features of another
rate, placeholders that nobody fills.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from omni_grpo_core.errors import CheckpointError
from omni_grpo_core.family import Family
from omni_grpo_core.types import AUDIO_SAMPLING_RATE

MEL_SECONDS = 0.01
"""Of one mel frame: what the audio towers of all families were trained on."""
WINDOW_SECONDS = 0.025
"""That a mel frame looks at."""

_OTHERS = "copy the processor files from the base checkpoint of these weights"
_IDS = "restore tokenizer and config from the base checkpoint: they name other tokens"


@dataclass(frozen=True, slots=True)
class Fact:
    """``name``: where it stands in the processor; ``model``: where the model has it."""

    name: str
    found: Any
    model: str
    wanted: Any
    fix: str


def check_agreement(
    processor: Any, config: Any, family: Family, vocabulary: int, checkpoint: str
) -> None:
    """Raises ``CheckpointError`` for the first :class:`Fact` in which they disagree, or a tokenizer
    with more tokens than the model has. ``config``: the thinker's; ``vocabulary``: its scores."""
    for fact in facts(processor, config, family):
        if fact.found != fact.wanted:
            raise CheckpointError(
                f"processor of {checkpoint}",
                got=f"{fact.name} {fact.found!r}",
                want=f"{fact.wanted!r}, {fact.model}",
                fix=fact.fix,
            )
    tokens = len(processor.tokenizer)
    if tokens > vocabulary:
        raise CheckpointError(
            f"processor of {checkpoint}",
            got=f"a tokenizer of {tokens} tokens",
            want=f"at most {vocabulary}, the vocabulary of the model",
            fix=_OTHERS,
        )


def facts(processor: Any, config: Any, family: Family) -> Iterator[Fact]:
    """What a processor and a model of a family both say, or take for granted."""
    vision, audio = config.vision_config, config.audio_config
    for part in ("image_processor", "video_processor"):
        for ours, theirs in (
            ("patch_size", "patch_size"),
            ("merge_size", "spatial_merge_size"),
            ("temporal_patch_size", "temporal_patch_size"),
        ):
            found = getattr(getattr(processor, part), ours, None)
            wanted = getattr(vision, theirs)
            yield Fact(f"{part}.{ours}", found, f"vision_config.{theirs}", wanted, _OTHERS)
    sound = processor.feature_extractor
    rate = AUDIO_SAMPLING_RATE
    for name, wanted, why in (
        ("feature_size", audio.num_mel_bins, "audio_config.num_mel_bins"),
        ("sampling_rate", rate, "the rate that sound is decoded to"),
        ("hop_length", round(rate * MEL_SECONDS), "10 ms, what the audio tower was trained on"),
        ("n_fft", round(rate * WINDOW_SECONDS), "25 ms, what the audio tower was trained on"),
    ):
        found = getattr(sound, name, None)
        yield Fact(f"feature_extractor.{name}", found, why, wanted, _OTHERS)
    for token, names in (
        ("image_token", ("image_token_id", "image_token_index")),
        ("video_token", ("video_token_id", "video_token_index")),
        ("audio_token", ("audio_token_id", "audio_token_index")),
        ("vision_bos_token", ("vision_start_token_id",)),
        ("vision_eos_token", ("vision_end_token_id",)),
        ("audio_bos_token", ("audio_start_token_id",)),
        ("audio_eos_token", ("audio_end_token_id",)),
    ):
        text = getattr(processor, token, None)
        for name in [one for one in names if getattr(config, one, None) is not None][:1]:
            found = processor.tokenizer.convert_tokens_to_ids(text) if text else None
            yield Fact(f"{token} {text}, id", found, name, getattr(config, name), _IDS)
    steps = family.audio_tokens(round(1 / MEL_SECONDS))
    yield Fact(
        "audio tokens a second", steps, "position_id_per_seconds", config.position_id_per_seconds,
        "restore config.json from the base checkpoint: time positions follow the sound",
    )  # fmt: skip
