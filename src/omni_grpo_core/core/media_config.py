"""How much of the media a model is given: settings only, so that reading them loads no decoder."""

from __future__ import annotations

from dataclasses import dataclass

from omni_grpo_core.errors import ConfigError

TOKEN_SIDE = 28
"""Side in pixels of the area that one token covers: patches of 14, merged 2 x 2."""
MAX_FPS = 1000
MAX_FRAMES = 1 << 20
MAX_PIXELS = 1 << 28
"""Larger limits are typing errors, and sums of them overflow."""
FRAMES_PER_TOKEN = 2
"""qwen-omni-utils' ``FRAME_FACTOR`` (a test compares them): frames enter the model in pairs."""


@dataclass(frozen=True, slots=True)
class MediaConfig:
    """How much of the media a model is given; the defaults are those of qwen-omni-utils 0.0.9.

    Sides are rounded to multiples of 28. A maximum below the default minimum removes the minimum.
    Raises ConfigError for a limit that cannot work.
    """

    fps: float = 2.0
    """Frames taken per second of clip."""
    min_frames: int = 4
    """Fewest frames of a clip."""
    max_frames: int = 768
    """Most frames of a clip."""
    min_pixels: int | None = None
    """Smallest area of a video frame after resizing; ``None`` is the library's default, 100,352."""
    max_pixels: int | None = None
    """Largest area of a video frame after resizing; ``None`` is the library's default, 602,112
    (less for a clip of more than 300 frames, whatever is set)."""
    image_min_pixels: int | None = None
    """Smallest area of an image after resizing; ``None`` is the library's default, 3,136."""
    image_max_pixels: int | None = None
    """Largest area of an image after resizing; ``None`` is the library's default, 12,845,056."""

    def __post_init__(self) -> None:
        if not 0 < self.fps <= MAX_FPS:
            raise ConfigError(
                "media fps", got=f"{self.fps}", want=f"above 0, at most {MAX_FPS}", fix="try 2.0"
            )
        if not FRAMES_PER_TOKEN <= self.min_frames <= self.max_frames <= MAX_FRAMES:
            raise ConfigError(
                "media min_frames, max_frames",
                got=f"{self.min_frames}, {self.max_frames}",
                want=f"2 <= min_frames <= max_frames <= {MAX_FRAMES}",
                fix="use the defaults, 4 and 768; frames enter the model in pairs",
            )
        least = TOKEN_SIDE * TOKEN_SIDE
        for kind, low, high in (
            ("", self.min_pixels, self.max_pixels),
            ("image_", self.image_min_pixels, self.image_max_pixels),
        ):
            given = [n for n in (low, high) if n is not None]
            if any(not least <= n <= MAX_PIXELS for n in given) or given != sorted(given):
                raise ConfigError(
                    f"media {kind}min_pixels, {kind}max_pixels",
                    got=f"{low}, {high}",
                    want=f"{least} <= {kind}min_pixels <= {kind}max_pixels <= {MAX_PIXELS}",
                    fix=f"set limits of at least one token, {TOKEN_SIDE} x {TOKEN_SIDE} pixels",
                )
