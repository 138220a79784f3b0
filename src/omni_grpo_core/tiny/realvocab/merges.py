"""Byte-pair ranks -> the vocabulary and merges of a byte-level BPE model.

tiktoken stores only tokens in the order they were learnt; the other format also needs the pair that
each was merged from. It is found by encoding the token's bytes with the tokens learnt before it:
exactly two parts must remain.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from omni_grpo_core.errors import ConfigError


def byte_letters() -> tuple[str, ...]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2, ``encoder.py``).

    Printable Latin-1 bytes map to themselves, the others, in order, to the characters from U+0100
    on.

    >>> letters = byte_letters()
    >>> letters[ord("A")], letters[ord(" ")], letters[ord("\\n")], len(set(letters))
    ('A', 'Ġ', 'Ċ', 256)
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return tuple(chr(byte if byte in printable else next(others)) for byte in range(256))


def vocabulary_and_merges(
    ranks: Mapping[bytes, int],
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """``ranks`` in the byte-level format: ids by token, and pairs in the order they merge.

    Raises:
        ConfigError: a token that is not a pair of earlier ones.

    >>> ranks = {bytes([byte]): byte for byte in range(256)} | {b"an": 256, b"ban": 257}
    >>> vocabulary_and_merges(ranks)[1]
    [('a', 'n'), ('b', 'an')]
    """
    letters = byte_letters()

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    vocabulary = {spelled(token): rank for token, rank in ranks.items()}
    in_order = sorted((token for token in ranks if len(token) > 1), key=ranks.__getitem__)
    pairs = [_pair(token, ranks) for token in in_order]
    return vocabulary, [(spelled(left), spelled(right)) for left, right in pairs]


def _pair(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    never = ranks[token]
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        merged = [ranks.get(a + b, never) for a, b in pairwise(parts)]
        lowest = min(merged)
        if lowest >= never:
            raise ConfigError(
                f"token {never} of the byte-pair ranks, {token!r}",
                got=f"{len(parts)} parts that no earlier token joins",
                want="a pair of earlier tokens",
                fix="use the file as published: these are not byte-pair ranks",
            )
        at = merged.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]
