"""From character offsets of a completion to its tokens, for rewards that act on a part of it.

Sampled ids are mapped through their own bytes. Re-encoding the text would be simpler and wrong:
a model may sample ids that the tokenizer would never choose for that text.
"""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Iterable, Sequence

from omni_grpo_core.types import Section


def token_offsets(pieces: Iterable[bytes]) -> tuple[tuple[int, int], ...]:
    """Half-open character range of each token in ``b"".join(pieces)`` decoded as UTF-8.

    A character that several tokens make up together belongs to each of them. Bytes that are no
    UTF-8 become U+FFFD exactly as in ``decode("utf-8", "replace")``.

    >>> token_offsets([b"a", "笑".encode()[:2], "笑".encode()[2:] + b"b"])
    ((0, 1), (1, 2), (1, 3))
    """
    decoder = getincrementaldecoder("utf-8")("replace")
    offsets = []
    done = 0
    for piece in pieces:
        start = done
        done += len(decoder.decode(piece))
        pending = bool(decoder.getstate()[0])
        offsets.append((start, done + pending))
    return tuple(offsets)


def token_span(section: Section, offsets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Half-open range of the tokens that hold a character of ``section``.

    A token across the border of the section (``>A``) is part of it.

    >>> token_span(Section("bc", 1, 3), [(0, 2), (2, 3), (3, 4)])
    (0, 2)
    """
    inside = [i for i, (a, b) in enumerate(offsets) if a < section.end and b > section.start]
    return (inside[0], inside[-1] + 1) if inside else (len(offsets), len(offsets))


def token_bytes(token: str) -> bytes:
    """Bytes of a token as byte-level BPE vocabularies (GPT-2, Qwen) spell it.

    Printable Latin-1 stands for its own byte, the other bytes for U+0100 onwards, in order. An
    added token such as ``<|im_end|>`` stands for its own text.

    >>> token_bytes("Ġsmiles"), token_bytes("<|im_end|>")
    (b' smiles', b'<|im_end|>')
    """
    if all(char in _BYTE for char in token):
        return bytes(_BYTE[char] for char in token)
    return token.encode()


_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(0x100 + i): byte for i, byte in enumerate(_OTHERS)
}
