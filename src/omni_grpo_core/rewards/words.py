"""Small text helpers shared by several rewards."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import yaml

from omni_grpo_core.errors import ConfigError

# Han, kana, Thai, Lao, Myanmar, Khmer: written without spaces between words
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
_WORD_OR_SIGN = re.compile(_UNSPACED.pattern + r"|[^\W_]+")
_bad = partial(
    ConfigError,
    want="YAML of the form 'name: [word, word]', every word a non-empty string",
    fix='correct the file; quote words such as "yes" and "no"',
)


def tidy(text: str) -> str:
    """Compatibility forms (full-width letters) folded, white space collapsed and stripped.

    >>> tidy("  Ａ，  b ")
    'A, b'
    """
    return " ".join(unicodedata.normalize("NFKC", text).split())


def fold(text: str) -> str:
    """:func:`tidy`, case folded, without punctuation at the ends: for comparing whole phrases.

    >>> fold(" The Red car. ")
    'the red car'
    """
    return tidy(text).casefold().strip(" .,;:!?'\"`*()[]{}。、；：！？“”‘’")


def unspaced(text: str) -> bool:
    """Whether at least half of the letters belong to a script written without spaces.

    >>> unspaced("他在笑 OK"), unspaced("a man, 男")
    (True, False)
    """
    letters = sum(map(str.isalnum, text))
    return letters > 0 and 2 * len(_UNSPACED.findall(text)) >= letters


def apart(text: str) -> str:
    """Each character of a script without spaces as a word, so that spaces beside it do not count.

    >>> apart("中文abc d")
    '中 文 abc d'
    """
    return " ".join(_UNSPACED.sub(r" \g<0> ", text).split())


def tokens(text: str) -> list[str]:
    """Case-folded words, or single characters where a script has no spaces.

    >>> tokens("He smiles, 他笑了")
    ['he', 'smiles', '他', '笑', '了']
    """
    return _WORD_OR_SIGN.findall(tidy(text).casefold())


def read_lists(path: Path) -> Mapping[str, Sequence[str]]:
    """Raises :class:`~omni_grpo_core.errors.ConfigError` naming the file and what is wrong."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _bad(str(path), got=f"a file that cannot be read ({error})") from error
    return parse_lists(text, str(path))


def parse_lists(text: str, item: str) -> Mapping[str, Sequence[str]]:
    """
    >>> parse_lists("joy: [happiness, delight]", "mine.yaml")
    {'joy': ['happiness', 'delight']}
    """
    try:
        lists = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise _bad(item, got=f"invalid YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(lists, dict) or not lists:
        raise _bad(item, got=type(lists).__name__)
    for name, words in lists.items():
        # an unquoted yes, no or 3 is not a string in YAML
        strings = [name, *words] if isinstance(words, list) else [None]
        if not all(isinstance(word, str) and word.strip() for word in strings):
            raise _bad(item, got=f"under {name!r}: {str(words)[:60]}")
    return lists
