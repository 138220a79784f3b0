from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel

from omni_grpo_core.rewards.parse import parse, render
from omni_grpo_core.rewards.spans import token_bytes, token_offsets, token_span
from omni_grpo_core.types import Parsed


def test_the_answers_tokens_of_a_completion_cut_at_will() -> None:
    text = render("他笑", "because 😀", "B")
    data = text.encode()
    pieces = [data[i : i + 3] for i in range(0, len(data), 3)]
    parsed = parse(text)
    assert isinstance(parsed, Parsed)
    offsets = token_offsets(pieces)
    for section in (parsed.context, parsed.think, parsed.answer):
        first, end = token_span(section, offsets)
        held = b"".join(pieces[first:end])
        assert section.text.encode() in held
        # nothing to spare: without its first or its last token a part is missing
        assert section.text.encode() not in b"".join(pieces[first + 1 : end])
        assert section.text.encode() not in b"".join(pieces[first : end - 1])


@given(st.lists(st.binary(max_size=5), max_size=20))
def test_offsets_cover_the_decoded_text_whatever_the_bytes(pieces: list[bytes]) -> None:
    text = b"".join(pieces).decode("utf-8", "replace")
    offsets = token_offsets(pieces)
    assert len(offsets) == len(pieces)
    assert all(a <= b for a, b in offsets)
    assert [a for a, _ in offsets] == sorted(a for a, _ in offsets)
    covered = {i for a, b in offsets for i in range(a, b)}
    # a sequence that breaks off at the very end becomes one or more U+FFFD only when closed
    assert set(range(len(text.rstrip("\ufffd")))) <= covered


@pytest.mark.parametrize("text", ["he smiles", " 他笑了\n", "naïve 😀\t\x00"])
def test_byte_spelling_is_the_tokenizers_own(text: str) -> None:
    [(spelled, _)] = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    assert token_bytes(spelled) == text.encode()


def test_a_section_beyond_the_tokens_has_an_empty_span() -> None:
    parsed = parse(render("c", "t", "A"))
    assert isinstance(parsed, Parsed)
    assert token_span(parsed.answer, [(0, 3)]) == (1, 1)
