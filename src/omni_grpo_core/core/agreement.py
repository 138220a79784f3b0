"""Compares processor and model before the first forward. A part of ``policy.py``.

Where they disagree, transformers raises nothing, or something deep inside: features at the wrong
rate, placeholders that are never filled.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from omni_grpo_core.core.family import Family
from omni_grpo_core.errors import CheckpointError
from omni_grpo_core.types import AUDIO_SAMPLING_RATE

MEL_SECONDS = 0.01
"""Length of one mel frame: what the audio towers of all families were trained on."""
WINDOW_SECONDS = 0.025
"""Length of the window of a mel frame."""

_COPY = "copy the processor files from the base checkpoint of these weights"
_RESTORE = "restore tokenizer and config from the base checkpoint: their token ids differ"
_PLACEHOLDERS = {
    token: (f"{token}_id", f"{token}_index")
    for token in ("image_token", "video_token", "audio_token")
}
"""Attribute of the processor, and the names of its id in a config, by version of transformers."""


@dataclass(frozen=True, slots=True)
class Fact:
    """``name``: where the processor has it; ``model``: where the model has it."""

    name: str
    found: Any
    model: str
    wanted: Any
    fix: str


def check_agreement(
    processor: Any, config: Any, family: Family, vocabulary: int, checkpoint: str
) -> None:
    """Raises ``CheckpointError`` for the first :class:`Fact` on which they disagree, a tokenizer
    with more tokens than the model has, or a pad token that is a placeholder. ``config``: the
    thinker's; ``vocabulary``: the number of its logits."""
    for fact in facts(processor, config, family):
        if fact.found != fact.wanted:
            raise CheckpointError(
                f"processor of {checkpoint}",
                got=f"{fact.name} {fact.found!r}",
                want=f"{fact.wanted!r}, {fact.model}",
                fix=fact.fix,
            )
    tokenizer = processor.tokenizer
    # ids may leave gaps
    tokens = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=0))
    if tokens > vocabulary:
        raise CheckpointError(
            f"processor of {checkpoint}",
            got=f"a tokenizer of {tokens} tokens, by its largest id",
            want=f"at most {vocabulary}, the model's vocabulary size",
            fix=_COPY,
        )
    _check_padding(tokenizer, config, checkpoint)


def _check_padding(tokenizer: Any, config: Any, checkpoint: str) -> None:
    """A batch that is padded with placeholders asks for media that are not there."""
    media = {_first_of(config, names) for names in _PLACEHOLDERS.values()}
    for name, pad in (
        (f"pad token {tokenizer.pad_token}, id", tokenizer.pad_token_id),
        ("config pad_token_id", getattr(config, "pad_token_id", None)),
        ("text_config pad_token_id", getattr(config.text_config, "pad_token_id", None)),
    ):
        if pad is not None and pad in media:
            raise CheckpointError(
                checkpoint, got=f"{name} {pad}", want="a token, not a placeholder", fix=_RESTORE
            )


def _first_of(config: Any, names: tuple[str, ...]) -> Any:
    return next((getattr(config, n) for n in names if getattr(config, n, None) is not None), None)


def facts(processor: Any, config: Any, family: Family) -> Iterator[Fact]:
    """What a processor and a model of a family both state or assume."""
    vision, audio = config.vision_config, config.audio_config
    for part in ("image_processor", "video_processor"):
        for name, of_model in (
            ("patch_size", "patch_size"),
            ("merge_size", "spatial_merge_size"),
            ("temporal_patch_size", "temporal_patch_size"),
        ):
            found, wanted = getattr(getattr(processor, part), name, None), getattr(vision, of_model)
            yield Fact(f"{part}.{name}", found, f"vision_config.{of_model}", wanted, _COPY)
        # other values would need another vision tower
        for name, wanted in (
            ("do_rescale", True),
            ("rescale_factor", 1 / 255),
            ("do_normalize", True),
            ("image_mean", family.image_mean),
            ("image_std", family.image_std),
        ):
            found = getattr(getattr(processor, part), name, None)
            why = "what the vision tower was trained on"
            yield Fact(f"{part}.{name}", _rounded(found), why, _rounded(wanted), _COPY)
    sound = processor.feature_extractor
    rate = AUDIO_SAMPLING_RATE
    for name, wanted, why in (
        ("feature_size", audio.num_mel_bins, "audio_config.num_mel_bins"),
        ("sampling_rate", rate, "the rate to which audio is decoded"),
        ("hop_length", round(rate * MEL_SECONDS), "10 ms, what the audio tower was trained on"),
        ("n_fft", round(rate * WINDOW_SECONDS), "25 ms, what the audio tower was trained on"),
        ("dither", 0.0, "no added noise"),
        ("padding_value", 0.0, "silence"),
    ):
        found = getattr(sound, name, None)
        yield Fact(f"feature_extractor.{name}", found, why, wanted, _COPY)
    for token, names in (
        *_PLACEHOLDERS.items(),
        ("vision_bos_token", ("vision_start_token_id",)),
        ("vision_eos_token", ("vision_end_token_id",)),
        ("audio_bos_token", ("audio_start_token_id",)),
        ("audio_eos_token", ("audio_end_token_id",)),
    ):
        text = getattr(processor, token, None)
        for name in [one for one in names if getattr(config, one, None) is not None][:1]:
            found = processor.tokenizer.convert_tokens_to_ids(text) if text else None
            yield Fact(f"{token} {text}, id", found, name, getattr(config, name), _RESTORE)
    steps = family.audio_tokens(round(1 / MEL_SECONDS))
    yield Fact(
        "audio tokens a second", steps, "position_id_per_seconds", config.position_id_per_seconds,
        "restore config.json from the base checkpoint: time positions follow the audio",
    )  # fmt: skip


def _rounded(value: Any) -> Any:
    """Numbers to six decimals: files write 1 / 255 with different precision."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_rounded, value))
    return round(value, 6) if isinstance(value, float) else value
