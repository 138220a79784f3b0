"""The order of the tokens of a clip with its sound inside, worked out by hand from the model's
definition: 25 positions a second in chunks of 2 s (Qwen2.5-Omni), 13 a second in order of time
(Qwen3-Omni). No library decides here."""

from __future__ import annotations

import pytest

from omni_grpo_core.core.family import QWEN2_5_OMNI, QWEN3_OMNI
from omni_grpo_core.parity.definition import ClipTokens, Runs, interleaved


def said(*runs: str) -> Runs:
    """``"8v"`` is 8 video tokens."""
    names = {"v": "video", "a": "audio"}
    return tuple((names[run[-1]], int(run[:-1])) for run in runs)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("clip", "order"),
    [
        # 8 frames at 2 a second: 4 pairs, one second each; two of them in each chunk of 2 s
        (ClipTokens(4, 4, 1.0, 100), said("8v", "50a", "8v", "50a")),
        # 8 frames at 4 a second: all 4 pairs begin before the second 2
        (ClipTokens(4, 4, 0.5, 50), said("16v", "50a")),
        # 4 frames at 1 a second: the second pair begins at the second 2, with the second chunk
        (ClipTokens(2, 4, 2.0, 100), said("4v", "50a", "4v", "50a")),
        # a track that ends before its clip, and one that is longer
        (ClipTokens(4, 1, 1.0, 30), said("2v", "30a", "2v")),
        (ClipTokens(2, 1, 1.0, 120), said("2v", "120a")),
        # a pair every 3 s: at 0, 75 and 150, in chunks 0, 1 and 3; chunk 2 is only heard
        (ClipTokens(3, 1, 3.0, 200), said("1v", "50a", "1v", "100a", "1v", "50a")),
    ],
)
def test_chunks_of_two_seconds(clip: ClipTokens, order: Runs) -> None:
    assert interleaved(clip, QWEN2_5_OMNI) == order


@pytest.mark.parametrize(
    ("clip", "order"),
    [
        # pairs at 0 and 13: the second is shown as the second of sound 14 begins
        (ClipTokens(2, 4, 1.0, 26), said("4v", "13a", "4v", "13a")),
        # pairs at 0 and 6.5: sounds 0 to 6 begin before it
        (ClipTokens(2, 4, 0.5, 13), said("4v", "7a", "4v", "6a")),
    ],
)
def test_order_of_time(clip: ClipTokens, order: Runs) -> None:
    assert interleaved(clip, QWEN3_OMNI) == order
