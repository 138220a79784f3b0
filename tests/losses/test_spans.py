from __future__ import annotations

import pytest
import torch

from omni_grpo_core.errors import TrainError
from omni_grpo_core.losses.spans import (
    PartialAdvantage,
    byte_pieces,
    token_advantages,
    token_offsets,
    token_span,
)


def cut(text: str, *lengths: int) -> list[bytes]:
    """The UTF-8 of ``text`` in pieces of the given lengths in bytes."""
    data, pieces = text.encode(), []
    for length in lengths:
        pieces.append(data[:length])
        data = data[length:]
    assert not data
    return pieces


def test_section_of_a_completion() -> None:
    text = "<context>red</context>"
    offsets = token_offsets(cut(text, 1, 7, 1, 2, 1, 10), text)
    start = text.index("red")
    assert token_span(offsets, start, start + 3) == (3, 5)


def test_a_token_across_the_border_belongs_to_the_span() -> None:
    text = "<think>ab</think>"
    offsets = token_offsets(cut(text, 6, 2, 2, 7), text)  # '<think' '>a' 'b<' '/think>'
    assert token_span(offsets, 7, 9) == (1, 3)


@pytest.mark.parametrize(
    ("lengths", "span"),
    [((1, 4, 1), (1, 2)), ((1, 1, 1, 1, 1, 1), (1, 5)), ((3, 3), (0, 2)), ((2, 0, 3, 1), (0, 3))],
)
def test_a_character_split_over_tokens(lengths: tuple[int, ...], span: tuple[int, int]) -> None:
    """An emoji of four bytes between two letters."""
    assert token_span(token_offsets(cut("a🙂b", *lengths), "a🙂b"), 1, 2) == span


def test_two_characters_in_one_token_and_one_in_two() -> None:
    # 红 and 色: three bytes each; tokens of 4 and 2 bytes
    offsets = token_offsets(cut("红色", 4, 2), "红色")
    assert token_span(offsets, 0, 1) == (0, 1)
    assert token_span(offsets, 1, 2) == (0, 2)


def test_bytes_that_are_not_text() -> None:
    """A model may stop in the middle of a character, or sample bytes that never form one."""
    pieces = [b"a", b"\xe7\xba", b"b", b"\xff", b"\xf0\x9f"]
    offsets = token_offsets(pieces, "a\ufffdb\ufffd\ufffd")
    assert (offsets.starts, offsets.ends) == ((0, 1, 2, 3, 4), (1, 2, 3, 4, 5))
    assert token_span(offsets, 2, 3) == (2, 3)


def test_the_final_eos_is_not_part_of_the_text() -> None:
    offsets = token_offsets([b"ab", b"<|im_end|>"], "ab")
    assert token_span(offsets, 0, 2) == (0, 1)


def test_text_from_elsewhere_is_refused() -> None:
    with pytest.raises(TrainError, match=r"character 1: found '\.'"):
        token_offsets([b"a ", b"."], "a.")  # spaces cleaned up
    with pytest.raises(TrainError, match="character 1: found 'bc'"):
        token_offsets([b"a"], "abc")


def test_empty_and_impossible_spans() -> None:
    offsets = token_offsets([b"ab", b"cd"], "abcd")
    assert token_span(offsets, 2, 2) == (1, 1)
    assert token_span(offsets, 4, 4) == (2, 2)
    for start, end in ((-1, 2), (3, 2), (0, 5)):
        with pytest.raises(TrainError, match="span"):
            token_span(offsets, start, end)


def test_byte_pieces_invert_the_byte_alphabet() -> None:
    # the alphabet as transformers publishes it, for all 256 bytes
    convert = pytest.importorskip("transformers.convert_slow_tokenizer")
    alphabet = convert.bytes_to_unicode()
    assert byte_pieces(list(alphabet.values())) == tuple(bytes([byte]) for byte in alphabet)
    assert byte_pieces(["<|a b|>", "<|im_end|>"]) == (b"<|a b|>", b"<|im_end|>")


def test_partial_advantages_are_added_on_their_span_only() -> None:
    mask = torch.tensor([[True] * 4, [True, True, True, False]])
    context = PartialAdvantage("context", torch.tensor([10.0, -10.0]), ((0, 2), (1, 3)))
    reasoning = PartialAdvantage("reasoning", torch.tensor([100.0, 0.0]), ((1, 4), None))
    found = token_advantages(torch.tensor([1.0, -1.0]), mask, [context, reasoning])
    assert found.tolist() == [[11.0, 111.0, 101.0, 101.0], [-1.0, -11.0, -11.0, 0.0]]


def test_partial_advantages_that_do_not_fit() -> None:
    mask, base = torch.tensor([[True, True, False]]), torch.tensor([1.0])
    for values, spans in (
        (torch.zeros(1), ((0, 3),)),
        (torch.zeros(1), ((2, 1),)),
        (torch.zeros(2), ((0, 1),)),
        (torch.zeros(1), ((0, 1), (0, 1))),
    ):
        with pytest.raises(TrainError, match="partial advantage p"):
            token_advantages(base, mask, [PartialAdvantage("p", values, spans)])
    with pytest.raises(TrainError, match="advantages"):
        token_advantages(torch.zeros(3), mask, [])
