"""From differences to a verdict on a stage.

Integers, masks, positions, spans and text must agree, and so must the few floats that are counts
in disguise (frame rates). A different dtype, shape or kind of value is a schema change. Floats
beyond tolerance are judged by their effect: :mod:`~omni_grpo_core.golden.verdicts`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Literal

from omni_grpo_core.tolerances import CLIP_RATE, TRAINING
from omni_grpo_core.trace.divergence import Difference
from omni_grpo_core.trace.fingerprint import Fingerprint
from omni_grpo_core.trace.leaves import Leaf, Numbers, Ranking, Scalar

Kinds = Literal["fine", "float", "training", "meaning", "schema", "not finite"]
"""The kind of a difference. ``float``: drift, judged by its effect. ``training``: a value of a
GRPO step that moved by more than drift of the weights explains."""

_COUNTS = re.compile(
    r"(?:^|\.)(?:video_second_per_grid|sample_fps|source_fps|duration|temperature)$"
)
_TRAINING = ("advantage", "loss", "gradient")


def base_stage(stage: str) -> str:
    """
    >>> base_stage("loss.2"), base_stage("batch")
    ('loss', 'batch')
    """
    return stage.partition(".")[0]


def kind_of(
    stage: str, difference: Difference, was: Mapping[str, Leaf], now: Mapping[str, Leaf]
) -> Kinds:
    """The kind of a difference between two values of ``stage``."""
    if difference.verdict != "differs":
        return "fine"
    path = difference.path
    if stage == "scoring" and difference.max_abs is not None:
        # compared as a whole; the generation's verdict depends on whether margins held
        return "float" if math.isfinite(difference.max_abs) else "not finite"
    before, after = _leaf(was, path), _leaf(now, path)
    if before is None or after is None:
        # a missing medium was lost; a new one means that the golden has an older schema
        return "meaning" if after is None else "schema"
    if not _finite(after) and _finite(before):
        return "not finite"
    if type(before) is not type(after) and not _tensors(before, after):
        return "schema"
    match before, after:
        case (Numbers() | Fingerprint(), Numbers() | Fingerprint()):
            return _numbers_kind(stage, path, before, after)
        case (Ranking(), Ranking()):
            return "float"
        case (Scalar(value=float(a)), Scalar(value=float(b))):
            return _float_kind(stage, path, [(a, b)])
        case (Scalar(value=a), Scalar(value=b)) if type(a) is not type(b) and None not in (a, b):
            return "schema"
    return "meaning"


def _numbers_kind(
    stage: str, path: str, before: Numbers | Fingerprint, after: Numbers | Fingerprint
) -> Kinds:
    if before.dtype != after.dtype:
        return "schema"
    whole = isinstance(before, Fingerprint) and before.sha256 is not None
    if whole or (isinstance(before, Numbers) and before.integral):
        return "meaning"
    if _shapes(before) != _shapes(after):
        return "schema"
    if isinstance(before, Numbers) and isinstance(after, Numbers):
        old, new = (
            [x for part in side.parts for x in part.double().flatten().tolist()]
            for side in (before, after)
        )
        return _float_kind(stage, path, list(zip(old, new, strict=True)))
    return _float_kind(stage, path, [])


def _float_kind(stage: str, path: str, pairs: list[tuple[float, float]]) -> Kinds:
    if _COUNTS.search(path) or base_stage(stage) in ("reward", "sample", "conversation"):
        return "meaning"
    if base_stage(stage) in _TRAINING:
        scale = max((abs(a) for a, _ in pairs), default=0.0)
        moved = max((abs(a - b) for a, b in pairs), default=0.0)
        limit = CLIP_RATE if ".clip_" in path else TRAINING
        return "float" if limit.allows(0.0, moved, scale) else "training"
    return "float"


def _leaf(leaves: Mapping[str, Leaf], path: str) -> Leaf | None:
    # tensors compared together share one leaf; a difference names the one that differs
    return leaves.get(path) or leaves.get(re.sub(r"\[\d+\]$", "", path))


def _tensors(*leaves: Leaf) -> bool:
    return all(isinstance(leaf, Numbers | Fingerprint) for leaf in leaves)


def _shapes(leaf: Numbers | Fingerprint) -> tuple[tuple[int, ...], ...]:
    if isinstance(leaf, Fingerprint):
        return leaf.shapes
    return tuple(tuple(part.shape) for part in leaf.parts)


def _finite(leaf: Leaf) -> bool:
    """Whether a leaf holds no NaN or infinity."""
    match leaf:
        case Fingerprint():
            return not leaf.nan and not leaf.inf
        case Numbers():
            return leaf.integral or all(bool(part.isfinite().all()) for part in leaf.parts)
        case Ranking():
            return all(map(math.isfinite, leaf.logprobs))
        case Scalar(value=float(value)):
            return math.isfinite(value)
    return True


def first_nonfinite(leaves: Mapping[str, Leaf]) -> str | None:
    """The path of the first leaf with a NaN or an infinity, which no golden may hold.

    >>> first_nonfinite({"loss": Scalar(math.nan), "tokens": Scalar(12)})
    'loss'
    """
    return next((path for path, leaf in leaves.items() if not _finite(leaf)), None)
