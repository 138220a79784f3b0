"""Word lists in YAML: a mapping of names to lists of words, which a user may replace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from omni_grpo_core.errors import ConfigError


def read_lists(path: Path) -> Mapping[str, Sequence[str]]:
    """Raises :class:`~omni_grpo_core.errors.ConfigError` naming the file and what is wrong."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _bad(str(path), f"a file that cannot be read ({error})") from error
    return parse_lists(text, str(path))


def parse_lists(text: str, item: str) -> Mapping[str, Sequence[str]]:
    """
    >>> parse_lists("joy: [happiness, delight]", "mine.yaml")
    {'joy': ['happiness', 'delight']}
    """
    try:
        lists = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise _bad(item, f"no YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(lists, dict) or not lists:
        raise _bad(item, type(lists).__name__)
    for name, words in lists.items():
        # an unquoted yes, no or 3 is not a string in YAML
        strings = [name, *words] if isinstance(words, list) else [None]
        if not all(isinstance(word, str) and word.strip() for word in strings):
            raise _bad(item, f"under {name!r}: {str(words)[:60]}")
    return lists


def _bad(item: str, got: str) -> ConfigError:
    return ConfigError(
        item,
        got=got,
        want="YAML of the form 'name: [word, word]', every word a non-empty string",
        fix='mend the file; quote words such as "yes" and "no"',
    )
