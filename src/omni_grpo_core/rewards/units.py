"""Units by their names: ``data/units.yaml``, and how units are put together."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from itertools import product

from omni_grpo_core.rewards.normalise import table

_PER = re.compile(r"\s*/\s*|\s+per\s+|\s*每\s*", re.IGNORECASE)
_BESIDE = re.compile(r"\s*[·*×]\s*")
_POWER = re.compile(
    r"(?P<before>square|sq\.?|cubic|cu\.?|平方|立方)?\s*(?P<name>.+?)"
    r"(?P<after>\s+squared|\s+cubed|\s?\^\s?\{?-?\d\}?|(?<=[A-Za-z])[23])?",
    re.IGNORECASE,
)
_SQUARE, _CUBE = ("square", "sq", "squared", "平方"), ("cubic", "cu", "cubed", "立方")
_WORD = re.compile(r"[^\W\d_][^\s\d,]*")
_LONGEST = 40


@cache
def _names() -> dict[str, frozenset[str]]:
    """Spelling → the units that it may name."""
    names: dict[str, set[str]] = {}
    for unit, spellings in table("units").items():
        for spelling in (unit, *spellings):
            names.setdefault(spelling, set()).add(unit)
    return {spelling: frozenset(units) for spelling, units in names.items()}


@cache
def _folded() -> dict[str, frozenset[str]]:
    """As :func:`_names`, in small letters, where no two spellings differ by case alone."""
    folded: dict[str, frozenset[str]] = {}
    for spelling, units in _names().items():
        key = spelling.casefold()
        folded[key] = folded.get(key, frozenset()) | units
    return folded


def known(text: str) -> frozenset[str]:
    """The units of the table that ``text`` may name, as written or else in small letters."""
    return _names().get(text) or _folded().get(text.casefold(), frozenset())


def read_unit(text: str) -> frozenset[str] | None:
    """Canonical names of the unit that ``text`` may be; several where people write one alike.
    A single word that no table has is a unit of its own; ``None``: this is no unit.

    >>> sorted(read_unit("km/h")), read_unit("kilometres per hour") == read_unit("km/h")
    (['kilometer/hour'], True)
    >>> sorted(read_unit("m²".replace("²", "^2"))), sorted(read_unit("apples"))
    (['meter^2'], ['apple'])
    >>> read_unit("of the cars") is None
    True
    """
    text = text.strip().rstrip(".")
    if not text or len(text) > _LONGEST:
        return None
    if found := known(text):
        return found
    over = [[*_factors(part)] for part in _PER.split(text)]
    if any(choices is None for part in over for choices in part):
        return _unknown(text)
    each = [["·".join(sorted(names)) for names in product(*filter(None, part))] for part in over]
    return frozenset("/".join(names) for names in product(*each))


def _factors(text: str) -> Iterator[frozenset[str] | None]:
    for part in _BESIDE.split(text):
        found = _POWER.fullmatch(part)
        units = known(found["name"].strip()) if found else frozenset()
        if found is None or not units:
            yield None
            continue
        raised = [(found[side] or "").strip(" ^{}.").casefold() for side in ("before", "after")]
        power = next(filter(None, raised), "1")
        power = "2" if power in _SQUARE else "3" if power in _CUBE else power
        yield frozenset(unit if power == "1" else f"{unit}^{power}" for unit in units)


def _unknown(text: str) -> frozenset[str] | None:
    if not _WORD.fullmatch(text):
        return None
    word = text.casefold()
    return frozenset((word[:-1] if len(word) > 3 and word.endswith("s") else word,))
