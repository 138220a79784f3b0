"""The tiny checkpoints shipped with the package, one per family, their recipe and their clips.

Nothing heavy is imported here: ``recipe`` and ``evaluate`` need torch and transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

FamilyName = Literal["qwen2.5", "qwen3"]

_HERE = Path(__file__).parent
_FOLDERS: dict[FamilyName, str] = {"qwen2.5": "checkpoint", "qwen3": "checkpoint_qwen3"}


def checkpoint_dir(family: FamilyName = "qwen2.5") -> Path:
    """The shipped checkpoint of a family: a folder that ``from_pretrained`` reads.

    >>> (checkpoint_dir() / "config.json").is_file()
    True
    """
    return _HERE / _FOLDERS[family]


def data_file() -> Path:
    """The shipped rows on the shipped clips, in HumanOmniV2's JSON format.

    >>> data_file().is_file()
    True
    """
    return _HERE / "data" / "samples.json"
