from __future__ import annotations

from dataclasses import replace

import pytest
from hand_made_check import media_row, text_row

from omni_grpo_core.report import varied


@pytest.mark.parametrize(
    ("limit", "chosen"), [(2, (0, 4)), (3, (0, 1, 4)), (4, (0, 1, 2, 4)), (9, (0, 1, 2, 3, 4))]
)
def test_every_kind_comes_before_a_second_of_any(limit: int, chosen: tuple[int, ...]) -> None:
    rows = [text_row(str(i)) for i in range(4)] + [media_row()]
    assert varied(rows, limit) == chosen


def test_audio_mode_modality_and_chunks_make_a_kind() -> None:
    whole = replace(media_row(), spans=media_row().spans[:2])
    picture = replace(whole, spans=whole.spans[:1])
    rows = [media_row(), whole, picture, replace(picture, audio_in_video="off"), media_row()]
    assert varied(rows, 4) == (0, 1, 2, 3)
