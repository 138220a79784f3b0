"""Small text tools that several rewards share."""

from __future__ import annotations

import re
import unicodedata

# Han, kana, Thai, Lao, Myanmar, Khmer: written without spaces between words
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
_WORD_OR_SIGN = re.compile(_UNSPACED.pattern + r"|[^\W_]+")


def tidy(text: str) -> str:
    """Compatibility forms folded (full-width letters), white space single, none at the ends.

    >>> tidy("  Ａ，  b ")
    'A, b'
    """
    return " ".join(unicodedata.normalize("NFKC", text).split())


def fold(text: str) -> str:
    """:func:`tidy`, case folded, without punctuation at the ends: for comparing whole phrases.

    >>> fold(" The Red car. ")
    'the red car'
    """
    return tidy(text).casefold().strip(" .,;:!?'\"`*。、；：！？“”‘’")


def unspaced(text: str) -> bool:
    """Whether at least half of the letters are of a script written without spaces.

    >>> unspaced("他在笑 OK"), unspaced("a man, 男")
    (True, False)
    """
    letters = sum(map(str.isalnum, text))
    return letters > 0 and 2 * len(_UNSPACED.findall(text)) >= letters


def tokens(text: str) -> list[str]:
    """Words, or single characters where a script has no spaces; case folded.

    >>> tokens("He smiles, 他笑了")
    ['he', 'smiles', '他', '笑', '了']
    """
    return _WORD_OR_SIGN.findall(tidy(text).casefold())
