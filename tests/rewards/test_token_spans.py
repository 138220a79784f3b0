"""The parser's offsets find the tokens of each section, however the text was tokenized."""

from __future__ import annotations

import pytest

from omni_grpo_core.losses.spans import token_offsets, token_span
from omni_grpo_core.rewards.parse import parse, render
from omni_grpo_core.types import Parsed


@pytest.mark.parametrize("width", [1, 2, 3, 7])
def test_a_sections_tokens_hold_it_and_nothing_to_spare(width: int) -> None:
    text = render("他笑", "because 😀", "B")
    data = text.encode()
    pieces = [data[i : i + width] for i in range(0, len(data), width)]
    parsed = parse(text)
    assert isinstance(parsed, Parsed)
    offsets = token_offsets(pieces, text)
    for section in (parsed.context, parsed.think, parsed.answer):
        first, end = token_span(offsets, section.start, section.end)
        wanted = section.text.encode()
        assert wanted in b"".join(pieces[first:end])
        assert wanted not in b"".join(pieces[first + 1 : end])
        assert wanted not in b"".join(pieces[first : end - 1])
