from __future__ import annotations

from dataclasses import replace

import torch
from hand_made_check import decode, media_row, text_row

from omni_grpo_core.report.html import MOST_CELLS
from omni_grpo_core.report.html.ribbon import ribbon
from omni_grpo_core.types import Span

POSITIONS = torch.stack([torch.arange(12), torch.arange(12) + 100, torch.arange(12) + 200])


def test_interleaved_chunks_alternate_with_their_tokens() -> None:
    runs = ribbon(media_row(), POSITIONS, decode)
    assert [run.label for run in runs] == [
        "<|im_start|> · 0",
        "text · 1",
        "video 0 · 2–3",
        "audio 0 · 4–6",
        "video 0 · 7–8",
        "audio 0 · 9",
        "text · 10–11",
    ]
    assert [len(run.cells) for run in runs] == [1, 1, 2, 3, 2, 1, 2]
    assert runs[-1].note == "What?"


def test_a_cell_shows_token_id_and_position() -> None:
    cell = ribbon(media_row(), POSITIONS, decode)[3].cells[1]
    assert cell.title == "token 5 · '<|AUDIO|>' · id 4 · audio 0 · position t 5 h 105 w 205"


def test_a_medium_shows_its_position() -> None:
    assert ribbon(media_row(), POSITIONS, decode)[2].note == "t 2–3 h 102–103 w 202–203"
    assert ribbon(media_row(), None, decode)[2].note == ""


def test_neighbouring_items_of_one_modality_are_separate() -> None:
    row = replace(media_row(), spans=(Span("video", 0, 2, 1), Span("video", 1, 3, 1)))
    assert [run.label for run in ribbon(row, None, decode)][2:4] == ["video 0 · 2", "video 1 · 3"]


def test_line_breaks_of_the_prompt_are_visible() -> None:
    assert ribbon(text_row(), None, decode)[1].note == "user ↵ What?"


def test_a_long_row_has_several_tokens_per_cell_and_none_is_lost() -> None:
    length = 5 * MOST_CELLS + 2  # six per cell, and two in the last
    row = replace(text_row(), input_ids=torch.full((length,), 5))
    (run,) = ribbon(row, None, decode)
    assert len(run.cells) <= MOST_CELLS
    assert run.label == f"text · 0–{length - 1}"
    assert run.cells[-1].title.startswith(f"token {length - 2}–{length - 1} · ")
