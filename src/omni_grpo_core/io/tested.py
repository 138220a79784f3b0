"""The releases of transformers that the suite runs under, one lane of ``tox.ini`` each.

The bound of ``pyproject.toml``, the lanes, CI and the tables of the README are held against these
by tests; a command that loads a newer one says so.
"""

from __future__ import annotations

TRANSFORMERS = ("4.52.4", "4.57.6", "5.14.1", "5.17.0", "5.23.0", "5.24.0")
"""Oldest first."""
DEFAULT = "5.17.0"
"""What ``constraints.txt`` pins."""
NEWEST = TRANSFORMERS[-1]


def newer_than_tested(installed: str) -> str | None:
    """One line about a transformers that is newer than every tested one, else ``None``.

    >>> newer_than_tested("5.24.0")
    >>> newer_than_tested("5.26.0")
    'transformers 5.26.0 is newer than 5.24.0, the newest that was tested; omni-grpo golden ...
    """
    from packaging.version import InvalidVersion, Version

    try:
        newer = Version(installed) > Version(NEWEST)
    except InvalidVersion:  # a build of somebody's own: nothing is known of its age
        return None
    if not newer:
        return None
    return (
        f"transformers {installed} is newer than {NEWEST}, the newest that was tested; "
        "omni-grpo golden check says what it moves"
    )
