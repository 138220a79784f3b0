"""Which transformers is installed, and which ones have a fault of their own."""

from __future__ import annotations

from importlib.metadata import version

from packaging.specifiers import SpecifierSet
from packaging.version import Version

CACHE_DROPPED = ">=4.53,<5.24"
"""The releases whose checkpointing layer takes the key-value cache from a block in train mode. From
5.24.0 on it does so only where gradients are enabled, and ``generate`` has none."""
CACHE_MISSED = ">=5,<5.16"
"""Those of them whose ``generate`` cannot go on without it: the second token raises an IndexError.
Tried: 5.0.0, 5.5.0, 5.10.1, 5.12.0, 5.13.0, 5.14.0, 5.14.1, 5.15.0; not so in 4.57.6 and 5.16.0."""


def transformers_version() -> Version:
    return Version(version("transformers"))


def is_among(versions: str) -> bool:
    """Whether the installed transformers is one of a PEP 440 specifier's; ``""`` is all.

    >>> is_among(""), is_among("<4")
    (True, False)
    """
    return SpecifierSet(versions, prereleases=True).contains(transformers_version())


def cache_is_dropped() -> bool:
    """Whether the installed transformers drops the cache while checkpointing."""
    return is_among(CACHE_DROPPED)


def cache_is_repaired() -> bool:
    """Whether it once did: the installed one is later than those that drop the cache."""
    return transformers_version() >= Version("4.53") and not cache_is_dropped()


def kept() -> str:
    """What a version without the fault does, in words."""
    again = ": repaired in this version" if cache_is_repaired() else ""
    return f"transformers {transformers_version()} keeps the cache while checkpointing{again}"
