"""Settings of a run besides checkpoint and data: read strictly, before anything heavy loads.

A checkpoint folder may contain an ``omni_grpo.json`` (the shipped tiny one does); a ``--config``
file in JSON or YAML overrides it. An unknown key is an error, never ignored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from omni_grpo_core.core.conversation import AudioPreference
from omni_grpo_core.core.media_config import MediaConfig
from omni_grpo_core.errors import ConfigError
from omni_grpo_core.io.strict import merge, read_mapping

__all__ = ["CHECKPOINT_SETTINGS", "Settings", "load_settings", "merge"]

CHECKPOINT_SETTINGS = "omni_grpo.json"


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of a pass.

    Raises ConfigError for a value out of range.
    """

    audio_in_video: AudioPreference = "auto"
    """How the audio of videos reaches the model; ``auto``: interleaved in each video that has a
    track, unless the row lists audio."""
    media: MediaConfig = field(default_factory=MediaConfig)
    """How much of the media the model is given."""
    max_prompt_length: int | None = None
    """Tokens, media included; ``None`` is no limit."""
    max_new_tokens: int = 256
    """Most tokens of a completion."""
    group_size: int = 4
    """Completions per prompt of the sampled rollout."""
    temperature: float = 1.0
    """Temperature of the sampled rollout; 0 is greedy."""
    seed: int = 0
    """Seed of the sampled rollout."""
    min_format: float = 0.5
    """Share of greedy completions that must be well-formed for a passing verdict."""
    min_accuracy: float = 0.0
    """Share of greedy completions that must be correct for a passing verdict."""

    def __post_init__(self) -> None:
        longest = self.max_prompt_length
        for name, ok, want in (
            ("max_prompt_length", longest is None or longest >= 1, "1 or more, or nothing"),
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("group_size", self.group_size >= 1, "1 or more"),
            # lower ones scale logits beyond what float32 can distinguish
            (
                "temperature",
                self.temperature == 0 or 0.01 <= self.temperature < math.inf,
                "0, or 0.01 or more, and finite",
            ),
            ("seed", abs(self.seed) < 1 << 63, "a whole number of 64 bits"),
            ("min_format", 0 <= self.min_format <= 1, "a share, 0 to 1"),
            ("min_accuracy", 0 <= self.min_accuracy <= 1, "a share, 0 to 1"),
        ):
            if not ok:
                raise ConfigError(
                    f"settings: {name}", got=f"{getattr(self, name)}", want=want, fix="correct it"
                )


def load_settings(checkpoint: Path, config: Path | None = None) -> Settings:
    """The checkpoint's own settings, overridden by those of ``config``.

    Raises:
        ConfigError: a file that is not JSON or YAML, an unknown key, a value of the wrong type.
    """
    settings = Settings()
    own = checkpoint / CHECKPOINT_SETTINGS
    if own.is_file():
        settings = merge(settings, read_mapping(own), str(own))
    if config is not None:
        settings = merge(settings, read_mapping(config), str(config))
    return settings
