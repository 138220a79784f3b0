"""What the model's own definition says about the tokens of a clip with its sound inside.

Independent of every library's code, transformers' included: it decides which of two paths is right.

Qwen2.5-Omni (arXiv 2503.20215, section 2.1, TMRoPE and its time-interleaving): 25 positions a
second, one audio token each; the clip is cut into chunks of 2 seconds, in each the video tokens
come first, then the audio tokens. Qwen3-Omni (arXiv 2509.17765, section 2.2): 13 a second, and
tokens simply in the order of their time, video first where both begin together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from omni_grpo_core.core.family import Family

Sound = Literal["video", "audio"]
Runs = tuple[tuple[Sound, int], ...]
CHUNK_SECONDS = 2.0
_ROUNDING = 1e-4
"""Positions: a grid's seconds come as float32."""


@dataclass(frozen=True, slots=True)
class ClipTokens:
    """A clip with its track: ``grids`` in time, ``per_grid`` tokens each, ``seconds`` that one
    grid lasts, ``audio`` tokens."""

    grids: int
    per_grid: int
    seconds: float
    audio: int


def positions_per_second(family: Family) -> int:
    """
    >>> from omni_grpo_core.core.family import QWEN2_5_OMNI, QWEN3_OMNI
    >>> positions_per_second(QWEN2_5_OMNI), positions_per_second(QWEN3_OMNI)
    (25, 13)
    """
    return family.audio_tokens(100)


def interleaved(clip: ClipTokens, family: Family, chunk_seconds: float = CHUNK_SECONDS) -> Runs:
    """The order of a clip's tokens, as runs.

    >>> from omni_grpo_core.core.family import QWEN2_5_OMNI
    >>> interleaved(ClipTokens(grids=4, per_grid=4, seconds=1.0, audio=100), QWEN2_5_OMNI)
    (('video', 8), ('audio', 50), ('video', 8), ('audio', 50))
    """
    rate = positions_per_second(family)
    # a position, then video before audio, where both begin together or share a chunk
    chunk = rate * chunk_seconds if family.whole_positions else None

    def place(position: float) -> float:
        return position if chunk is None else (position + _ROUNDING) // chunk

    tokens: list[tuple[float, int, Sound]] = [
        (place(grid * clip.seconds * rate) - (_ROUNDING if chunk is None else 0), 0, "video")
        for grid in range(clip.grids)
        for _ in range(clip.per_grid)
    ]
    tokens += [(place(number), 1, "audio") for number in range(clip.audio)]
    return runs(kind for _, _, kind in sorted(tokens, key=lambda token: token[:2]))


def runs(kinds: Iterable[Sound]) -> Runs:
    """
    >>> runs(["video", "video", "audio"])
    (('video', 2), ('audio', 1))
    """
    return tuple((kind, len(list(run))) for kind, run in groupby(kinds))


def said(found: Sequence[tuple[Sound, int]], most: int = 8) -> str:
    """
    >>> said((("video", 16), ("audio", 50)))
    '16 video, 50 audio'
    """
    parts = [f"{count} {kind}" for kind, count in found[:most]]
    return ", ".join(parts) + (", …" if len(found) > most else "")
