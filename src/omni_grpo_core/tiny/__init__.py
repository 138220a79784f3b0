"""The tiny checkpoint that ships with the package, its recipe, and its clips.

Nothing heavy is imported here: ``recipe`` and ``evaluate`` need torch and transformers.
"""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent


def checkpoint_dir() -> Path:
    """The shipped checkpoint: a folder that ``from_pretrained`` reads.

    >>> (checkpoint_dir() / "config.json").is_file()
    True
    """
    return _HERE / "checkpoint"


def data_file() -> Path:
    """The shipped rows on the shipped clips, in HumanOmniV2's JSON format.

    >>> data_file().is_file()
    True
    """
    return _HERE / "data" / "samples.json"
