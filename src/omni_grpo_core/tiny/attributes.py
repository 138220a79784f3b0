"""What a synthetic clip shows and sounds like, and which combinations training may see.

A clip is a bar of one *colour* that *moves* one way while a tone of one *pitch* sounds:
4 x 4 x 4 combinations. Their indices form a Latin square, so each split below has every single
value, while 16 whole combinations stay unseen in training: a model that answers right on those
has learnt colour, motion and pitch apart from each other.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal, get_args

Split = Literal["train", "select", "held-out"]

SPLITS: tuple[Split, ...] = get_args(Split)
COLOURS: tuple[str, ...] = ("red", "green", "blue", "yellow")
MOTIONS: tuple[str, ...] = ("left", "right", "up", "down")
PITCHES: tuple[str, ...] = ("low", "middle", "high", "shrill")


@dataclass(frozen=True, slots=True)
class Attributes:
    """One value of each attribute: what a clip is about."""

    colour: str
    motion: str
    pitch: str


ALL: tuple[Attributes, ...] = tuple(
    Attributes(*values) for values in itertools.product(COLOURS, MOTIONS, PITCHES)
)


def split_of(attributes: Attributes) -> Split:
    """The one split a combination belongs to: 40 train, 8 select, 16 held-out.

    ``select`` is for choosing between recipes and for stopping early; ``held-out`` is only ever
    measured.

    >>> split_of(Attributes("red", "left", "low")), split_of(Attributes("red", "left", "high"))
    ('held-out', 'train')
    """
    colour = COLOURS.index(attributes.colour)
    motion = MOTIONS.index(attributes.motion)
    diagonal = (colour + motion + PITCHES.index(attributes.pitch)) % 4
    if diagonal == 0:
        return "held-out"
    if diagonal == 1 and motion // 2 == colour % 2:
        return "select"
    return "train"


def combinations(split: Split) -> tuple[Attributes, ...]:
    """The combinations of a split, in a fixed order."""
    return tuple(attributes for attributes in ALL if split_of(attributes) == split)
