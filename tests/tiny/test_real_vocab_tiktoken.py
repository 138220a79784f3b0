"""The converted tokenizer encodes like tiktoken with the ranks themselves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any
from unicodedata import normalize

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omni_grpo_core.tiny.realvocab import KNOWN_IDS
from omni_grpo_core.tiny.realvocab.ranks import read_ranks

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MARKUP = {token: ids[0] for token, ids in KNOWN_IDS.items() if ids[0] >= 151_643}
# Qwen2's pattern in tiktoken's syntax: possessive and plain quantifiers match the same text here
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = (
    "",
    "The quick brown fox, it's said, jumped over 13 lazy dogs; we'LL see: they'Ve gone.",
    "<context>A red bar moves left.</context><think>So it is B.</think><answer>B</answer>",
    "视频里的人在说什么？她似乎有些紧张，但声音很平静。",
    "日本語とハングル 한국어 텍스트, русский текст, العربية, עברית, हिन्दी, ไทย",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 👍🏽 ✈️ ①②③ ½ x² ﬁ",
    "def f(x: int) -> str:\n\treturn f'{x:04d}'  # ok\r\n\r\n    if x and not y:\n        pass\n",
    "3.14159 1,000,000 2026-03-01T12:30:00Z 0xFF 1e-9 ١٢٣ ４５６",
    " \t\n \r\n\n\n   leading and trailing   \u00a0\u2003\u200b\u3000 \x0b\x0c\x85 ",
    "e\u0301 \u00e9 \u1100\u1161 \u212b \u0958 A\u030a\u0301 \ufb01",
    "a" * 500 + " " * 300 + "\n" * 100 + "-" * 200,
    "\x00\x01\x7f\ufeff\ufffd\U000e0001\U0010ffff",
    "https://example.org/a_b-c?d=%20&e=[1,2]#f <html lang='en'>&amp;</html>",
    "$$\\int_0^\\infty e^{-x^2}\\,dx = \\frac{\\sqrt{\\pi}}{2}$$",
)


@pytest.fixture(scope="module")
def built(qwen_folder: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(qwen_folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def encoding(ranks: Path) -> Any:
    tiktoken = pytest.importorskip("tiktoken")
    return tiktoken.Encoding(
        "qwen", pat_str=PATTERN, mergeable_ranks=read_ranks(ranks), special_tokens=MARKUP
    )


def expected(encoding: Any, text: str) -> list[int]:
    # tiktoken does not normalise; Qwen2's tokenizer composes (NFC)
    return list(encoding.encode(normalize("NFC", text), disallowed_special=()))


@pytest.mark.parametrize("text", CORPUS, ids=range(len(CORPUS)))
def test_corpus(built: Tokenizer, encoding: Any, text: str) -> None:
    ids = built.encode(text).ids
    assert ids == expected(encoding, text)
    assert built.decode(ids, skip_special_tokens=False) == normalize("NFC", text)


@pytest.mark.slow
def test_every_token_as_a_text_of_its_own(built: Tokenizer, encoding: Any, ranks: Path) -> None:
    texts = []
    for token in read_ranks(ranks):
        try:
            texts.append(token.decode())
        except UnicodeDecodeError:
            continue  # part of a character
    assert len(texts) > 150_000
    found = [made.ids for made in built.encode_batch(texts)]
    # most are returned as they are; if NFC or the pattern splits one, both split it
    assert found == [expected(encoding, text) for text in texts]


# surrogates are not text; unassigned characters change category with each Unicode version
CHARACTERS = st.characters(exclude_categories=("Cs", "Cn"))
SNIPPETS = st.sampled_from((" ", "  ", "\n", "\r\n", "'s", "'LL", "</", ".", "１", "é", "e\u0301"))
TEXT = st.lists(st.one_of(CHARACTERS, SNIPPETS), max_size=60).map("".join)


@given(text=TEXT)
def test_any_text(built: Tokenizer, encoding: Any, text: str) -> None:
    assert built.encode(text).ids == expected(encoding, text)


@given(pieces=st.lists(st.tuples(TEXT, st.sampled_from(sorted(MARKUP))), max_size=8))
def test_any_text_between_markup(
    built: Tokenizer, encoding: Any, pieces: list[tuple[str, str]]
) -> None:
    # markup is split off before the text between is normalised
    wanted = [token for text, mark in pieces for token in (*expected(encoding, text), MARKUP[mark])]
    assert built.encode("".join(text + mark for text, mark in pieces)).ids == wanted
