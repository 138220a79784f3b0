"""Character offsets of a completion to token spans, and token-level advantages on those spans.

A partial reward judges a part of the answer (the context, the reasoning), so its advantage acts on
the tokens of that part only. The part is known as characters; which tokens encode them is read from
the bytes of each token, because byte-level BPE may split one character over several tokens.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omni_grpo_core.errors import TrainError
from omni_grpo_core.losses.shapes import expand_advantages, require_mask, require_shape


@dataclass(frozen=True, slots=True)
class TokenOffsets:
    """The characters that each of ``n`` tokens encodes, wholly or in part.

    ``text`` has every token's bytes, invalid ones as U+FFFD. Token ``t`` covers
    ``text[starts[t]:ends[t]]``; neighbours overlap if a character is split between them. Both
    sequences have length ``n``.
    """

    text: str
    starts: tuple[int, ...]
    ends: tuple[int, ...]


def byte_pieces(tokens: Sequence[str]) -> tuple[bytes, ...]:
    """The bytes behind a byte-level tokenizer's token strings (``convert_ids_to_tokens``).

    A token with any character outside the byte alphabet (such as an added token with a space)
    becomes its own UTF-8, as in the decoder.

    >>> byte_pieces(["Ġthe", "<|im_end|>", "Ã©"])
    (b' the', b'<|im_end|>', b'\\xc3\\xa9')
    """
    return tuple(
        bytes(_BYTE_OF[char] for char in token)
        if all(char in _BYTE_OF for char in token)
        else token.encode()
        for token in tokens
    )


def token_offsets(pieces: Sequence[bytes], text: str) -> TokenOffsets:
    """Offsets of tokens in the completion ``text`` whose tokens have the bytes ``pieces``.

    ``text`` may end before the last tokens do: a final eos is not part of it. Raises ``TrainError``
    if the pieces do not decode to ``text``: offsets into it would be meaningless.

    The euro sign has three bytes, here in two tokens:

    >>> token_offsets([b"a", b"\\xe2", b"\\x82\\xac", b"b"], "a€b")
    TokenOffsets(text='a€b', starts=(0, 1, 1, 2), ends=(1, 2, 2, 3))
    """
    data = b"".join(pieces)
    spelled = data.decode("utf-8", errors="replace")
    if not spelled.startswith(text):
        at = next((i for i, (a, b) in enumerate(zip(spelled, text, strict=False)) if a != b), None)
        where = min(len(spelled), len(text)) if at is None else at
        raise TrainError(
            f"completion text, character {where}",
            got=repr(text[where : where + 20]),
            want=f"{spelled[where : where + 20]!r}, which the token ids decode to",
            fix="decode with special tokens kept and without cleaning up spaces",
        )
    char_starts = _char_starts(data)
    starts: list[int] = []
    ends: list[int] = []
    position = 0
    for piece in pieces:
        end = position + len(piece)
        after = bisect_left(char_starts, end)
        starts.append(bisect_right(char_starts, position) - 1 if piece else after)
        ends.append(after)
        position = end
    return TokenOffsets(spelled, tuple(starts), tuple(ends))


def token_span(offsets: TokenOffsets, start: int, end: int) -> tuple[int, int]:
    """The tokens ``[first, last)`` that encode the characters ``[start, end)``.

    A token across the border belongs to the span, since it cannot be sampled in halves. An empty
    range of characters has no tokens: ``first == last``. Raises ``TrainError`` for offsets outside
    the text.

    >>> token_span(token_offsets([b"a", b"\\xe2", b"\\x82\\xac", b"b"], "a€b"), 1, 2)
    (1, 3)
    """
    if not 0 <= start <= end <= len(offsets.text):
        raise TrainError(
            "span",
            got=f"characters {start} to {end}",
            want=f"0 <= start <= end <= {len(offsets.text)}",
            fix="take the offsets from the completion's own text",
        )
    covering = [
        token
        for token, (first, last) in enumerate(zip(offsets.starts, offsets.ends, strict=True))
        if first < end and start < last
    ]
    if start == end or not covering:
        before = sum(last <= start for last in offsets.ends)
        return before, before
    return covering[0], covering[-1] + 1


@dataclass(frozen=True, slots=True, eq=False)
class PartialAdvantage:
    """One partial reward's advantages. ``values``: (N,), 0 for a row it did not score. ``spans``:
    length N, the tokens ``[first, last)`` each acts on; ``None`` where the part is absent."""

    name: str
    values: Tensor
    spans: tuple[tuple[int, int] | None, ...]


def token_advantages(base: Tensor, mask: Tensor, partial: Sequence[PartialAdvantage]) -> Tensor:
    """A_it = base_i + sum of the partial advantages whose span contains token t.

    ``base``: (N,). ``mask``: bool, (N, C). Returns (N, C) in the dtype of ``base``, 0 where
    ``mask`` is False. Raises ``TrainError`` for shapes that differ and a span outside its
    completion.

    >>> mask = torch.tensor([[True, True, True], [True, True, False]])
    >>> context = PartialAdvantage("context", torch.tensor([2.0, -2.0]), ((0, 1), (1, 2)))
    >>> token_advantages(torch.tensor([1.0, -1.0]), mask, [context]).tolist()
    [[3.0, 1.0, 1.0], [-1.0, -3.0, 0.0]]
    """
    rows, _ = require_mask("mask", mask)
    lengths = mask.sum(-1).tolist()
    total = expand_advantages(base, torch.zeros(mask.shape, dtype=base.dtype)).clone()
    for part in partial:
        require_shape(f"partial advantage {part.name}", part.values, (rows,))
        if len(part.spans) != rows:
            raise TrainError(
                f"partial advantage {part.name}",
                got=f"{len(part.spans)} spans",
                want=f"{rows}, one per completion",
                fix="pass None for a completion without that part",
            )
        for row, span in enumerate(part.spans):
            if span is None:
                continue
            if not 0 <= span[0] <= span[1] <= lengths[row]:
                raise TrainError(
                    f"partial advantage {part.name}, completion {row}",
                    got=f"tokens {span[0]} to {span[1]}",
                    want=f"a span within its {lengths[row]} tokens",
                    fix="find the span with token_span on that completion's own offsets",
                )
            total[row, span[0] : span[1]] += part.values[row]
    return torch.where(mask, total, torch.zeros_like(total))


def _char_starts(data: bytes) -> list[int]:
    """Byte offset at which each character of ``data.decode(errors="replace")`` begins.

    One decoding error yields one replacement character, so decoding proceeds from error to error.
    """
    starts: list[int] = []
    position = 0
    while position < len(data):
        try:
            valid, bad = data[position:].decode(), 0
        except UnicodeDecodeError as error:
            valid, bad = data[position : position + error.start].decode(), error.end - error.start
        for char in valid:
            starts.append(position)
            position += len(char.encode())
        if bad:
            starts.append(position)
            position += bad
    return starts


def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for: printable Latin-1 for
    itself, characters from U+0100 on for the other 68 bytes, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    alphabet |= {chr(0x100 + at): byte for at, byte in enumerate(others)}
    return alphabet


_BYTE_OF = _byte_alphabet()
