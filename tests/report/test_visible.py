from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omni_grpo_core.report import shortened, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred", "␛[31mred"),
        ("a\r\x07b", "a␍␇b"),
        ("\x7f\x9b", "␡\\x9b"),
        ("safe\u202eetirw", "safe\\u202eetirw"),
        ("half \ud800", "half \\ud800"),
        ("line\n\ttab", "line\n\ttab"),
        ("schöne ไฟ 火 👩‍🚀", "schöne ไฟ 火 👩‍🚀"),
    ],
)
def test_control_characters_are_escaped_and_visible_ones_kept(text: str, shown: str) -> None:
    assert visible(text) == shown


@given(st.text(st.characters(), max_size=40))
def test_any_text_can_be_written_to_a_file(text: str) -> None:
    shown = visible(text)
    shown.encode("utf-8")
    assert visible(shown) == shown


def test_cut_characters_are_counted() -> None:
    assert shortened("abcdef", 6) == "abcdef"
    assert shortened("abcdef", 4) == "abcd … (2 more characters)"
